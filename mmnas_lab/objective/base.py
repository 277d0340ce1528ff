"""What an objective is: a head and a loss on a network's output, and how it is evaluated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmnas_lab import distributed
from mmnas_lab.types import Batch, Inputs, Losses, Output

Run = Callable[[Inputs], Output]
Half = Literal["arch", "weights"]
"""The half-step of a bilevel search that a loss is for; plain training is a half-step of the weights."""


class Needs(NamedTuple):
    """What an objective reads of a batch."""

    views: Literal[1, 2]
    labels: bool


class Objective(nn.Module, ABC):
    """A loss with the parameters that belong to it (head, projector, decoder); they count as weights.

    Attributes:
        needs: views and labels that a batch must have.
        selects: the quantity of `evaluate` by which a state of the network is chosen, and its direction.
        shows: whether `snapshot` gives anything.
    """

    needs: Needs
    selects: tuple[str, Literal["min", "max"]]
    shows: bool = False

    @classmethod
    def unfit(cls, space: Any, settings: Mapping[str, Any]) -> str | None:
        """Why it cannot drive a search of that space with these settings; None where it can."""
        return None

    @abstractmethod
    def forward(self, run: Run, batch: Batch, half: Half = "weights") -> Losses:
        """The loss of one batch; `run` is the network, `half` matters where two half-steps differ (`Mix`)."""

    @abstractmethod
    def evaluate(self, run: Run, batches: Iterable[Batch]) -> dict[str, float]:
        """Quantities over all batches in eval mode, equal on all ranks; `loss` is one of them."""

    def snapshot(self, run: Run, batch: Batch) -> dict[str, Tensor]:
        """What of a few samples is worth a picture over a search, by name; nothing by default."""
        return {}

    def at_epoch(self, epoch: int, epochs: int) -> None:
        """Called as an epoch begins, counted from 0: weights that grow over the epochs are set here."""


Regulariser = Callable[[dict[str, Tensor]], Tensor]
"""A () penalty of a hypernet's mixing weights by name (`Hypernet.mixing`)."""


class Weighted(NamedTuple):
    """A regulariser, and the factor with which it joins the loss of the architecture half-step."""

    weight: float
    function: Regulariser


class Scored(nn.Module):
    """A network, its objective and regularisers as one module with one forward: what DDP wraps.

    Args:
        network: from inputs to an embedding; a hypernet where there are regularisers.
        objective: head and loss.
        regularisers: by the name under which each is logged; they join the architecture half-step alone,
            since mixing weights are constants in the other.
    """

    def __init__(
        self, network: nn.Module, objective: Objective, regularisers: dict[str, Weighted] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.regularisers = regularisers or {}

    def forward(self, batch: Batch, half: Half = "weights") -> Losses:
        """The losses of one batch; a regulariser's part is logged without its weight."""
        total, parts = self.objective(self.network, batch, half)
        if half == "weights" or not self.regularisers:
            return Losses(total, parts)
        network: Any = self.network
        for name, (weight, function) in self.regularisers.items():
            value = function(network.mixing())
            total, parts = total + weight * value, {**parts, name: value.detach()}
        return Losses(total, {**parts, "loss": total.detach()})


def union(needs: Iterable[Needs]) -> Needs:
    """What several objectives read together."""
    each = list(needs)
    return Needs(max(one.views for one in each), any(one.labels for one in each))


def evaluation_means(
    names: Sequence[str], batches: Iterable[tuple[Sequence[Tensor], int]], device: torch.device
) -> dict[str, float]:
    """Means of () values over the batches of all ranks, equal on all ranks.

    Args:
        names: of the values.
        batches: this rank's values, in the order of the names, and each batch's weight in the mean.
        device: where ranks without a batch sum as well.
    """
    total = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
    for values, weight in batches:
        total[:-1] += weight * torch.stack(list(values)).double()
        total[-1] += weight
    if distributed.world_size() > 1:
        dist.all_reduce(total)
    return dict(zip(names, (total[:-1] / total[-1]).tolist(), strict=True))

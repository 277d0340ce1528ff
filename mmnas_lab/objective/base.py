"""What an objective is: a head and a loss on a network's output, and how it is evaluated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from torch import Tensor, nn

from mmnas_lab.types import Batch, Inputs, Losses, Output

Run = Callable[[Inputs], Output]


class Needs(NamedTuple):
    """What an objective reads of a batch."""

    views: Literal[1, 2]
    labels: bool


class Objective(nn.Module, ABC):
    """A loss with the parameters that belong to it (head, projector, decoder); they count as weights.

    Attributes:
        needs: views and labels that a batch must have.
        selects: the quantity of `evaluate` by which a state of the network is chosen, and its direction.
    """

    needs: Needs
    selects: tuple[str, Literal["min", "max"]]

    @abstractmethod
    def forward(self, run: Run, batch: Batch) -> Losses:
        """The loss of one batch; `run` is the network."""

    @abstractmethod
    def evaluate(self, run: Run, batches: Iterable[Batch]) -> dict[str, float]:
        """Quantities over all batches in eval mode, equal on all ranks; `loss` is one of them."""


class Scored(nn.Module):
    """A network and its objective as one module with one forward: what DDP wraps."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def forward(self, batch: Batch) -> Losses:
        """The losses of one batch."""
        return self.objective(self.network, batch)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values (n,) with weights (n,)."""
    return (values * weights).sum() / weights.sum()

"""How the tokens of several modalities become one set of tokens.

M modalities of N_m tokens of width D_m, where a sample may lack some. What it lacks is left out: it counts in
no mean, no maximum, no sum, no product and no gate, and of a concatenation it is masked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab.search_space.mixers.encoder import Protocol

FusionName = Literal["concat", "mean", "max", "sum", "product", "gated"]
FUSION_NAMES: tuple[FusionName, ...] = get_args(FusionName)


class FusionFunction(nn.Module, ABC):
    """Tokens of M modalities to one set.

    Attributes:
        size: (N, D) of the fused tokens.
    """

    size: tuple[int, int]

    @abstractmethod
    def forward(self, tokens: Sequence[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """M tensors (B, N_m, D_m) to (B, N, D), and which of these tokens exist, (B, N), if not all.

        `present` (B, M) says which modalities a sample has; None: all.
        """


class Concat(FusionFunction):
    """Tokens side by side, projected to a common width where theirs differs.

    The released code of MixMAS fills them up with zeros instead.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], width: int, protocol: Protocol) -> None:
        super().__init__()
        self.released = protocol == "released_code"
        if self.released:
            width = max(own for _, own in sizes)
        self.projections = nn.ModuleList(
            nn.Identity() if self.released else _projection(own, width) for _, own in sizes
        )
        self.counts = [count for count, _ in sizes]
        self.size = (sum(self.counts), width)

    def forward(self, tokens: Sequence[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        projected = [layer(own) for layer, own in zip(self.projections, tokens, strict=True)]
        if self.released:
            projected = [F.pad(own, (0, self.size[1] - own.shape[-1])) for own in projected]
        fused = torch.cat(projected, 1)
        if present is None:
            return fused, None
        mask = torch.cat(
            [present[:, m, None].expand(-1, own.shape[1]) for m, own in enumerate(tokens)], 1
        )  # (B, N)
        return fused * mask[..., None], mask


class Aligned(nn.Module):
    """Tokens of M modalities at a common width and number: (B, M, N, D).

    The number is the largest; fewer tokens are spread over it by adaptive average pooling.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(_projection(own, width) for _, own in sizes)
        self.size = (max(count for count, _ in sizes), width)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        count = max(own.shape[1] for own in tokens)
        aligned = []
        for layer, own in zip(self.projections, tokens, strict=True):
            projected = layer(own)
            if projected.shape[1] != count:
                projected = F.adaptive_avg_pool1d(projected.transpose(1, 2), count).transpose(1, 2)
            aligned.append(projected)
        return torch.stack(aligned, 1)


def _projection(own: int, width: int) -> nn.Module:
    return nn.Identity() if own == width else nn.Linear(own, width)


def _mean(x: Tensor, present: Tensor) -> Tensor:
    return (x * present).sum(1) / present.sum(1).clamp(min=1)


def _max(x: Tensor, present: Tensor) -> Tensor:
    most = x.masked_fill(~present, float("-inf")).amax(1)
    return most.masked_fill(~present.any(1), 0.0)


def _sum(x: Tensor, present: Tensor) -> Tensor:
    return (x * present).sum(1)


def _product(x: Tensor, present: Tensor) -> Tensor:
    return x.masked_fill(~present, 1.0).prod(1).masked_fill(~present.any(1), 0.0)


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "max": _max,
    "sum": _sum,
    "product": _product,
}
"""(B, M, N, D), and what is present (B, M, 1, 1), to (B, N, D)."""


class Elementwise(FusionFunction):
    """The mean, maximum, sum or product of aligned tokens; zeros where a sample has no modality at all."""

    def __init__(self, name: str, sizes: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__()
        self.name = name
        self.aligned = Aligned(sizes, width)
        self.size = self.aligned.size

    def forward(self, tokens: Sequence[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.aligned(tokens)
        return ELEMENTWISE[self.name](x, _there(x, present)), None


class Gated(FusionFunction):
    """Gated multimodal units (Arevalo et al., arXiv 1702.01992) on aligned tokens.

    Features tanh(V_m x_m) are averaged with weights softmax_m(G_m [x_1, ..., x_M]) of their own at each
    token and channel; for two modalities these are the unit's z and 1 - z.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], width: int) -> None:
        super().__init__()
        self.aligned = Aligned(sizes, width)
        self.size = self.aligned.size
        self.features = nn.ModuleList(nn.Linear(width, width) for _ in sizes)
        self.gates = nn.Linear(len(sizes) * width, len(sizes) * width)

    def forward(self, tokens: Sequence[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.aligned(tokens)
        there = _there(x, present)
        x = x * there
        features = torch.stack([layer(x[:, m]).tanh() for m, layer in enumerate(self.features)], 1)
        together = x.transpose(1, 2).flatten(2)  # (B, N, M D)
        gates = self.gates(together).unflatten(-1, (len(self.features), -1)).transpose(1, 2)
        lowest = torch.finfo(gates.dtype).min
        weights = gates.masked_fill(~there, lowest).softmax(1)  # (B, M, N, D)
        return (weights * features * there).sum(1), None


def _there(x: Tensor, present: Tensor | None) -> Tensor:
    """(B, M, 1, 1) bool."""
    if present is None:
        return torch.ones(*x.shape[:2], 1, 1, dtype=torch.bool, device=x.device)
    return present[..., None, None]


def fusion_function(
    name: str, sizes: Sequence[tuple[int, int]], width: int, protocol: Protocol
) -> FusionFunction:
    """The fusion function of a name, one of `FUSION_NAMES`.

    Args:
        name: of the function.
        sizes: (N_m, D_m) of the modalities' tokens.
        width: D of the fused tokens.
        protocol: of the concatenation.
    """
    if name == "concat":
        return Concat(sizes, width, protocol)
    if name == "gated":
        return Gated(sizes, width)
    return Elementwise(name, sizes, width)

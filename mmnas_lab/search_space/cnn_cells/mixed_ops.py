"""The candidate operations of a supernet, each for all edges that leave one state at once.

Edges that leave a state read the same tensor. So its ReLU and its pools, with their BatchNorm, are computed
once; the convolutions of its n edges are one grouped convolution of n C channels, edge by edge; `none` is not
computed; and a mixing weight goes into the scale of the BatchNorm that ends the operation, where it costs
nothing: w BN(y) is BN(y) with scale w. Channels lie last in memory on a CPU, which is about twice as fast.

Each BatchNorm is without affine parameters, so that nothing can undo what alpha weighs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab.search_space.cnn_cells.depthwise import depthwise
from mmnas_lab.search_space.cnn_cells.mixtures import mixtures
from mmnas_lab.search_space.cnn_cells.pointwise import pointwise_norm
from mmnas_lab.search_space.cnn_cells.primitive_ops import avg_pool, max_pool


class State:
    """A state (B, C, H, W) of a cell, and what the edges that leave it share."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._repeated: dict[int, Tensor] = {}

    @cached_property
    def rectified(self) -> Tensor:
        """relu(x); nothing may write into it."""
        return torch.relu(self.x)

    def repeated(self, times: int) -> Tensor:
        """relu(x), so many times side by side: (B, times C, H, W); nothing may write into it either."""
        if times not in self._repeated:
            self._repeated[times] = torch.cat([self.rectified] * times, 1)
        return self._repeated[times]


class Norm(nn.BatchNorm2d):
    """BatchNorm without affine parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """The result times `scale` (channels,)."""
        if self.training:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        momentum = self.momentum or 0.0
        return F.batch_norm(
            x, self.running_mean, self.running_var, scale, None, self.training, momentum, self.eps
        )


def kernel(out_channels: int, in_channels: int, size: int) -> nn.Parameter:
    """(out, in, size, size) weights, drawn as `nn.Conv2d` draws those of a convolution with this fan-in."""
    bound = 1 / math.sqrt(in_channels * size * size)
    return nn.Parameter(torch.empty(out_channels, in_channels, size, size).uniform_(-bound, bound))


class EdgeOps(nn.Module, ABC):
    """One operation on n edges, with weights of their own."""

    @abstractmethod
    def forward(self, state: State, scale: Tensor) -> Tensor:
        """(B, n C, H / stride, W / stride), edge by edge, each times its entry of `scale` (n,)."""

    def added(self, state: State, scale: Tensor, total: Tensor | None) -> Tensor:
        """The result, added to `total` in place if there is one."""
        h: Tensor = self(state, scale)
        return h if total is None else total.add_(h)


class SeparableConvs(EdgeOps):
    """ReLU, depthwise and 1x1 convolution, BatchNorm; `repeats` times, the first with the stride."""

    def __init__(
        self, num_edges: int, channels: int, stride: int, size: int, dilation: int, repeats: int
    ) -> None:
        super().__init__()
        self.num_edges, self.channels, self.stride, self.dilation = num_edges, channels, stride, dilation
        n, c = num_edges, channels
        self.depthwise = nn.ParameterList(kernel(n * c, 1, size) for _ in range(repeats))
        self.pointwise = nn.ParameterList(kernel(n * c, c, 1) for _ in range(repeats))
        self.norms = nn.ModuleList(Norm(n * c) for _ in range(repeats))

    def forward(self, state: State, scale: Tensor) -> Tensor:
        return self.added(state, scale, None)

    def added(self, state: State, scale: Tensor, total: Tensor | None) -> Tensor:
        h, stride = state.repeated(self.num_edges), self.stride
        norms: Any = self.norms
        for repeat, norm in enumerate(norms):
            last = repeat == len(norms) - 1
            factor = scale.repeat_interleave(self.channels) if last else None
            h = depthwise(h, self.depthwise[repeat], stride, self.dilation)
            into = total if last else None
            h = pointwise_norm(h, self.pointwise[repeat], norm, factor, not last, self.num_edges, into)
            stride = 1
        return h


class Convs(EdgeOps):
    """ReLU, convolution, BatchNorm (NAS-Bench-201)."""

    def __init__(self, num_edges: int, channels: int, size: int) -> None:
        super().__init__()
        self.channels, self.padding = channels, size // 2
        self.weight = kernel(num_edges * channels, channels, size)
        self.norm = Norm(num_edges * channels)

    def forward(self, state: State, scale: Tensor) -> Tensor:
        h = F.conv2d(state.rectified, self.weight, padding=self.padding)
        return self.norm.scaled(h, scale.repeat_interleave(self.channels))


class Reduces(EdgeOps):
    """`FactorizedReduce`, the skip of stride 2.

    Its two strided 1x1 convolutions are one of 2x2, each half of whose outputs reads one corner.
    """

    def __init__(self, num_edges: int, channels: int) -> None:
        super().__init__()
        self.num_edges, self.channels = num_edges, channels
        self.first = kernel(num_edges * channels // 2, channels, 1)
        self.second = kernel(num_edges * channels // 2, channels, 1)
        self.norm = Norm(num_edges * channels)

    def forward(self, state: State, scale: Tensor) -> Tensor:
        corners = [F.pad(self.first, (0, 1, 0, 1)), F.pad(self.second, (1, 0, 1, 0))]
        by_edge = [corner.unflatten(0, (self.num_edges, self.channels // 2)) for corner in corners]
        h = F.conv2d(state.rectified, torch.cat(by_edge, 1).flatten(0, 1), stride=2)
        return self.norm.scaled(h, scale.repeat_interleave(self.channels))


class Noises(EdgeOps):
    """N(0, 1), fresh each call and edge, in evaluation too; independent of the input (RobustDARTS, S4)."""

    def __init__(self, num_edges: int, stride: int) -> None:
        super().__init__()
        self.num_edges, self.stride = num_edges, stride

    def draw(self, x: Tensor) -> Tensor:
        """(B, n C, H, W) noise for the strided input x (B, C, H, W)."""
        return torch.randn_like(torch.cat([x] * self.num_edges, 1))

    def forward(self, state: State, scale: Tensor) -> Tensor:
        x = state.x[:, :, :: self.stride, :: self.stride]
        return self.draw(x.detach()) * scale.repeat_interleave(x.shape[1])[:, None, None]


class SharedOp(nn.Module, ABC):
    """An operation without weights: its result is the same on all edges that leave a state."""

    @abstractmethod
    def forward(self, state: State) -> Tensor:
        """(B, C, H / stride, W / stride)."""


class Skip(SharedOp):
    """The state itself."""

    def forward(self, state: State) -> Tensor:
        return state.x


class Pool(SharedOp):
    """Pooling, with BatchNorm except in NAS-Bench-201."""

    def __init__(self, pool: nn.Module, channels: int | None) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.Identity() if channels is None else Norm(channels)

    def forward(self, state: State) -> Tensor:
        return self.norm(self.pool(state.x))


MakeOp = Callable[[int, int, int], EdgeOps | SharedOp]
"""(number of edges, channels, stride) -> operation."""

DARTS_OPS: dict[str, MakeOp] = {
    "max_pool_3x3": lambda n, channels, stride: Pool(max_pool(stride), channels),
    "avg_pool_3x3": lambda n, channels, stride: Pool(avg_pool(stride), channels),
    "skip_connect": lambda n, channels, stride: Skip() if stride == 1 else Reduces(n, channels),
    "sep_conv_3x3": lambda n, channels, stride: SeparableConvs(n, channels, stride, 3, 1, 2),
    "sep_conv_5x5": lambda n, channels, stride: SeparableConvs(n, channels, stride, 5, 1, 2),
    "dil_conv_3x3": lambda n, channels, stride: SeparableConvs(n, channels, stride, 3, 2, 1),
    "dil_conv_5x5": lambda n, channels, stride: SeparableConvs(n, channels, stride, 5, 2, 1),
    "noise": lambda n, channels, stride: Noises(n, stride),
}
BENCH_201_OPS: dict[str, MakeOp] = {
    "skip_connect": lambda n, channels, stride: Skip(),
    "nor_conv_1x1": lambda n, channels, stride: Convs(n, channels, 1),
    "nor_conv_3x3": lambda n, channels, stride: Convs(n, channels, 3),
    "avg_pool_3x3": lambda n, channels, stride: Pool(avg_pool(stride), None),
}


class Fan(nn.Module):
    """All candidate operations on all edges that leave one state.

    Args:
        edge_ops: names of the operations of each edge, in the order of alpha's columns.
        make: the operations by name; `none` is in no table.
        channels: of the state.
        stride: of every edge.
    """

    def __init__(
        self, edge_ops: Sequence[tuple[str, ...]], make: dict[str, MakeOp], channels: int, stride: int
    ) -> None:
        super().__init__()
        self.num_edges, self.stride = len(edge_ops), stride
        names = list(dict.fromkeys(name for ops in edge_ops for name in ops if name != "none"))
        self.edges_of = {
            name: [(e, ops.index(name)) for e, ops in enumerate(edge_ops) if name in ops] for name in names
        }
        ops = {name: make[name](len(self.edges_of[name]), channels, stride) for name in names}
        self.own = nn.ModuleDict({name: op for name, op in ops.items() if isinstance(op, EdgeOps)})
        self.shared = nn.ModuleDict({name: op for name, op in ops.items() if isinstance(op, SharedOp)})

    def forward(self, x: Tensor, weights: Tensor, sparse: bool = False) -> list[Tensor]:
        """The mixed operation of each edge, a list of (B, C, H / stride, W / stride).

        Args:
            x: (B, C, H, W) state.
            weights: (n, K).
            sparse: leave out operations whose weights are all 0.
        """
        state, terms = State(x), [list[Tensor]() for _ in range(self.num_edges)]
        unused = self._unused(weights) if sparse else set()
        joint: dict[tuple[int, ...], Tensor] = {}  # sums of operations that are on the same edges
        own: Any = self.own
        for name, op in own.items():
            if name in unused:
                continue
            edges = tuple(e for e, _ in self.edges_of[name])
            joint[edges] = op.added(state, self._pick(weights, name), joint.get(edges))
        shared = {name: op for name, op in self.shared.items() if name not in unused}
        if shared:
            edges = tuple(sorted({e for name in shared for e, _ in self.edges_of[name]}))
            columns = [self._column(weights, name, edges) for name in shared]
            results = [op(state) for op in shared.values()]
            mixed = mixtures(torch.stack(columns, 1), results, joint.pop(edges, None))
            for e, part in zip(edges, mixed, strict=True):
                terms[e].append(part)
        for edges, h in joint.items():
            for e, part in zip(edges, h.chunk(len(edges), 1), strict=True):
                terms[e].append(part)
        nothing = [x[:, :, :: self.stride, :: self.stride].detach() * 0] if sparse else []
        return [total(parts or nothing) for parts in terms]

    def _unused(self, weights: Tensor) -> set[str]:
        """Operations whose weights are 0 on all edges."""
        counted = weights.detach().ne(0).cpu()
        return {name for name, edges in self.edges_of.items() if not any(counted[e, k] for e, k in edges)}

    def _pick(self, weights: Tensor, name: str) -> Tensor:
        """The weights (n,) of an operation on the edges that have it."""
        columns = {k for _, k in self.edges_of[name]}
        if len(columns) == 1 and len(self.edges_of[name]) == self.num_edges:
            return weights[:, columns.pop()]
        return torch.stack([weights[e, k] for e, k in self.edges_of[name]])

    def _column(self, weights: Tensor, name: str, edges: Sequence[int]) -> Tensor:
        """The weights of an operation on the given edges, 0 where an edge does not have it."""
        if len(self.edges_of[name]) == len(edges):
            return self._pick(weights, name)
        column_of = dict(self.edges_of[name])
        zero = weights.new_zeros(())
        return torch.stack([weights[e, column_of[e]] if e in column_of else zero for e in edges])


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, without a tensor for every addition."""
    if len(terms) == 1:
        return terms[0]
    result = terms[0] + terms[1]
    for term in terms[2:]:
        result.add_(term)
    return result

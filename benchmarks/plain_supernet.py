"""The DARTS supernet written plainly: what the speed of ours is divided by.

One module for each of the eight operations on each of the 14 edges of each cell, `none` computed as a product
with zero, every ReLU, pooling and BatchNorm where it stands in the paper's graph, the mixed operation a
Python sum of weighted outputs, all gradients from `loss.backward()`. Nothing is shared, nothing slowed down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

OPS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


def norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm without affine parameters."""
    return nn.BatchNorm2d(channels, affine=False)


class Zero(nn.Module):
    """The (strided) input times zero."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class Pool(nn.Module):
    """3x3 pooling and BatchNorm."""

    def __init__(self, pool: nn.Module, channels: int) -> None:
        super().__init__()
        self.pool, self.norm = pool, norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pool(x))


class Reduce(nn.Module):
    """ReLU, two strided 1x1 convolutions side by side, BatchNorm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.first = nn.Conv2d(in_channels, channels // 2, 1, stride=2, bias=False)
        self.second = nn.Conv2d(in_channels, channels // 2, 1, stride=2, bias=False)
        self.norm = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(x)
        return self.norm(torch.cat([self.first(h), self.second(h[:, :, 1:, 1:])], 1))


class Separable(nn.Module):
    """ReLU, depthwise and 1x1 convolution, BatchNorm, `repeats` times."""

    def __init__(self, channels: int, size: int, stride: int, dilation: int, repeats: int) -> None:
        super().__init__()
        padding = dilation * (size // 2)
        strides = [stride, 1][:repeats]
        self.relu = nn.ReLU()
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, size, s, padding, dilation, groups=channels, bias=False)
            for s in strides
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in strides)
        self.norms = nn.ModuleList(norm(channels) for _ in strides)

    def forward(self, x: Tensor) -> Tensor:
        for depthwise, pointwise, last in zip(self.depthwise, self.pointwise, self.norms, strict=True):
            x = last(pointwise(depthwise(self.relu(x))))
        return x


def operation(name: str, channels: int, stride: int) -> nn.Module:
    """One of the eight."""
    size = 5 if name.endswith("5x5") else 3
    if name == "none":
        return Zero(stride)
    if name == "max_pool_3x3":
        return Pool(nn.MaxPool2d(3, stride, 1), channels)
    if name == "avg_pool_3x3":
        return Pool(nn.AvgPool2d(3, stride, 1, count_include_pad=False), channels)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else Reduce(channels, channels)
    if name.startswith("sep"):
        return Separable(channels, size, stride, dilation=1, repeats=2)
    return Separable(channels, size, stride, dilation=2, repeats=1)


class ReLUConvNorm(nn.Sequential):
    """ReLU, 1x1 convolution, BatchNorm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(in_channels, channels, 1, bias=False), norm(channels))


class Cell(nn.Module):
    """Two outputs of cells to a third, through all operations on all edges."""

    def __init__(
        self, before: int, last: int, channels: int, num_nodes: int, reduction: bool, halves: bool
    ) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        self.preprocess = nn.ModuleDict(
            {
                "before": Reduce(before, channels) if halves else ReLUConvNorm(before, channels),
                "last": ReLUConvNorm(last, channels),
            }
        )
        sources = [j for i in range(num_nodes) for j in range(2 + i)]
        self.edge = nn.ModuleList(
            nn.ModuleDict({name: operation(name, channels, 2 if reduction and j < 2 else 1) for name in OPS})
            for j in sources
        )

    def forward(self, before: Tensor, last: Tensor, weights: Tensor) -> Tensor:
        states = [self.preprocess["before"](before), self.preprocess["last"](last)]
        e = 0
        for _ in range(self.num_nodes):
            mixed = []
            for state in states:
                ops: Sequence[nn.Module] = list(self.edge[e].values())  # type: ignore[operator]
                mixed.append(sum(w * op(state) for w, op in zip(weights[e], ops, strict=True)))
                e += 1
            states.append(sum(mixed))  # type: ignore[arg-type]
        return torch.cat(states[2:], 1)


class PlainSupernet(nn.Module):
    """Images (B, 3, H, W) to the embedding (B, M C_last)."""

    def __init__(self, num_cells: int = 8, channels: int = 16, num_nodes: int = 4) -> None:
        super().__init__()
        self.reductions = (num_cells // 3, 2 * num_cells // 3)
        width = 3 * channels
        stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        cells, before, last, halves = [], width, width, False
        for k in range(num_cells):
            reduction = k in self.reductions
            channels *= 2 if reduction else 1
            cells.append(Cell(before, last, channels, num_nodes, reduction, halves))
            before, last, halves = last, num_nodes * channels, reduction
        self.skeleton = nn.ModuleDict({"stem": nn.ModuleList([stem]), "cells": nn.ModuleList(cells)})
        edges = sum(2 + i for i in range(num_nodes))
        self.arch = nn.ParameterDict(
            {
                f"alpha_{kind}": nn.Parameter(1e-3 * torch.randn(edges, len(OPS)))
                for kind in ("normal", "reduce")
            }
        )

    def forward(self, image: Tensor) -> Tensor:
        before = last = self.skeleton["stem"][0](image)  # type: ignore[index]
        for k, cell in enumerate(self.skeleton["cells"]):  # type: ignore[arg-type]
            alpha = self.arch["alpha_reduce" if k in self.reductions else "alpha_normal"]
            before, last = last, cell(before, last, torch.softmax(alpha, -1))
        return last.mean((2, 3))

    def by_edge(self) -> dict[str, Tensor]:
        """Parameters and running statistics by the names of `tensors_by_edge`."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {
            (name.removesuffix(".weight") if ".edge." in name else name): tensor
            for name, tensor in tensors.items()
            if not name.endswith("num_batches_tracked")
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over values by name. Raises KeyError where one is missing."""
        for name, tensor in self.by_edge().items():
            tensor.copy_(tensors[name])

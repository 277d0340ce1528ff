"""The fusion hypernet of BM-NAS written plainly: what the speed of ours is divided by.

The equations of the released code: one module call for each edge, every candidate op computed (`none` on an
edge included), Conv1d, BatchNorm1d and LayerNorm on (B, C, L), all gradients from `loss.backward()`. Nothing
is shared and nothing is slowed down. Letters as everywhere: B batch, C channels, L length, E edges into
cells, I edges inside a cell, N cells, M step nodes, K ops.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Skip(nn.Module):
    """The source itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    """Nothing, computed as the released code does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.0


class MixedEdge(nn.Module):
    """One edge: both edge ops, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.ModuleList([Zero(), Skip()])

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """`weights` (2,) of (none, skip)."""
        return _total(weight * op(x) for weight, op in zip(weights, self.ops, strict=True))


class WeightedEdge(nn.Module):
    """One edge of a mixture that is normalised over its sources."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * x


class Reshape(nn.Module):
    """(B, C_i, L_i) with L_i in {1, L} -> (B, C, L)."""

    def __init__(self, in_channels: int, channels: int, length: int, dropout: float) -> None:
        super().__init__()
        self.length = length
        self.conv = nn.Conv1d(in_channels, channels, 1)
        self.norm = nn.BatchNorm1d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, feature: Tensor) -> Tensor:
        if feature.shape[2] != self.length:
            feature = feature.expand(-1, -1, self.length)
        return self.dropout(F.relu(self.norm(self.conv(feature))))


class Sum(nn.Module):
    """x + y."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Attention(nn.Module):
    """Queries from x, keys and values from y, over positions; then dropout and LayerNorm over (C, L)."""

    def __init__(self, channels: int, length: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm([channels, length])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        query, key = x.transpose(1, 2), y.transpose(1, 2)  # (B, L, C)
        scores = query @ key.transpose(1, 2) / math.sqrt(x.shape[1])  # (B, L, L)
        out = (scores.softmax(dim=-1) @ key).transpose(1, 2)
        return self.norm(self.dropout(out))


class LinearGLU(nn.Module):
    """A 2C -> 2C projection of [x; y], its first half gated by its second."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2 * channels, 2 * channels, 1)
        self.norm = nn.BatchNorm1d(2 * channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.dropout(F.glu(self.norm(self.conv(torch.cat([x, y], dim=1))), dim=1))


class ConcatFC(nn.Module):
    """Concatenation on channels brought back to `channels`; reads [x; y], or the inner states of a cell."""

    def __init__(self, in_channels: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, channels, 1)
        self.norm = nn.BatchNorm1d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.dropout(F.relu(self.norm(self.conv(torch.cat(inputs, dim=1)))))


class MixedStep(nn.Module):
    """One step node: all K ops on the same two operands, weighted."""

    def __init__(self, channels: int, length: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.ops = nn.ModuleDict(
            {
                "sum": Sum(),
                "attention": Attention(channels, length, attention_dropout),
                "linear_glu": LinearGLU(channels, dropout),
                "concat_fc": ConcatFC(2 * channels, channels, dropout),
            }
        )

    def forward(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """`weights` (K,)."""
        return _total(weight * op(x, y) for weight, op in zip(weights, self.ops.values(), strict=True))


class Cell(nn.Module):
    """M step nodes, the output projection where more than one state leaves, residual and LayerNorm."""

    def __init__(
        self,
        channels: int,
        length: int,
        num_steps: int,
        node_multiplier: int,
        shared: bool,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.shared = shared
        self.node_multiplier = node_multiplier
        self.steps = nn.ModuleList(
            [MixedStep(channels, length, dropout, attention_dropout) for _ in range(num_steps)]
        )
        self.edges = _edges(sum(2 + m for m in range(num_steps)), shared)
        self.out = ConcatFC(node_multiplier * channels, channels, dropout) if node_multiplier > 1 else None
        self.norm = nn.LayerNorm([channels, length])

    def forward(self, x: Tensor, y: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
        """`beta` are logits, (I, 2) if shared and else (2, I); `gamma` (M, K) likewise."""
        states = [x, y]
        step_weights = gamma.softmax(dim=-1)
        start = 0
        for step, weights in zip(self.steps, step_weights, strict=True):
            first, second = _operands(states, self.edges, beta, start, self.shared)
            start += len(states)
            states.append(step(first, second, weights))
        out = states[-1] if self.out is None else self.out(*states[-self.node_multiplier :])
        return self.norm(out + x)


class PlainHypernet(nn.Module):
    """Named features to the embedding of all candidate architectures at once.

    Attributes:
        alpha: (E, 2) logits of (none, skip) if shared, else (2, E), each cell's candidates side by side.
        beta: (N, I, 2) if shared, else (N, 2, I).
        gamma: (N, M, K).
    """

    def __init__(
        self,
        infos: Mapping[str, tuple[int, int]],
        channels: int = 192,
        length: int = 16,
        num_cells: int = 2,
        num_steps: int = 1,
        dropout: float = 0.1,
        pairing: Literal["shared", "distinct"] = "shared",
        node_multiplier: int = 1,
        multiplier: int = 2,
        attention_dropout: float = 0.1,
    ) -> None:
        """Modules with torch's default initialisation, and logits of standard deviation 1e-3.

        Args:
            infos: (C_i, L_i) of each feature by name, L_i in {1, L}; their order is that of the edges.
            channels: C.
            length: L.
            num_cells: N.
            num_steps: M.
            dropout: probability after each projection.
            pairing: `shared`, one tensor is both inputs of a cell; `distinct`, two mixtures.
            node_multiplier: how many of the last inner states leave a cell.
            multiplier: how many of the last cells make the embedding.
            attention_dropout: probability after attention; the released code fixes it.
        """
        super().__init__()
        if pairing not in ("shared", "distinct"):
            raise ValueError(f"PlainHypernet needs pairing 'shared' or 'distinct', got {pairing!r}")
        for name, (_, positions) in infos.items():
            if positions not in (1, length):
                raise ValueError(f"PlainHypernet needs 1 or {length} positions of '{name}', got {positions}")
        self.names = list(infos)
        self.shared = pairing == "shared"
        self.multiplier = multiplier
        self.reshapes = nn.ModuleList(
            [Reshape(in_channels, channels, length, dropout) for in_channels, _ in infos.values()]
        )
        self.cells = nn.ModuleList(
            [
                Cell(channels, length, num_steps, node_multiplier, self.shared, dropout, attention_dropout)
                for _ in range(num_cells)
            ]
        )
        self.norm = nn.LayerNorm([multiplier * channels, length])

        num_edges = sum(len(infos) + i for i in range(num_cells))
        num_inner_edges = sum(2 + m for m in range(num_steps))
        self.edges = _edges(num_edges, self.shared)
        alpha_shape = (num_edges, 2) if self.shared else (2, num_edges)
        beta_shape = (num_inner_edges, 2) if self.shared else (2, num_inner_edges)
        self.alpha = nn.Parameter(1e-3 * torch.randn(alpha_shape))
        self.beta = nn.Parameter(1e-3 * torch.randn(num_cells, *beta_shape))
        self.gamma = nn.Parameter(1e-3 * torch.randn(num_cells, num_steps, 4))

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features (B, C_i, L_i) by name -> (B, m_out * C * L), channel-major."""
        sources = [reshape(features[name]) for name, reshape in zip(self.names, self.reshapes, strict=True)]
        cells: list[Tensor] = []
        start = 0
        for i, cell in enumerate(self.cells):
            candidates = sources + cells
            x, y = _operands(candidates, self.edges, self.alpha, start, self.shared)
            start += len(candidates)
            cells.append(cell(x, y, self.beta[i], self.gamma[i]))
        joined = torch.cat(cells[-self.multiplier :], dim=1)
        return F.relu(self.norm(joined)).flatten(1)

    def named(self) -> dict[str, nn.Parameter]:
        """Every parameter under the name that `tests/reference/fusion.py` gives it.

        Kernels keep Conv1d's trailing dimension of 1.
        """
        found: dict[str, nn.Parameter] = {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma}

        def add(prefix: str, conv: nn.Conv1d, norm: nn.BatchNorm1d) -> None:
            found[f"{prefix}.weight"], found[f"{prefix}.bias"] = conv.weight, conv.bias
            found[f"{prefix}.bn_weight"], found[f"{prefix}.bn_bias"] = norm.weight, norm.bias

        for name, reshape in zip(self.names, self.reshapes, strict=True):
            add(f"reshape.{name}", reshape.conv, reshape.norm)
        for i, cell in enumerate(self.cells):
            for m, step in enumerate(cell.steps):
                for op in ("linear_glu", "concat_fc"):
                    add(f"cell.{i}.step.{m}.{op}", step.ops[op].conv, step.ops[op].norm)
                norm = step.ops["attention"].norm
                found[f"cell.{i}.step.{m}.attention.ln_weight"] = norm.weight
                found[f"cell.{i}.step.{m}.attention.ln_bias"] = norm.bias
            if cell.out is not None:
                add(f"cell.{i}.out", cell.out.conv, cell.out.norm)
            found[f"cell.{i}.ln_weight"], found[f"cell.{i}.ln_bias"] = cell.norm.weight, cell.norm.bias
        found["head.ln_weight"], found["head.ln_bias"] = self.norm.weight, self.norm.bias
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the values of tensors named as in `named`, with or without the trailing 1 of kernels."""
        with torch.no_grad():
            for name, parameter in self.named().items():
                parameter.copy_(tensors[name].reshape(parameter.shape))


def _total(terms: Iterable[Tensor]) -> Tensor:
    """Their sum; the builtin would start with 0 and add one kernel."""
    return reduce(torch.add, terms)


def _edges(count: int, shared: bool) -> nn.ModuleList:
    """One module for each edge; with two mixtures each edge is there twice, for x first."""
    if shared:
        return nn.ModuleList([MixedEdge() for _ in range(count)])
    return nn.ModuleList([WeightedEdge() for _ in range(2 * count)])


def _operands(
    sources: list[Tensor], edges: nn.ModuleList, logits: Tensor, start: int, shared: bool
) -> tuple[Tensor, Tensor]:
    """Both inputs of a cell or step node, edge by edge, from the edges `start` onwards."""
    stop = start + len(sources)
    if shared:
        weights = logits[start:stop].softmax(dim=-1)  # (sources, 2)
        mixed = _total(
            edge(source, weight)
            for edge, source, weight in zip(edges[start:stop], sources, weights, strict=True)
        )
        return mixed, mixed
    weights = logits[:, start:stop].softmax(dim=-1)  # (2, sources)
    half = len(edges) // 2
    x, y = (
        _total(
            edge(source, weight)
            for edge, source, weight in zip(
                edges[side * half + start : side * half + stop], sources, weights[side], strict=True
            )
        )
        for side in (0, 1)
    )
    return x, y

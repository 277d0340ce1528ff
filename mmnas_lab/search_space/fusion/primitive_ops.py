"""The operations that a step node of a fusion cell can apply to its two inputs.

Sources: BM-NAS (arXiv 2104.09379) eq. 4-8 for `paper`, the behaviour of its released implementation for
`released_code`. Everything here works on (B, L, C), so that a 1x1 convolution is a plain matrix product.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Protocol = Literal["paper", "released_code"]


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over samples and positions of (B, L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)

    def scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        """The result times `scale` (C,), which goes into the affine and so costs nothing."""
        weight, bias = self.weight * scale, self.bias * scale
        if self.training:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        rows = x.flatten(0, -2)
        momentum = self.momentum or 0.0
        out = F.batch_norm(
            rows, self.running_mean, self.running_var, weight, bias, self.training, momentum, self.eps
        )
        return out.view(x.shape)


class Dropout(nn.Dropout):
    """Dropout that costs nothing at p = 0, and on a CPU a fifth of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        if x.device.type != "cpu" or not 2**-16 <= self.p < 1 - 2**-16:
            return super().forward(x)
        return x * keep_mask(x, self.p)


def keep_mask(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p), in x's shape.

    One 64-bit draw decides four entries, so p is rounded to a multiple of 2^-16; the scale is that of the
    rounded p. Integers are clamped to two neighbours, because torch compares them slowly.
    """
    dropped = round(p * 2**16)
    low = dropped - 2**15 - 1  # the largest 16-bit number that drops
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].clamp_(low, low + 1).sub_(low)
    return kept.to(x.dtype).mul_(2**16 / (2**16 - dropped)).view(x.shape)


class StepOp(nn.Module, ABC):
    """Two (B, L, C) tensors to one."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def weighted(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The result times a () weight."""
        return weight * self(x, y)


class LinearOp(StepOp):
    """An operation that begins with one linear map of both inputs, perhaps normalised; `activate` follows."""

    norm: nn.Module

    @abstractmethod
    def joint_weight(self) -> Tensor:
        """(out, 2C): the first C columns read x, the last C read y."""

    @abstractmethod
    def joint_bias(self) -> Tensor | None:
        """(out,), or none."""

    @abstractmethod
    def scale(self, weight: Tensor) -> Tensor:
        """(out,) factors before `activate` that multiply the result by a () weight >= 0."""

    @abstractmethod
    def activate(self, product: Tensor) -> Tensor:
        """The normalised (B, L, out) to (B, L, C)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        product = F.linear(torch.cat([x, y], -1), self.joint_weight(), self.joint_bias())
        return self.activate(self.norm(product))

    def of_joined(self, joined: Tensor, weight: Tensor) -> Tensor:
        """The result times a () weight, on [x; y] of (B, L, 2C), or on z of (B, L, C) where x = y = z.

        W_x z + W_y z = (W_x + W_y) z halves the product. The weight goes into the affine, or into W.
        """
        matrix, bias, scale = self.joint_weight(), self.joint_bias(), self.scale(weight)
        if joined.shape[-1] < matrix.shape[1]:
            left, right = matrix.chunk(2, 1)
            matrix = left + right
        if isinstance(self.norm, BatchNorm):
            return self.activate(self.norm.scaled(F.linear(joined, matrix, bias), scale))
        bias = None if bias is None else bias * scale
        return self.activate(F.linear(joined, matrix * scale[:, None], bias))


class Zero(StepOp):
    """Nothing (eq. 4); only the paper has it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Sum(StepOp):
    """x + y (eq. 5)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * x if x is y else x + y

    def weighted(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return (2 * weight) * x if x is y else weight * (x + y)


class Attention(StepOp):
    """softmax(x y^T / sqrt(C)) y: x asks, y is key and value (eq. 6), no projections, one head.

    The released code adds dropout on the output and a LayerNorm over positions and channels.
    """

    def __init__(self, channels: int, length: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.root = math.sqrt(channels)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm((length, channels)) if norm else nn.Identity()

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, L, L) weights of the positions of y."""
        return torch.softmax(torch.bmm(x, y.transpose(1, 2)) / self.root, -1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(self.dropout(torch.bmm(self.attend(x, y), y)))

    def weighted(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, nn.LayerNorm):  # the weight goes into the affine
            attended = self.dropout(torch.bmm(self.attend(x, y), y))
            return F.layer_norm(
                attended, norm.normalized_shape, weight * norm.weight, weight * norm.bias, norm.eps
            )
        return self.dropout(torch.bmm(weight * self.attend(x, y), y))


class LinearGLU(LinearOp):
    """Gated linear unit on [x; y] with BatchNorm before the gate, as released (4 C^2 weights)."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, 2 * channels)
        self.norm = BatchNorm(2 * channels)
        self.dropout = Dropout(dropout)

    def joint_weight(self) -> Tensor:
        return self.linear.weight

    def joint_bias(self) -> Tensor:
        return self.linear.bias

    def scale(self, weight: Tensor) -> Tensor:
        return value_scale(weight, self.linear.out_features // 2)

    def activate(self, product: Tensor) -> Tensor:
        return self.dropout(F.glu(product, -1))


class PaperLinearGLU(LinearOp):
    """x W1 * sigmoid(y W2) (eq. 7; 2 C^2 weights)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.value = nn.Linear(channels, channels, bias=False)
        self.gate = nn.Linear(channels, channels, bias=False)
        self.norm = nn.Identity()

    def joint_weight(self) -> Tensor:
        return torch.block_diag(self.value.weight, self.gate.weight)

    def joint_bias(self) -> None:
        return None

    def scale(self, weight: Tensor) -> Tensor:
        return value_scale(weight, self.value.out_features)

    def activate(self, product: Tensor) -> Tensor:
        return F.glu(product, -1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(y))


def value_scale(weight: Tensor, channels: int) -> Tensor:
    """(2C,) the weight for the values of a gated linear unit, 1 for its gates."""
    return torch.cat([weight.expand(channels), weight.new_ones(channels)])


class ConcatFC(LinearOp):
    """ReLU([x; y] W + b) (eq. 8); the released code adds BatchNorm before and dropout after the ReLU."""

    def __init__(self, channels: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, channels)
        self.norm = BatchNorm(channels) if norm else nn.Identity()
        self.dropout = Dropout(dropout)

    def joint_weight(self) -> Tensor:
        return self.linear.weight

    def joint_bias(self) -> Tensor:
        return self.linear.bias

    def scale(self, weight: Tensor) -> Tensor:
        return weight.expand(self.linear.out_features)

    def activate(self, product: Tensor) -> Tensor:
        return self.dropout(torch.relu_(product))


def step_ops(
    protocol: Protocol, channels: int, length: int, dropout: float, attention_dropout: float
) -> dict[str, Callable[[], StepOp]]:
    """Makers of the candidate operations by name, in the order of gamma's columns."""
    if protocol == "paper":
        return {
            "zero": Zero,
            "sum": Sum,
            "attention": lambda: Attention(channels, length, 0.0, norm=False),
            "linear_glu": lambda: PaperLinearGLU(channels),
            "concat_fc": lambda: ConcatFC(channels, 0.0, norm=False),
        }
    return {
        "sum": Sum,
        "attention": lambda: Attention(channels, length, attention_dropout, norm=True),
        "linear_glu": lambda: LinearGLU(channels, dropout),
        "concat_fc": lambda: ConcatFC(channels, dropout, norm=True),
    }


def op_names(protocol: Protocol) -> tuple[str, ...]:
    """Names of the candidate operations in the order of gamma's columns."""
    return tuple(step_ops(protocol, 1, 1, 0.0, 0.0))

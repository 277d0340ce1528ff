"""The operations that a step node of a fusion cell can apply to its two inputs.

Sources: BM-NAS (arXiv 2104.09379) eq. 4-8 for `paper`, the behaviour of its released implementation for
`released_code`. Everything here works on (B, L, C), so that a 1x1 convolution is a plain matrix product.
"""

from __future__ import annotations

import math
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


class Dropout(nn.Dropout):
    """Dropout that costs nothing at p = 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.p > 0 and self.training else x


class StepOp(nn.Module):
    """Two (B, L, C) tensors to one."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


class LinearOp(StepOp):
    """An operation that begins with one linear map of both inputs.

    The hypernet computes the maps of all such operations of a step in one product, and needs them as
    `joint_weight` and `joint_bias`; `activate` is what follows.
    """

    def joint_weight(self) -> Tensor:
        """(out, 2C): the first C columns read x, the last C read y."""
        raise NotImplementedError

    def joint_bias(self) -> Tensor:
        """(out,)."""
        raise NotImplementedError

    def activate(self, product: Tensor) -> Tensor:
        """(B, L, out) -> (B, L, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        product = F.linear(torch.cat([x, y], -1), self.joint_weight(), self.joint_bias())
        return self.activate(product)


class Zero(StepOp):
    """Nothing (eq. 4); only the paper has it."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Sum(StepOp):
    """x + y (eq. 5)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * x if x is y else x + y


class Attention(StepOp):
    """softmax(x y^T / sqrt(C)) y: x asks, y is key and value (eq. 6), no projections, one head.

    The released code adds dropout on the output and a LayerNorm over positions and channels.
    """

    def __init__(self, channels: int, length: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(channels)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm((length, channels)) if norm else nn.Identity()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weights = torch.softmax(torch.bmm(x, y.transpose(1, 2)) * self.scale, -1)  # (B, L, L)
        return self.norm(self.dropout(torch.bmm(weights, y)))


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

    def activate(self, product: Tensor) -> Tensor:
        return self.dropout(F.glu(self.norm(product), -1))


class PaperLinearGLU(LinearOp):
    """x W1 * sigmoid(y W2) (eq. 7; 2 C^2 weights)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.value = nn.Linear(channels, channels, bias=False)
        self.gate = nn.Linear(channels, channels, bias=False)

    def joint_weight(self) -> Tensor:
        return torch.block_diag(self.value.weight, self.gate.weight)

    def joint_bias(self) -> Tensor:
        return self.value.weight.new_zeros(2 * self.value.out_features)

    def activate(self, product: Tensor) -> Tensor:
        return F.glu(product, -1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(y))


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

    def activate(self, product: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.norm(product)))


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

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

from mmnas_lab.search_space.fusion.fused import Activation, Projection, drop, project, scores

Protocol = Literal["paper", "released_code"]


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over samples and positions of (B, L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)


class Dropout(nn.Dropout):
    """Dropout that costs nothing at p = 0, and little on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p, self.training)


class StepOp(nn.Module, ABC):
    """Two (B, L, C) tensors to one."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The result."""

    def weighted(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The result times a () weight."""
        return weight * self(x, y)


class LinearOp(StepOp):
    """One linear map of both inputs, in the released form BatchNorm, an activation, and dropout."""

    activation: Activation
    norm: BatchNorm | None
    p: float  # of dropout

    @abstractmethod
    def joint_weight(self) -> Tensor:
        """(out, 2C): the first C columns read x, the last C read y."""

    @abstractmethod
    def joint_bias(self) -> Tensor | None:
        """(out,), or none."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self._mapped(torch.cat([x, y], -1), self.joint_weight(), self.joint_bias(), None)

    def of_joined(self, joined: Tensor, weight: Tensor) -> Tensor:
        """The result times a () weight >= 0, on [x; y] of (B, L, 2C), or on z of (B, L, C) where x = y = z.

        W_x z + W_y z = (W_x + W_y) z halves the product. The weight goes into the affine, or into W.
        """
        matrix, bias = self.joint_weight(), self.joint_bias()
        if joined.shape[-1] < matrix.shape[1]:
            left, right = matrix.chunk(2, 1)
            matrix = left + right
        return self._mapped(joined, matrix, bias, self._scale(weight, len(matrix)))

    def _mapped(self, x: Tensor, matrix: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        """(B, L, in) to (B, L, C); `scale` (out,) multiplies the map behind the norm."""
        if self.norm is not None and bias is not None:
            projection = Projection(matrix, bias, self.norm)
            return project([x], [projection], x.shape[1], self.activation, self.p, scale).squeeze(0)
        if scale is not None:
            matrix, bias = matrix * scale[:, None], None if bias is None else bias * scale
        product = F.linear(x, matrix, bias)
        return torch.relu(product) if self.activation == "relu" else F.glu(product, -1)

    def _scale(self, weight: Tensor, channels: int) -> Tensor:
        """(out,) factors before the activation that multiply the result: a gate keeps its own."""
        if self.activation == "relu":
            return weight.expand(channels)
        return torch.cat([weight.expand(channels // 2), weight.new_ones(channels // 2)])


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
        self.root = math.sqrt(channels)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm((length, channels)) if norm else nn.Identity()

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, L, L) weights of the positions of y."""
        return torch.softmax(scores(x, y) / self.root, -1)

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

    activation: Activation = "glu"

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, 2 * channels)
        self.norm = BatchNorm(2 * channels)
        self.p = dropout

    def joint_weight(self) -> Tensor:
        return self.linear.weight

    def joint_bias(self) -> Tensor:
        return self.linear.bias


class PaperLinearGLU(LinearOp):
    """x W1 * sigmoid(y W2) (eq. 7; 2 C^2 weights)."""

    activation: Activation = "glu"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.value = nn.Linear(channels, channels, bias=False)
        self.gate = nn.Linear(channels, channels, bias=False)
        self.norm = None

    def joint_weight(self) -> Tensor:
        return torch.block_diag(self.value.weight, self.gate.weight)

    def joint_bias(self) -> None:
        return None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.value(x) * torch.sigmoid(self.gate(y))


class ConcatFC(LinearOp):
    """ReLU([x; y] W + b) (eq. 8); the released code adds BatchNorm before and dropout after the ReLU."""

    activation: Activation = "relu"

    def __init__(self, channels: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * channels, channels)
        self.norm = BatchNorm(channels) if norm else None
        self.p = dropout

    def joint_weight(self) -> Tensor:
        return self.linear.weight

    def joint_bias(self) -> Tensor:
        return self.linear.bias


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

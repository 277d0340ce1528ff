"""Parts that the hypernet and the found network share: reshape layers, the mixed step, cell end, head.

Section numbers of BM-NAS's supplement are not needed to read this: a feature (B, C_i, L_i) is brought to
(B, L, C), a cell turns two such tensors into one, the head flattens the last cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmnas_lab.search_space.fusion.fused import Projection, project, relu_transposed, weighted_sum
from mmnas_lab.search_space.fusion.primitive_ops import BatchNorm, LinearOp, StepOp, Sum, Zero
from mmnas_lab.types import InputError, InputInfo


class Reshape(nn.Module):
    """A pooled feature (B, C_i, L_i) to (B, L, C): 1x1 convolution, BatchNorm, ReLU, dropout.

    A vector (L_i = 1) becomes L equal columns before BatchNorm; its product is computed once.
    """

    def __init__(self, name: str, info: InputInfo, channels: int, length: int, dropout: float) -> None:
        super().__init__()
        feature_channels, feature_length = info.shape
        if feature_length not in (1, length):
            raise InputError(
                f"feature '{name}' has {feature_length} positions, the fusion space needs 1 or {length}; "
                f"compute the features with search_space.length={feature_length} or change the pooling"
            )
        self.length = length
        self.linear = nn.Linear(feature_channels, channels)
        self.norm = BatchNorm(channels)
        self.p = dropout

    def forward(self, feature: Tensor) -> Tensor:
        return reshape_all([self], [feature]).squeeze(0)


def reshape_all(layers: Sequence[Reshape], features: Sequence[Tensor]) -> Tensor:
    """Features (B, C_i, L_i) through a layer each, stacked: (n, B, L, C)."""
    inputs = [feature.transpose(1, 2).contiguous() for feature in features]
    projections = [Projection(layer.linear.weight, layer.linear.bias, layer.norm) for layer in layers]
    return project(inputs, projections, layers[0].length, "relu", layers[0].p)


class MixedStep(nn.Module):
    """All candidate operations of one step node, averaged by gamma (BM-NAS eq. 10).

    gamma is folded into affine parameters where an operation has them: g relu(z) = relu(g z), and a gated
    unit is linear in its values.
    """

    def __init__(self, ops: dict[str, StepOp]) -> None:
        super().__init__()
        self.ops = nn.ModuleDict(ops)

    def forward(self, first: Tensor, second: Tensor, gamma: Tensor) -> Tensor:
        """Mix the operations on (B, L, C) operands with weights gamma (K,)."""
        joined = first if first is second else torch.cat([first, second], -1)
        ops: Any = self.ops.values()
        terms, weights = [], []
        for weight, op in zip(gamma.unbind(), ops, strict=True):
            if isinstance(op, Sum):
                weights = [2 * weight] if first is second else [weight, weight]
            elif isinstance(op, LinearOp):
                terms.append(op.of_joined(joined, weight))
            elif not isinstance(op, Zero):
                terms.append(op.weighted(first, second, weight))
        return weighted_sum(torch.stack(weights), [first, second][: len(weights)], terms)


class OutConv(nn.Module):
    """The last inner states, concatenated, back to C channels: 1x1 convolution, BatchNorm, ReLU, dropout."""

    def __init__(self, num_states: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.num_states = num_states
        self.linear = nn.Linear(num_states * channels, channels)
        self.norm = BatchNorm(channels)
        self.p = dropout

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(list(states[-self.num_states :]), -1)
        projection = Projection(self.linear.weight, self.linear.bias, self.norm)
        return project([joined], [projection], joined.shape[1], "relu", self.p).squeeze(0)


class LastState(nn.Module):
    """The last step's output."""

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        return states[-1]


class ReleasedCellEnd(nn.Module):
    """LayerNorm over positions and channels of (output + x), as released."""

    def __init__(self, cell_outputs: int, channels: int, length: int, dropout: float) -> None:
        super().__init__()
        self.out = LastState() if cell_outputs == 1 else OutConv(cell_outputs, channels, dropout)
        self.norm = nn.LayerNorm((length, channels))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        return self.norm(self.out(states) + states[0])


class PaperCellEnd(nn.Module):
    """The steps themselves: one as it is, several concatenated.

    How M C channels become C again is not printed; the released out convolution is used.
    """

    def __init__(self, num_steps: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.out = LastState() if num_steps == 1 else OutConv(num_steps, channels, dropout)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        return self.out(states)


class Flatten(nn.Module):
    """The last cells, concatenated on channels, as an embedding (B, H C L), channel-major.

    As released: LayerNorm over channels and positions, ReLU; the paper prints neither.
    """

    def __init__(self, num_cells: int, channels: int, length: int, norm: bool) -> None:
        super().__init__()
        self.num_cells = num_cells
        self.norm = nn.LayerNorm((length, num_cells * channels)) if norm else None

    def forward(self, cells: Sequence[Tensor]) -> Tensor:
        last = torch.cat(list(cells[-self.num_cells :]), -1)  # (B, L, H C)
        if self.norm is None:
            return last.transpose(1, 2).flatten(1)
        return relu_transposed(self.norm(last)).flatten(1)

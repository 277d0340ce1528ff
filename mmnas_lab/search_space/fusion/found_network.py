"""The network of one genotype, with fresh weights, and the fixed two-stream network beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmnas_lab.search_space.base import Network
from mmnas_lab.search_space.fusion.genotype import CellGenotype, FusionGenotype
from mmnas_lab.search_space.fusion.hypernet import masked
from mmnas_lab.types import InputInfos, Inputs, Output, OutputInfo

if TYPE_CHECKING:
    from mmnas_lab.search_space.fusion.space import FusionSpace


class FoundCell(nn.Module):
    """One cell of a genotype: (x, y) of (B, L, C) to (B, L, C)."""

    def __init__(self, space: FusionSpace, genotype: CellGenotype) -> None:
        super().__init__()
        self.operands = [step.inputs for step in genotype.steps]
        self.ops = nn.ModuleList(space.ops[step.op]() for step in genotype.steps)
        self.end = space.cell_end()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        states = [x, y]
        for (first, second), op in zip(self.operands, self.ops, strict=True):
            states.append(op(states[first], states[second]))
        return self.end(states)


class FoundNetwork(Network):
    """Reshape layers of the used features, the genotype's cells, the head's norm (BM-NAS, evaluation)."""

    def __init__(self, space: FusionSpace, genotype: FusionGenotype, inputs: InputInfos) -> None:
        super().__init__()
        self.unread = genotype.unread()
        self.names = genotype.features()
        self.modality_of = {name: inputs[name].modality for name in self.names}
        self.cell_inputs = [cell.inputs for cell in genotype.cells]
        self.reshape = nn.ModuleList(space.reshape(name, inputs[name]) for name in self.names)
        self.cells = nn.ModuleList(FoundCell(space, cell) for cell in genotype.cells)
        self.flatten = space.flatten(genotype.head_cells)
        self.info = OutputInfo(
            genotype.head_cells * space.channels * space.length,
            {f"cell.{i}": (space.channels, space.length) for i in range(len(genotype.cells))},
        )

    def forward(self, inputs: Inputs, present: dict[str, Tensor] | None = None) -> Output:
        tensors = reshaped(self.names, self.reshape, inputs, present, self.modality_of)
        cells: list[Tensor] = []
        for i, ((x, y), cell) in enumerate(zip(self.cell_inputs, self.cells, strict=True)):
            cells.append(cell(tensors[x], tensors[y]))
            tensors[f"cell.{i}"] = cells[-1]
        taps = {f"cell.{i}": cell.transpose(1, 2) for i, cell in enumerate(cells)}
        return Output(self.flatten(cells), taps)


@dataclass(frozen=True)
class TwoStream:
    """The fixed network that concatenates one feature of each modality: no cell, no choice."""

    features: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"space": "fusion", "fixed": "two_stream", "features": list(self.features)}


class TwoStreamNetwork(Network):
    """Features reshaped to (B, L, C) and concatenated, then the head's norm."""

    def __init__(self, space: FusionSpace, recipe: TwoStream, inputs: InputInfos) -> None:
        super().__init__()
        self.names = recipe.features
        self.modality_of = {name: inputs[name].modality for name in self.names}
        self.reshape = nn.ModuleList(space.reshape(name, inputs[name]) for name in self.names)
        self.flatten = space.flatten(len(self.names))
        self.info = OutputInfo(
            len(self.names) * space.channels * space.length,
            dict.fromkeys(self.names, (space.channels, space.length)),
        )

    def forward(self, inputs: Inputs, present: dict[str, Tensor] | None = None) -> Output:
        tensors = reshaped(self.names, self.reshape, inputs, present, self.modality_of)
        taps = {name: tensors[name].transpose(1, 2) for name in self.names}
        return Output(self.flatten([tensors[name] for name in self.names]), taps)


def reshaped(
    names: Sequence[str],
    layers: nn.ModuleList,
    inputs: Inputs,
    present: dict[str, Tensor] | None,
    modality_of: dict[str, str],
) -> dict[str, Tensor]:
    """The named features as (B, L, C)."""
    return {
        name: layer(masked(inputs[name], present, modality_of[name]))
        for name, layer in zip(names, layers, strict=True)
    }

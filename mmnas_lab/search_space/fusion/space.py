"""The fusion search space: its settings, its choices, and the networks that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmnas_lab.search_space.base import Choice, Hypernet, Network
from mmnas_lab.search_space.fusion.cell import Flatten, PaperCellEnd, ReleasedCellEnd, Reshape
from mmnas_lab.search_space.fusion.derivation import Pairing, PaperRule, ReleasedRule
from mmnas_lab.search_space.fusion.found_network import FoundNetwork, TwoStream, TwoStreamNetwork
from mmnas_lab.search_space.fusion.genotype import (
    CellGenotype,
    FusionGenotype,
    StepGenotype,
    parse_genotype,
)
from mmnas_lab.search_space.fusion.hypernet import DistinctHypernet, SharedHypernet
from mmnas_lab.search_space.fusion.primitive_ops import Protocol, StepOp, step_ops
from mmnas_lab.search_space.relaxation import Relaxation
from mmnas_lab.types import InputError, InputInfo, InputInfos


class FusionSpace:
    """Cells that fuse backbone features, after BM-NAS (arXiv 2104.09379).

    Args:
        num_cells: N.
        num_steps: M, step nodes a cell.
        channels: C.
        length: L, positions; a square, since maps are pooled to sqrt(L) x sqrt(L).
        dropout: of reshape layers and operations.
        cell_outputs: number of last inner states that make a cell's output (`released_code` only).
        head_cells: number of last cells that feed the head; null for all.
        attention_dropout: of the attention operation (`released_code` only).
        protocol: operations, cell end and derivation of the `paper` or of the `released_code`.
        pairing: `shared` hands one mixture to both inputs of a cell, as published; `distinct` learns two.
        relaxation: of alpha, beta and gamma. BM-NAS has `softmax`; `sigmoid` lets every edge and operation
            weigh for itself, as FairDARTS does on its cells; `gumbel` draws once a forward, in training.
        temperature: of `gumbel`; > 0.
    """

    name = "fusion"

    def __init__(
        self,
        num_cells: int = 2,
        num_steps: int = 1,
        channels: int = 192,
        length: int = 16,
        dropout: float = 0.1,
        cell_outputs: int = 1,
        head_cells: int | None = None,
        attention_dropout: float = 0.1,
        protocol: Protocol = "released_code",
        pairing: Pairing = "shared",
        relaxation: Relaxation = "softmax",
        temperature: float = 1.0,
    ) -> None:
        for name, value in (("num_cells", num_cells), ("num_steps", num_steps), ("channels", channels)):
            if value < 1:
                raise InputError(f"search_space.{name} must be at least 1, got {value}")
        if length < 1 or int(length**0.5) ** 2 != length:
            raise InputError(f"search_space.length must be a square (1, 4, 9, 16, ...), got {length}")
        if not 1 <= cell_outputs <= num_steps + 2:
            raise InputError(
                f"search_space.cell_outputs must be 1 to num_steps + 2 = {num_steps + 2}, got {cell_outputs}"
            )
        if head_cells is not None and not 1 <= head_cells <= num_cells:
            raise InputError(
                f"search_space.head_cells must be between 1 and num_cells = {num_cells}, got {head_cells}"
            )
        if temperature <= 0:
            raise InputError(f"search_space.temperature must be positive, got {temperature:g}")
        self.settings: dict[str, Any] = {
            "num_cells": num_cells,
            "num_steps": num_steps,
            "channels": channels,
            "length": length,
            "dropout": dropout,
            "cell_outputs": cell_outputs,
            "head_cells": head_cells,
            "attention_dropout": attention_dropout,
            "protocol": protocol,
            "pairing": pairing,
            "relaxation": relaxation,
            "temperature": temperature,
        }
        self.num_cells, self.num_steps = num_cells, num_steps
        self.channels, self.length, self.dropout = channels, length, dropout
        self.cell_outputs = cell_outputs
        self.head_cells = head_cells or num_cells
        self.protocol, self.pairing = protocol, pairing
        self.revises = True  # whether the hypernet can list the genotypes that differ in one decision
        self.pins = pairing == "distinct"  # whether the hypernet can stand for single genotypes
        self.relaxation: Relaxation = relaxation
        self.temperature = temperature
        self.ops: dict[str, Callable[[], StepOp]] = step_ops(
            protocol, channels, length, dropout, attention_dropout
        )

    # Parts, as the hypernet and the found network ask for them.

    def reshape(self, name: str, info: InputInfo) -> Reshape:
        """The reshape layer of one feature."""
        return Reshape(name, info, self.channels, self.length, self.dropout)

    def cell_end(self) -> ReleasedCellEnd | PaperCellEnd:
        """What follows a cell's steps."""
        if self.protocol == "paper":
            return PaperCellEnd(self.num_steps, self.channels, self.dropout)
        return ReleasedCellEnd(self.cell_outputs, self.channels, self.length, self.dropout)

    def flatten(self, num_cells: int | None = None) -> Flatten:
        """The head's norm and flattening over the last `num_cells` cells."""
        return Flatten(
            num_cells or self.head_cells, self.channels, self.length, norm=self.protocol == "released_code"
        )

    # The space.

    def hypernet(self, inputs: InputInfos) -> Hypernet:
        """The hypernet with fresh weights and logits."""
        self._check(inputs)
        if self.pairing == "distinct":
            return DistinctHypernet(self, inputs)
        return SharedHypernet(self, inputs, PaperRule() if self.protocol == "paper" else ReleasedRule())

    def build(self, genotype: Any, inputs: InputInfos, dropout: float | None = None) -> Network:
        """The found network, or the two-stream baseline, with fresh weights and its own dropout if given."""
        space = self if dropout is None else FusionSpace(**{**self.settings, "dropout": dropout})
        if isinstance(genotype, TwoStream):
            return TwoStreamNetwork(space, genotype, inputs)
        return FoundNetwork(space, genotype, inputs)

    def choices(self, inputs: InputInfos) -> list[Choice]:
        """Two different inputs a cell, the operands of its later steps, an operation a step."""
        choices = []
        for i in range(self.num_cells):
            names = tuple(self._candidates(i, inputs))
            choices += [Choice(f"cell.{i}.x", names), Choice(f"cell.{i}.y", names)]
            for m in range(self.num_steps):
                if m > 0:
                    states = tuple(str(q) for q in range(2 + m))
                    choices += [
                        Choice(f"cell.{i}.step.{m}.{operand}", states) for operand in ("first", "second")
                    ]
                choices.append(Choice(f"cell.{i}.step.{m}.op", tuple(self.ops)))
        return choices

    def sample(self, inputs: InputInfos, generator: torch.Generator) -> FusionGenotype:
        """A genotype drawn uniformly: ordered pairs of different inputs, uniform operations but `zero`."""
        self._check(inputs)

        def pair(count: int) -> tuple[int, int]:
            first, second = torch.randperm(count, generator=generator)[:2].tolist()
            return first, second

        ops = [name for name in self.ops if name != "zero"]
        cells = []
        for i in range(self.num_cells):
            names = self._candidates(i, inputs)
            x, y = pair(len(names))
            steps = []
            for m in range(self.num_steps):
                operands = (0, 1) if m == 0 else pair(2 + m)
                op = ops[int(torch.randint(len(ops), (), generator=generator))]
                steps.append(StepGenotype(operands, op))
            cells.append(CellGenotype((names[x], names[y]), tuple(steps)))
        return FusionGenotype(tuple(cells), self.head_cells)

    def all_single_cells(self, inputs: InputInfos) -> list[FusionGenotype]:
        """Every genotype of N = 1, M = 1: ordered pairs of features times operations (but `zero`)."""
        return [
            FusionGenotype((CellGenotype((x, y), (StepGenotype((0, 1), op),)),), 1)
            for x in inputs
            for y in inputs
            if x != y
            for op in self.ops
            if op != "zero"
        ]

    def parse(self, data: dict[str, Any], inputs: InputInfos) -> FusionGenotype:
        """A genotype from its JSON form, checked against the features at hand. Raises InputError."""
        return parse_genotype(data, list(inputs), list(self.ops))

    def fixed(self, name: str, inputs: InputInfos) -> FusionGenotype | TwoStream:
        """The fixed network of a baseline: `two_stream`, or a modality's name for a network of it alone.

        The unimodal network has the same N cells and M steps; each cell fuses the modality's last feature
        (x, which carries the residual) with the one before it by Sum.
        """
        last = {info.modality: feature for feature, info in inputs.items()}  # the later feature wins
        if name == "two_stream":
            return TwoStream(tuple(last.values()))
        features = [feature for feature, info in inputs.items() if info.modality == name]
        if not features:
            raise InputError(
                f"no baseline '{name}': the fusion space has the fixed networks two_stream, {', '.join(last)}"
            )
        x, y = features[-1], features[-2] if len(features) > 1 else features[-1]
        steps = tuple(StepGenotype((0, 1), "sum") for _ in range(self.num_steps))
        return FusionGenotype(
            tuple(CellGenotype((x, y), steps) for _ in range(self.num_cells)), self.head_cells
        )

    @staticmethod
    def _candidates(i: int, inputs: InputInfos) -> list[str]:
        return [*inputs, *(f"cell.{c}" for c in range(i))]

    @staticmethod
    def _check(inputs: InputInfos) -> None:
        if len(inputs) < 2:
            raise InputError(
                f"the fusion space needs at least two features, the backbone gives {len(inputs)}: "
                f"{', '.join(inputs) or 'none'}"
            )

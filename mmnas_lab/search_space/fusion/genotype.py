"""What a fusion search decides: for each cell two inputs, for each step two operands and an operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmnas_lab.types import InputError

SCHEMA = 1


@dataclass(frozen=True)
class StepGenotype:
    """One step node: operands are indices into [x, y, s_0, s_1, ...]."""

    inputs: tuple[int, int]
    op: str


@dataclass(frozen=True)
class CellGenotype:
    """One cell: `inputs` are names, `"text.1"` of a feature or `"cell.0"` of an earlier cell; first is x."""

    inputs: tuple[str, str]
    steps: tuple[StepGenotype, ...]


@dataclass(frozen=True)
class FusionGenotype:
    """Cells in order; the last `head_cells` of them feed the head."""

    cells: tuple[CellGenotype, ...]
    head_cells: int

    def features(self) -> tuple[str, ...]:
        """Names of the backbone features in use, in order of first use."""
        names = [name for cell in self.cells for name in cell.inputs if not name.startswith("cell.")]
        return tuple(dict.fromkeys(names))

    def unread(self) -> bool:
        """Whether the network has parts on which its output does not depend: unread cells, zeroed steps."""
        names = [f"cell.{i}" for i in range(len(self.cells))]
        read = set(names[len(names) - self.head_cells :])
        for name, cell in reversed(list(zip(names, self.cells, strict=True))):
            read |= set(cell.inputs) if name in read else set()
        zeroed = any(step.op == "zero" for cell in self.cells for step in cell.steps)
        return zeroed or not read.issuperset(names)

    def choices(self) -> dict[str, Any]:
        """What is chosen, by the names that margins have: `cell.0.inputs`, `cell.0.step.0.op`, ..."""
        found: dict[str, Any] = {}
        for i, cell in enumerate(self.cells):
            found[f"cell.{i}.inputs"] = cell.inputs
            for m, step in enumerate(cell.steps):
                found[f"cell.{i}.step.{m}.inputs"] = step.inputs
                found[f"cell.{i}.step.{m}.op"] = step.op
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values; `parse_genotype` reads them back."""
        return {
            "space": "fusion",
            "schema": SCHEMA,
            "cells": [
                {
                    "inputs": list(cell.inputs),
                    "steps": [{"inputs": list(step.inputs), "op": step.op} for step in cell.steps],
                }
                for cell in self.cells
            ],
            "head_cells": self.head_cells,
        }


def parse_genotype(data: Mapping[str, Any], features: Sequence[str], ops: Sequence[str]) -> FusionGenotype:
    """A genotype from its JSON form.

    Raises:
        InputError: another space or schema, a feature, cell or operation that does not exist, or a shape
            that is not a genotype's; the message names it and what is there.
    """
    if not isinstance(data, Mapping):
        raise InputError(
            f"not a fusion genotype: a JSON object is needed, got {data!r}; see genotype.json of a run"
        )
    if data.get("space") != "fusion" or data.get("schema") != SCHEMA:
        raise InputError(
            f"this genotype is of space {data.get('space')!r}, schema {data.get('schema')!r}; the fusion "
            f"space reads space 'fusion', schema {SCHEMA}"
        )
    try:
        cells = tuple(
            CellGenotype(
                _pair(cell["inputs"], str),
                tuple(StepGenotype(_pair(step["inputs"], int), str(step["op"])) for step in cell["steps"]),
            )
            for cell in data["cells"]
        )
        genotype = FusionGenotype(cells, int(data["head_cells"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"not a fusion genotype: {type(error).__name__} {error}; see genotype.json of a run"
        ) from None
    if not cells or not 1 <= genotype.head_cells <= len(cells):
        raise InputError(
            f"a fusion genotype needs at least one cell and 1 <= head_cells <= cells, got {len(cells)} "
            f"cells and head_cells {genotype.head_cells}"
        )
    for i, cell in enumerate(cells):
        known = [*features, *(f"cell.{c}" for c in range(i))]
        for name in cell.inputs:
            if name not in known:
                raise InputError(f"cell {i} of the genotype reads '{name}'; it can read {', '.join(known)}")
        if not cell.steps:
            raise InputError(f"cell {i} of the genotype has no step")
        for m, step in enumerate(cell.steps):
            if not all(0 <= q < 2 + m for q in step.inputs):
                raise InputError(f"step {m} of cell {i} reads states {step.inputs}; there are 0 to {1 + m}")
            if step.op not in ops:
                raise InputError(
                    f"step {m} of cell {i} applies '{step.op}'; the operations are {', '.join(ops)}"
                )
    return genotype


def _pair(values: Sequence[Any], kind: type) -> tuple[Any, Any]:
    first, second = values
    return kind(first), kind(second)

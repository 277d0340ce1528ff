"""What a cell search decides: for each node of each kind of cell, the operations on its incoming edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmnas_lab.search_space.cnn_cells.vocabulary import Vocabulary, kinds, num_inputs
from mmnas_lab.types import InputError

SCHEMA = 1


@dataclass(frozen=True)
class EdgeGenotype:
    """An operation on the edge from state `input`; states 0 and 1 are the cell's inputs, then come nodes."""

    op: str
    input: int


@dataclass(frozen=True)
class CellGenotype:
    """One kind of cell: the edges into each node, the stronger first; a node without edges is absent."""

    kind: str
    nodes: tuple[tuple[EdgeGenotype, ...], ...]

    def count(self, op: str) -> int:
        """Number of edges with that operation."""
        return sum(edge.op == op for node in self.nodes for edge in node)

    def live_nodes(self, inputs: int) -> dict[int, tuple[EdgeGenotype, ...]]:
        """The nodes that can be computed, by state, each with the edges that lead from states that exist.

        FairDARTS' published cells hold edges from absent nodes; they are passed over, as in its code.
        """
        live: dict[int, tuple[EdgeGenotype, ...]] = {}
        for state, node in enumerate(self.nodes, inputs):
            if kept := tuple(edge for edge in node if edge.input < inputs or edge.input in live):
                live[state] = kept
        return live


@dataclass(frozen=True)
class CnnGenotype:
    """The kinds of cell that a network repeats: normal and reduce, or NAS-Bench-201's one."""

    cells: tuple[CellGenotype, ...]

    def cell(self, kind: str) -> CellGenotype:
        """The cell of one kind."""
        return next(cell for cell in self.cells if cell.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `parse_genotype` reads them back."""
        return {
            "space": "cnn_cells",
            "schema": SCHEMA,
            "cells": [
                {
                    "kind": cell.kind,
                    "nodes": [[{"op": edge.op, "input": edge.input} for edge in node] for node in cell.nodes],
                }
                for cell in self.cells
            ],
        }


def parse_genotype(data: Mapping[str, Any], vocabulary: Vocabulary, ops: Sequence[str]) -> CnnGenotype:
    """A genotype from its JSON form.

    Args:
        data: the JSON form.
        vocabulary: decides the kinds of cell and their inputs.
        ops: the operations that a network can be built of.

    Raises:
        InputError: another space or schema, other kinds of cell, an operation or state that does not exist,
            a cell without any node, or a shape that is not a genotype's; the message names it and what is
            there.
    """
    if not isinstance(data, Mapping):
        raise InputError(
            f"not a genotype of cnn_cells: a JSON object is needed, got {data!r}; see genotype.json of a run"
        )
    if data.get("space") != "cnn_cells" or data.get("schema") != SCHEMA:
        raise InputError(
            f"this genotype is of space {data.get('space')!r}, schema {data.get('schema')!r}; cnn_cells "
            f"reads space 'cnn_cells', schema {SCHEMA}; set search_space to the genotype's space"
        )
    try:
        cells = tuple(
            CellGenotype(
                str(cell["kind"]),
                tuple(
                    tuple(EdgeGenotype(str(edge["op"]), int(edge["input"])) for edge in node)
                    for node in cell["nodes"]
                ),
            )
            for cell in data["cells"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"not a genotype of cnn_cells: {type(error).__name__} {error}; see genotype.json of a run"
        ) from None
    genotype = CnnGenotype(cells)
    check_genotype(genotype, vocabulary, ops)
    return genotype


def check_genotype(genotype: CnnGenotype, vocabulary: Vocabulary, ops: Sequence[str]) -> None:
    """Refuse a genotype that no network can be built of. Raises InputError, see `parse_genotype`."""
    wanted = kinds(vocabulary)
    if tuple(cell.kind for cell in genotype.cells) != wanted:
        got = ", ".join(cell.kind for cell in genotype.cells) or "none"
        other = "darts" if vocabulary == "nas_bench_201" else "nas_bench_201"
        raise InputError(
            f"vocabulary {vocabulary} needs the cells {', '.join(wanted)}, the genotype has {got}; it may be "
            f"one of search_space.vocabulary={other}"
        )
    inputs = num_inputs(vocabulary)
    for cell in genotype.cells:
        for state, node in enumerate(cell.nodes, inputs):
            for edge in node:
                if edge.op not in ops:
                    raise InputError(
                        f"node {state} of the {cell.kind} cell applies '{edge.op}'; "
                        f"the operations are {', '.join(ops)}"
                    )
                if not 0 <= edge.input < state:
                    raise InputError(
                        f"node {state} of the {cell.kind} cell reads state {edge.input}; "
                        f"there are 0 to {state - 1}"
                    )
        if not cell.live_nodes(inputs):
            raise InputError(
                f"the {cell.kind} cell of the genotype has no edge, so no network can be built of it; "
                "lower search_space.threshold or set search_space.derivation=darts"
            )


def bench_201_genotype(text: str) -> CnnGenotype:
    """A genotype from NAS-Bench-201's own notation, `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`.

    Raises:
        InputError: another notation.
    """
    try:
        nodes = tuple(
            tuple(_bench_201_edge(edge) for edge in node.strip("|").split("|")) for node in text.split("+")
        )
    except ValueError:
        raise InputError(
            f"not an architecture of NAS-Bench-201: {text!r}; its form is |op~0|+|op~0|op~1|+|op~0|op~1|op~2|"
        ) from None
    return CnnGenotype((CellGenotype("cell", nodes),))


def _bench_201_edge(text: str) -> EdgeGenotype:
    op, source = text.split("~")
    return EdgeGenotype(op, int(source))


def bench_201_string(genotype: CnnGenotype) -> str:
    """NAS-Bench-201's own notation of one of its genotypes, edges by source."""
    nodes: Iterable[tuple[EdgeGenotype, ...]] = genotype.cell("cell").nodes
    ordered = (sorted(node, key=lambda edge: edge.input) for node in nodes)
    return "+".join("|" + "".join(f"{edge.op}~{edge.input}|" for edge in node) for node in ordered)

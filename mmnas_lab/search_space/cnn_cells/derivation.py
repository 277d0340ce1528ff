"""From mixing weights to a genotype, with the margin of every choice.

Scores are compared to 12 decimals, so that the order in which a sum was taken decides nothing. Ties are
broken as in the released codes: the earlier source, the earlier operation. A tie has margin 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from mmnas_lab.search_space.cnn_cells.genotype import CellGenotype, EdgeGenotype
from mmnas_lab.search_space.cnn_cells.vocabulary import edges

Derivation = Literal["darts", "threshold_sparse", "threshold_edge"]
KEPT = 2
"""Edges that a node keeps, and in `threshold_edge` operations that an edge keeps."""


def derive_cell(
    kind: str,
    weights: Tensor,
    edge_ops: Sequence[tuple[str, ...]],
    num_inputs: int,
    num_nodes: int,
    rule: Derivation | Literal["argmax"],
    threshold: float,
) -> tuple[CellGenotype, dict[str, float]]:
    """The genotype of one kind of cell.

    `none` is never taken, though it counts in the softmax, except by `argmax`. The rules:
    `darts`: a node keeps the two edges with the largest best weight, each with its best operation (DARTS).
    `threshold_sparse`: the same, but an operation is kept only from `threshold` on (FairDARTS).
    `threshold_edge`: of each edge the two largest operations from `threshold` on (FairDARTS' released code).
    `argmax`: every edge with its best operation, `none` included (NAS-Bench-201).

    Args:
        kind: of cell; begins the names of the margins.
        weights: (E, K) relaxed weights.
        edge_ops: names of the operations of each edge.
        num_inputs: of a cell.
        num_nodes: M.
        rule: one of the above.
        threshold: least weight, for two of them.

    Returns:
        The cell, each node's stronger edges first (`argmax`: by source), and the margins:
        `normal.node.2.edges`, the last kept edge's score over the first dropped one's (over 0 if none is);
        `normal.node.2.edge.0.op`, the kept operation's weight over the next one's; and with a threshold
        `normal.node.2.edge.0.threshold`, the distance of the edge's best weight from it.
    """
    rows = [[round(value, 12) for value in row] for row in weights.tolist()]
    every = edges(num_inputs, num_nodes)
    margins: dict[str, float] = {}
    nodes: list[tuple[EdgeGenotype, ...]] = []
    for target in range(num_inputs, num_inputs + num_nodes):
        name = f"{kind}.node.{target}"
        ranked = {
            source: _ranked(rows[e], edge_ops[e], none=rule == "argmax")
            for e, (source, to) in enumerate(every)
            if to == target
        }
        sources = list(ranked)
        if rule in ("darts", "threshold_sparse"):
            order = sorted(sources, key=lambda source: -ranked[source][0][0])
            sources = order[:KEPT]
            next_best = ranked[order[KEPT]][0][0] if len(order) > KEPT else 0.0
            margins[f"{name}.edges"] = ranked[sources[-1]][0][0] - next_best
        node: list[tuple[float, EdgeGenotype]] = []
        for source in sources:
            options = ranked[source]
            count = KEPT if rule == "threshold_edge" else 1
            margins[f"{name}.edge.{source}.op"] = _lead(options, min(count, len(options)))
            if rule.startswith("threshold"):
                margins[f"{name}.edge.{source}.threshold"] = abs(options[0][0] - threshold)
            node += [
                (score, EdgeGenotype(op, source))
                for score, op in options[:count]
                if not rule.startswith("threshold") or score >= threshold
            ]
        if rule == "threshold_edge":
            node.sort(key=lambda scored: -scored[0])
        nodes.append(tuple(edge for _, edge in node))
    return CellGenotype(kind, tuple(nodes)), margins


def _ranked(row: Sequence[float], ops: Sequence[str], none: bool) -> list[tuple[float, str]]:
    """The operations of an edge, best first; the earlier one wins a tie."""
    options = [(score, op) for score, op in zip(row, ops, strict=True) if none or op != "none"]
    return sorted(options, key=lambda option: -option[0])


def _lead(options: Sequence[tuple[float, str]], count: int) -> float:
    """The last taken option's score over the next one's, over 0 if there is none."""
    return options[count - 1][0] - (options[count][0] if len(options) > count else 0.0)

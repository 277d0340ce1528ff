"""Which operations each edge of a cell may choose: DARTS, FairDARTS, S1 to S4, NAS-Bench-201.

Edges are numbered node by node, and for each node by source: in DARTS' cell of two inputs 0->2, 1->2, 0->3,
1->3, 2->3, ...; in NAS-Bench-201's cell of one input 0->1, 0->2, 1->2, .... The order of the operations is
that of alpha's columns.
"""

from __future__ import annotations

from typing import Literal

from mmnas_lab.types import InputError

Vocabulary = Literal["darts", "fairdarts", "s1", "s2", "s3", "s4", "nas_bench_201"]

FAIRDARTS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
SAME_ON_ALL_EDGES: dict[str, tuple[str, ...]] = {
    "darts": ("none", *FAIRDARTS),
    "fairdarts": FAIRDARTS,
    "s2": ("skip_connect", "sep_conv_3x3"),
    "s3": ("none", "skip_connect", "sep_conv_3x3"),
    "s4": ("noise", "sep_conv_3x3"),
    "nas_bench_201": ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"),
}
# RobustDARTS (arXiv 1909.09656), its reduced space S1, as given in its released code.
S1 = {
    "normal": """
        skip dil3 | skip dil5
        skip dil5 | skip sep3 | skip dil3
        max skip  | skip sep3 | skip sep3 | skip dil3
        skip sep3 | max skip  | skip dil3 | dil3 dil5 | dil3 dil5
    """,
    "reduce": """
        max avg   | max dil3
        max avg   | max avg   | skip dil5
        max avg   | max sep3  | skip dil3 | skip dil5
        max avg   | max avg   | skip dil5 | skip dil5 | skip dil5
    """,
}
SHORT = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}


def edges(num_inputs: int, num_nodes: int) -> list[tuple[int, int]]:
    """(source, target) of every edge, in alpha's order; the inputs are states 0 to num_inputs - 1."""
    targets = range(num_inputs, num_inputs + num_nodes)
    return [(source, target) for target in targets for source in range(target)]


def kinds(vocabulary: Vocabulary) -> tuple[str, ...]:
    """The kinds of cell that are chosen."""
    return ("cell",) if vocabulary == "nas_bench_201" else ("normal", "reduce")


def num_inputs(vocabulary: Vocabulary) -> int:
    """Inputs of a cell."""
    return 1 if vocabulary == "nas_bench_201" else 2


def edge_ops(vocabulary: Vocabulary, kind: str, num_nodes: int) -> list[tuple[str, ...]]:
    """Names of the operations of every edge.

    Args:
        vocabulary: the space.
        kind: `normal` or `reduce`; of `nas_bench_201` `cell`.
        num_nodes: M; S1 is given for 4 nodes only.

    Raises:
        InputError: S1 with another number of nodes.
    """
    count = len(edges(num_inputs(vocabulary), num_nodes))
    if vocabulary != "s1":
        return [SAME_ON_ALL_EDGES[vocabulary]] * count
    rows = [tuple(SHORT[name] for name in edge.split()) for edge in _split(S1[kind])]
    if len(rows) != count:
        raise InputError(
            f"search_space.vocabulary=s1 names the operations of 4 nodes, got num_nodes={num_nodes}; "
            "set search_space.num_nodes=4 or take another vocabulary"
        )
    return rows


def _split(table: str) -> list[str]:
    return [edge for line in table.strip().splitlines() for edge in line.split("|")]

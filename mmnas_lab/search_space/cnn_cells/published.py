"""Published cells by name, as printed in the released code of their papers.

A node is written as its two `op(source)`, nodes 2 to 5 in order, `-` for an absent one; source 0 is the cell
before the last, 1 the last, 2 to 4 are nodes. In FairDARTS_c and FairDARTS_g a skip leaves the absent node 3;
it is kept here and passed over when the network is built, as in the released code.
"""

from __future__ import annotations

import re

from mmnas_lab.search_space.cnn_cells.genotype import CellGenotype, CnnGenotype, EdgeGenotype
from mmnas_lab.types import InputError

SHORT = {
    "s3": "sep_conv_3x3",
    "s5": "sep_conv_5x5",
    "d3": "dil_conv_3x3",
    "d5": "dil_conv_5x5",
    "mx": "max_pool_3x3",
    "av": "avg_pool_3x3",
    "sk": "skip_connect",
}
PUBLISHED = {
    # DARTS (arXiv 1806.09055), first and second order.
    "DARTS_V1": (
        "s3(1) s3(0) | sk(0) s3(1) | sk(0) s3(1) | s3(0) sk(2)",
        "mx(0) mx(1) | sk(2) mx(0) | mx(0) sk(2) | sk(2) av(0)",
    ),
    "DARTS_V2": (
        "s3(0) s3(1) | s3(0) s3(1) | s3(1) sk(0) | sk(0) d3(2)",
        "mx(0) mx(1) | sk(2) mx(1) | mx(0) sk(2) | sk(2) mx(1)",
    ),
    # PC-DARTS (arXiv 1907.05737), searched on CIFAR-10 and on ImageNet.
    "PC_DARTS_cifar": (
        "s3(1) sk(0) | s3(0) d3(1) | s5(0) s3(1) | av(0) d3(1)",
        "s5(1) mx(0) | s5(1) s5(2) | s3(0) s3(3) | s3(1) s3(2)",
    ),
    "PC_DARTS_image": (
        "sk(1) s3(0) | s3(0) sk(1) | s3(1) s3(3) | s3(1) d5(4)",
        "s3(0) sk(1) | d5(2) mx(1) | s3(2) s3(1) | s5(0) s3(3)",
    ),
    # P-DARTS (arXiv 1904.12760).
    "PDARTS": (
        "sk(0) d3(1) | sk(0) s3(1) | s3(1) s3(3) | s3(0) d5(4)",
        "av(0) s5(1) | s3(0) d5(2) | mx(0) d3(1) | d3(1) d5(3)",
    ),
    # FairDARTS (arXiv 1911.12126), seven searches on CIFAR-10.
    "FairDARTS_a": (
        "s3(0) s5(1) | - | mx(0) | s3(0)",
        "mx(0) av(1) | av(0) d5(1) | av(0) s5(1) | sk(0) sk(1)",
    ),
    "FairDARTS_b": (
        "s3(0) s3(1) | s3(1) | d3(0) s5(1) | d5(1)",
        "sk(0) d3(1) | sk(0) d3(1) | mx(0) s3(1) | sk(2) mx(0)",
    ),
    "FairDARTS_c": (
        "mx(0) s5(1) | - | d3(0) d5(2) | sk(3) s3(0)",
        "d3(1) d5(0) | d3(0) s3(1) | s5(0) s5(3) | s5(0) sk(1)",
    ),
    "FairDARTS_d": (
        "s3(0) s5(1) | d3(1) mx(0) | d3(0) d3(1) | s3(0) d5(1)",
        "mx(0) s5(1) | av(0) d5(2) | d3(3) av(0) | av(0) sk(3)",
    ),
    "FairDARTS_e": (
        "s3(0) s3(1) | - | d3(1) d3(2) | d3(0) d5(1)",
        "mx(1) mx(0) | mx(1) mx(0) | s5(1) mx(0) | av(0) d5(1)",
    ),
    "FairDARTS_f": (
        "mx(0) s3(1) | d3(1) | s5(1) | s3(0) s3(1)",
        "mx(0) mx(1) | mx(0) d3(1) | d3(2) mx(0) | mx(0) s3(1)",
    ),
    "FairDARTS_g": (
        "s3(0) s3(1) | - | sk(3) s5(1) | d3(0) s3(1)",
        "av(1) sk(0) | sk(2) mx(1) | s5(3) mx(0) | d3(1) d3(4)",
    ),
}


def published(name: str) -> CnnGenotype:
    """The genotype of a paper. Raises InputError, with the names that there are."""
    if name not in PUBLISHED:
        raise InputError(f"no published genotype '{name}'; there are {', '.join(PUBLISHED)}")
    normal, reduce = PUBLISHED[name]
    return CnnGenotype((_cell("normal", normal), _cell("reduce", reduce)))


def _cell(kind: str, nodes: str) -> CellGenotype:
    edges = (re.findall(r"(\w+)\((\d)\)", node) for node in nodes.split("|"))
    return CellGenotype(
        kind, tuple(tuple(EdgeGenotype(SHORT[op], int(j)) for op, j in node) for node in edges)
    )

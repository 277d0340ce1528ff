"""The cell search space: its settings, its choices, and the networks that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from mmnas_lab.search_space.base import Choice, Network
from mmnas_lab.search_space.cnn_cells.bench_201 import Bench201Table
from mmnas_lab.search_space.cnn_cells.derivation import Derivation
from mmnas_lab.search_space.cnn_cells.found_network import DropPathOn, FoundNetwork
from mmnas_lab.search_space.cnn_cells.genotype import (
    CellGenotype,
    CnnGenotype,
    EdgeGenotype,
    bench_201_genotype,
    check_genotype,
    parse_genotype,
)
from mmnas_lab.search_space.cnn_cells.primitive_ops import BENCH_201_OPS, DARTS_OPS
from mmnas_lab.search_space.cnn_cells.published import published
from mmnas_lab.search_space.cnn_cells.skeleton import (
    Bench201Skeleton,
    DartsSkeleton,
    MakeCell,
    Skeleton,
    Stem,
    image_input,
)
from mmnas_lab.search_space.cnn_cells.supernet import CnnSupernet
from mmnas_lab.search_space.cnn_cells.vocabulary import Vocabulary, edge_ops, kinds, num_inputs
from mmnas_lab.search_space.relaxation import Relaxation
from mmnas_lab.types import InputError, InputInfos


class CnnCellSpace:
    """Convolutional cells on pixels, after DARTS (arXiv 1806.09055) and its relatives.

    Args:
        vocabulary: the operations: of DARTS, FairDARTS (no `none`), RobustDARTS' S1 to S4, NAS-Bench-201.
        relaxation: of alpha. `gumbel` draws once a forward, in training.
        temperature: of `gumbel`; > 0.
        derivation: `darts` keeps two edges a node; `threshold_sparse` drops those of them below `threshold`,
            and `threshold_edge` keeps two operations an edge from `threshold` on (both FairDARTS).
            NAS-Bench-201 takes the best operation of every edge, whatever stands here.
        threshold: least weight of a kept operation.
        num_cells: of the supernet, reductions included; null: 8, in NAS-Bench-201 17.
        channels: C of the supernet's first cells.
        num_nodes: M, nodes a cell; null: 4, in NAS-Bench-201 3.
        partial_channels: k, of which a k-th of the channels meets the operations (PC-DARTS); 1 for all.
        stem: `cifar`, or `imagenet`, which divides height and width by 8.
        init_scale: standard deviation of the logits' start; FairDARTS starts at 0.
        search_drop_path: probability of losing a mixed edge, reached in the last epoch (RobustDARTS).
        found_cells: of the found network; null: 20, 14 with the ImageNet stem, 17 in NAS-Bench-201.
        found_channels: C of the found network; null: 36, 48 with the ImageNet stem, 16 in NAS-Bench-201.
        auxiliary: give the found network the auxiliary tower, for an objective that reads its tap.
        drop_path: of the found network.
        drop_path_on: `edges` as in DARTS, `nodes` as in FairDARTS.
        table: converted table of NAS-Bench-201, to which the cell that a search of its space found is held.
    """

    name = "cnn_cells"
    length = None

    def __init__(
        self,
        vocabulary: Vocabulary = "darts",
        relaxation: Relaxation = "softmax",
        temperature: float = 1.0,
        derivation: Derivation = "darts",
        threshold: float = 0.85,
        num_cells: int | None = None,
        channels: int = 16,
        num_nodes: int | None = None,
        partial_channels: int = 1,
        stem: Stem = "cifar",
        init_scale: float = 1e-3,
        search_drop_path: float = 0.0,
        found_cells: int | None = None,
        found_channels: int | None = None,
        auxiliary: bool = False,
        drop_path: float = 0.2,
        drop_path_on: DropPathOn = "edges",
        table: str | None = None,
    ) -> None:
        bench, large = vocabulary == "nas_bench_201", stem == "imagenet"
        self.vocabulary: Vocabulary = vocabulary
        self.relaxation: Relaxation = relaxation
        self.temperature, self.threshold = temperature, threshold
        self.rule: Derivation | Literal["argmax"] = "argmax" if bench else derivation
        self.num_cells = num_cells if num_cells is not None else (17 if bench else 8)
        self.channels = channels
        self.num_nodes = num_nodes if num_nodes is not None else (3 if bench else 4)
        self.partial_channels, self.stem, self.init_scale = partial_channels, stem, init_scale
        self.search_drop_path = search_drop_path
        self.found_cells = found_cells if found_cells is not None else (17 if bench else 14 if large else 20)
        self.found_channels = (
            found_channels if found_channels is not None else (16 if bench else 48 if large else 36)
        )
        self.auxiliary, self.drop_path, self.drop_path_on = auxiliary, drop_path, drop_path_on
        for name in (
            "num_cells",
            "channels",
            "num_nodes",
            "partial_channels",
            "found_cells",
            "found_channels",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"search_space.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("channels", "found_channels"):
            if getattr(self, name) % 2:
                raise InputError(
                    f"search_space.{name} must be even, since skips of stride 2 are made of two halves, got "
                    f"{getattr(self, name)}"
                )
        for name in ("drop_path", "search_drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"search_space.{name} must be in [0, 1), got {getattr(self, name):g}")
        if not 0 <= threshold <= 1:
            raise InputError(f"search_space.threshold must be in [0, 1], got {threshold:g}")
        if init_scale < 0:
            raise InputError(f"search_space.init_scale must be at least 0, got {init_scale:g}")
        if temperature <= 0:
            raise InputError(f"search_space.temperature must be positive, got {temperature:g}")
        if bench and (partial_channels > 1 or large or auxiliary):
            raise InputError(
                "nas_bench_201 has no partial channels, ImageNet stem or auxiliary tower; set "
                "search_space.partial_channels=1, search_space.stem=cifar and search_space.auxiliary=false"
            )

        if table is not None and not bench:
            raise InputError(
                "search_space.table is of NAS-Bench-201's cells; set search_space.vocabulary=nas_bench_201, "
                "or leave the table out"
            )
        self.table = Bench201Table(Path(table)) if table is not None else None

    # Parts, as the supernet and the found network ask for them.

    def skeleton(
        self, shape: tuple[int, ...], depth: int, channels: int, stem_channels: int, make: MakeCell
    ) -> Skeleton:
        """Stem and cells; NAS-Bench-201's stem has the width of its first cells."""
        if self.vocabulary == "nas_bench_201":
            return Bench201Skeleton(shape, depth, channels, make)
        return DartsSkeleton(shape, depth, channels, self.stem, stem_channels, make)

    def stem_width(self, stem_channels: int) -> int:
        """Channels of the stem's narrowest convolution."""
        if self.vocabulary == "nas_bench_201":
            return self.channels
        return stem_channels // 2 if self.stem == "imagenet" else stem_channels

    def found_ops(self) -> tuple[str, ...]:
        """Names of the operations that a genotype may hold."""
        return ("none", *BENCH_201_OPS) if self.vocabulary == "nas_bench_201" else tuple(DARTS_OPS)

    # The space.

    def hypernet(self, inputs: InputInfos) -> CnnSupernet:
        """The supernet with fresh weights and logits."""
        return CnnSupernet(self, inputs)

    def build(self, genotype: Any, inputs: InputInfos, dropout: float | None = None) -> Network:
        """The found network with fresh weights, and `dropout` as its drop-path if given."""
        check_genotype(genotype, self.vocabulary, self.found_ops())
        return FoundNetwork(self, genotype, inputs, self.drop_path if dropout is None else dropout)

    def choices(self, inputs: InputInfos) -> list[Choice]:
        """Two different sources a node and an operation on each; in NAS-Bench-201 an operation an edge."""
        found: list[Choice] = []
        inputs_of_cell = num_inputs(self.vocabulary)
        for kind in kinds(self.vocabulary):
            ops = self._ops_by_node(kind)
            for target, node in enumerate(ops, inputs_of_cell):
                name = f"{kind}.node.{target}"
                if self.rule != "argmax":
                    pairs = tuple(f"{b},{a}" for a in range(target) for b in range(a))
                    found.append(Choice(f"{name}.edges", pairs))
                found += [Choice(f"{name}.edge.{source}.op", names) for source, names in enumerate(node)]
        return found

    def sample(self, inputs: InputInfos, generator: torch.Generator) -> CnnGenotype:
        """A genotype drawn uniformly: two different sources a node, an operation but `none` on each.

        In NAS-Bench-201 an operation on every edge, `none` included. Thresholds play no part.
        """
        image_input(inputs)

        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        cells = []
        for kind in kinds(self.vocabulary):
            nodes = []
            for node in self._ops_by_node(kind):
                sources = list(range(len(node)))
                if self.rule != "argmax":
                    sources = sorted(torch.randperm(len(node), generator=generator)[:2].tolist())
                nodes.append(tuple(EdgeGenotype(node[j][draw(len(node[j]))], j) for j in sources))
            cells.append(CellGenotype(kind, tuple(nodes)))
        return CnnGenotype(tuple(cells))

    def _ops_by_node(self, kind: str) -> list[list[tuple[str, ...]]]:
        """For each node and source the operations that can be derived."""
        every = edge_ops(self.vocabulary, kind, self.num_nodes)
        if self.rule != "argmax":
            every = [tuple(op for op in ops if op != "none") for ops in every]
        nodes, start = [], 0
        for target in range(num_inputs(self.vocabulary), num_inputs(self.vocabulary) + self.num_nodes):
            nodes.append(every[start : start + target])
            start += target
        return nodes

    def parse(self, data: dict[str, Any], inputs: InputInfos) -> CnnGenotype:
        """A genotype from its JSON form. Raises InputError."""
        return parse_genotype(data, self.vocabulary, self.found_ops())

    def fixed(self, name: str, inputs: InputInfos) -> CnnGenotype:
        """A published genotype by its name. Raises InputError."""
        return self.published(name)

    def benchmark(self, genotype: CnnGenotype) -> dict[str, float]:
        """What the table of a tabular benchmark says of a cell; empty without a table."""
        return self.table.look_up(genotype) if self.table is not None else {}

    def published(self, name: str) -> CnnGenotype:
        """A published genotype by its name, or NAS-Bench-201's by its string. Raises InputError."""
        genotype = bench_201_genotype(name) if self.vocabulary == "nas_bench_201" else published(name)
        check_genotype(genotype, self.vocabulary, self.found_ops())
        return genotype

"""The supernet: all cells of a vocabulary at once, weighted by alpha (and PC-DARTS' beta)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmnas_lab.search_space.base import Derived, Hypernet
from mmnas_lab.search_space.cnn_cells import mixed_ops
from mmnas_lab.search_space.cnn_cells.cell import MixedCell
from mmnas_lab.search_space.cnn_cells.derivation import derive_cell
from mmnas_lab.search_space.cnn_cells.genotype import CnnGenotype
from mmnas_lab.search_space.cnn_cells.skeleton import (
    Place,
    Preprocess,
    Skeleton,
    image_input,
    in_layout,
    masked_image,
)
from mmnas_lab.search_space.cnn_cells.vocabulary import edge_ops, edges, kinds, num_inputs
from mmnas_lab.search_space.relaxation import gumbel_noise, relax
from mmnas_lab.types import InputError, InputInfos, Inputs, Output

if TYPE_CHECKING:
    from mmnas_lab.search_space.cnn_cells.space import CnnCellSpace


class DartsCell(nn.Module):
    """Preprocessing without affine BatchNorm, and the nodes, concatenated: (B, M C, H, W)."""

    def __init__(self, place: Place, mixed: MixedCell) -> None:
        super().__init__()
        self.preprocess = Preprocess(place, affine=False)
        self.mixed = mixed

    def forward(
        self,
        inputs: Sequence[Tensor],
        weights: Tensor,
        edge_weights: Tensor | None,
        drop_path: float,
        sparse: bool = False,
    ) -> Tensor:
        return torch.cat(self.mixed(self.preprocess(*inputs), weights, edge_weights, drop_path, sparse), 1)


class Bench201Cell(nn.Module):
    """The last node of a cell with one input: (B, C, H, W)."""

    def __init__(self, mixed: MixedCell) -> None:
        super().__init__()
        self.mixed = mixed

    def forward(
        self,
        inputs: Sequence[Tensor],
        weights: Tensor,
        edge_weights: Tensor | None,
        drop_path: float,
        sparse: bool = False,
    ) -> Tensor:
        return self.mixed(inputs, weights, edge_weights, drop_path, sparse)[-1]


class CnnSupernet(Hypernet):
    """Images (B, 3, H, W) to the pooled output of the last cell, through every candidate operation.

    The logits, drawn as init_scale N(0, 1): `alpha_normal` and `alpha_reduce` (E, K), `alpha_cell` in
    NAS-Bench-201; with partial channels also `beta_normal` and `beta_reduce` (E,), normalised over the edges
    into each node. All cells of a kind share them.

    Args:
        space: the settings.
        inputs: one image.
    """

    def __init__(self, space: CnnCellSpace, inputs: InputInfos) -> None:
        super().__init__()
        self.image = image_input(inputs)
        self.modality = inputs[self.image].modality
        self.vocabulary, self.rule, self.threshold = space.vocabulary, space.rule, space.threshold
        self.relaxation, self.temperature = space.relaxation, space.temperature
        self.partial, self.num_nodes = space.partial_channels, space.num_nodes
        self.num_inputs = num_inputs(space.vocabulary)
        self.most_drop_path, self.drop_path = space.search_drop_path, 0.0
        self.edges = edges(self.num_inputs, self.num_nodes)
        self.edge_ops = {
            kind: edge_ops(space.vocabulary, kind, self.num_nodes) for kind in kinds(space.vocabulary)
        }
        self.widths = (space.channels // self.partial, space.stem_width(3 * space.channels))
        self.skeleton: Skeleton = space.skeleton(
            inputs[self.image].shape, space.num_cells, space.channels, 3 * space.channels, self._make
        )
        self.info = self.skeleton.info
        shapes: dict[str, tuple[int, ...]] = {
            f"alpha_{kind}": (len(ops), len(ops[0])) for kind, ops in self.edge_ops.items()
        }
        if self.partial > 1:
            shapes |= {f"beta_{kind}": (len(ops),) for kind, ops in self.edge_ops.items()}
        self.arch = nn.ParameterDict(
            {name: nn.Parameter(space.init_scale * torch.randn(shape)) for name, shape in shapes.items()}
        )

    def _make(self, place: Place) -> tuple[nn.Module, int]:
        active, rest = divmod(place.channels, self.partial)
        if rest or active % 2:
            raise InputError(
                f"a cell of {place.channels} channels with partial_channels={self.partial} leaves "
                f"{place.channels / self.partial:g} to its operations, which need an even number; set "
                f"search_space.channels to a multiple of {2 * self.partial}"
            )
        bench = self.vocabulary == "nas_bench_201"
        table = mixed_ops.BENCH_201_OPS if bench else mixed_ops.DARTS_OPS
        mixed = MixedCell(
            self.edge_ops[place.kind],
            table,
            self.num_inputs,
            self.num_nodes,
            place.channels,
            place.reduction,
            self.partial,
        )
        if bench:
            return Bench201Cell(mixed), place.channels
        return DartsCell(place, mixed), self.num_nodes * place.channels

    def at_epoch(self, epoch: int, epochs: int) -> None:
        """Drop-path on the mixed edges grows linearly to its full value in the last epoch (RobustDARTS)."""
        self.drop_path = self.most_drop_path * (epoch / max(epochs - 1, 1))

    def forward(self, inputs: Inputs, present: dict[str, Tensor] | None = None) -> Output:
        weights = {kind: self._weights(kind) for kind in self.edge_ops}
        edge_weights = {kind: self._edge_weights(kind) for kind in self.edge_ops}

        def run(kind: str, cell: nn.Module, states: Sequence[Tensor]) -> Tensor:
            return cell(states, weights[kind], edge_weights[kind], self.drop_path, self._pinned is not None)

        image = masked_image(inputs[self.image], present, self.modality)
        output, _ = self.skeleton(in_layout(image, self.widths), run)
        return output

    def _weights(self, kind: str) -> Tensor:
        """(E, K) mixing weights of this forward; noisy in a Gumbel training step."""
        if self._pinned is not None:
            return self._pinned[f"alpha_{kind}"]
        logits = self.logits(f"alpha_{kind}")
        noise = gumbel_noise(logits) if self.relaxation == "gumbel" and self.training else None
        return relax(logits, self.relaxation, noise, self.temperature)

    def _edge_weights(self, kind: str) -> Tensor | None:
        """(E,) softmax over the edges into each node (PC-DARTS eq. 4); None without partial channels."""
        if self.partial == 1:
            return None
        if self._pinned is not None:
            return self._pinned[f"beta_{kind}"]
        return self._per_node(self.logits(f"beta_{kind}"))

    def _per_node(self, beta: Tensor) -> Tensor:
        sizes = range(self.num_inputs, self.num_inputs + self.num_nodes)
        return torch.cat([torch.softmax(part, 0) for part in beta.split(list(sizes))])

    def mixing(self) -> dict[str, Tensor]:
        return {
            name: self._per_node(self.logits(name))
            if name.startswith("beta")
            else relax(self.logits(name), self.relaxation)
            for name in self.arch
        }

    def choice_names(self) -> dict[str, list[str]]:
        arrows = [f"{source}->{target}" for source, target in self.edges]
        names: dict[str, list[str]] = {}
        for name in self.arch:
            form, kind = name.split("_")
            names[name] = (
                [f"{kind} {arrow}" for arrow in arrows]
                if form == "beta"
                else [
                    f"{kind} {arrow}: {op}"
                    for arrow, ops in zip(arrows, self.edge_ops[kind], strict=True)
                    for op in ops
                ]
            )
        return names

    def one_hot(self, genotype: CnnGenotype) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind, ops in self.edge_ops.items():
            weights = torch.zeros_like(self.arch[f"alpha_{kind}"], device="cpu")
            used = torch.zeros(len(ops), dtype=weights.dtype)
            for target, node in enumerate(genotype.cell(kind).nodes, self.num_inputs):
                for edge in node:
                    e = self.edges.index((edge.input, target))
                    used[e] = 1
                    if edge.op != "none":
                        weights[e, ops[e].index(edge.op)] = 1
            found[f"alpha_{kind}"] = weights
            if self.partial > 1:
                found[f"beta_{kind}"] = used
        return found

    def monitors(self, genotype: CnnGenotype) -> dict[str, float]:
        """Skip connections of each kind of cell, as `skips_<kind>`."""
        return {f"skips_{cell.kind}": float(cell.count("skip_connect")) for cell in genotype.cells}

    def alarm(self, genotype: CnnGenotype) -> str | None:
        for cell in genotype.cells:
            kept = sum(len(node) for node in cell.nodes)
            skips = cell.count("skip_connect")
            if cell.kind != "reduce" and 2 * skips > kept:
                return (
                    f"skip connections have taken over the {cell.kind} cell, {skips} of its {kept} "
                    "operations; such cells train badly: stop earlier (strategy=darts_es), regularise the "
                    "search (search_space.search_drop_path, search.optimizer.weight_decay), or use sigmoid "
                    "weights (search_space.relaxation=sigmoid)"
                )
        return None

    @torch.no_grad()
    def derive(self) -> Derived:
        cells = []
        margins: dict[str, float] = {}
        for kind, ops in self.edge_ops.items():
            weights = relax(self.arch[f"alpha_{kind}"].double(), self.relaxation)
            if self.partial > 1:
                weights = weights * self._per_node(self.arch[f"beta_{kind}"].double())[:, None]
            cell, found = derive_cell(
                kind, weights, ops, self.num_inputs, self.num_nodes, self.rule, self.threshold
            )
            cells.append(cell)
            margins |= found
        return Derived(CnnGenotype(tuple(cells)), margins)

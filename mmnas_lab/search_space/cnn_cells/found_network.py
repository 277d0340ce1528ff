"""The network of one genotype, with fresh weights, drop-path and an auxiliary tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmnas_lab.search_space.base import Network
from mmnas_lab.search_space.cnn_cells.cell import kept
from mmnas_lab.search_space.cnn_cells.genotype import CellGenotype, CnnGenotype
from mmnas_lab.search_space.cnn_cells.primitive_ops import BENCH_201_OPS, DARTS_OPS
from mmnas_lab.search_space.cnn_cells.skeleton import (
    DartsSkeleton,
    Place,
    Preprocess,
    Skeleton,
    image_input,
    in_layout,
    masked_image,
)
from mmnas_lab.types import InputError, InputInfos, Inputs, Output, OutputInfo

if TYPE_CHECKING:
    from mmnas_lab.search_space.cnn_cells.space import CnnCellSpace

DropPathOn = Literal["edges", "nodes"]
AUXILIARY = 768
"""Width of the auxiliary tower's output."""


class FoundCell(nn.Module):
    """One cell of a genotype; the nodes that it has are concatenated.

    Drop-path takes from a sample single edges, but never an identity (DARTS), or a node's sum, identity
    included (FairDARTS' released code).
    """

    def __init__(self, genotype: CellGenotype, place: Place, drop_path_on: DropPathOn) -> None:
        super().__init__()
        self.drop_path_on = drop_path_on
        self.preprocess = Preprocess(place, affine=True)
        self.nodes = genotype.live_nodes(2)
        self.ops = nn.ModuleDict(
            {
                str(state): nn.ModuleList(
                    DARTS_OPS[edge.op](place.channels, 2 if place.reduction and edge.input < 2 else 1)
                    for edge in node
                )
                for state, node in self.nodes.items()
            }
        )

    def forward(self, inputs: Sequence[Tensor], drop_path: float) -> Tensor:
        states: dict[int, Tensor] = dict(enumerate(self.preprocess(*inputs)))
        drop = drop_path if self.training else 0.0
        for state, node in self.nodes.items():
            ops: Any = self.ops[str(state)]
            terms = []
            for edge, op in zip(node, ops, strict=True):
                h = op(states[edge.input])
                if drop > 0 and self.drop_path_on == "edges" and not isinstance(op, nn.Identity):
                    h = h * kept(h, drop)
                terms.append(h)
            total = sum(terms[1:], terms[0])
            if drop > 0 and self.drop_path_on == "nodes":
                total = total * kept(total, drop)
            states[state] = total
        return torch.cat([states[state] for state in self.nodes], 1)


class FoundBench201Cell(nn.Module):
    """A cell of NAS-Bench-201: its last node. A node whose edges are all `none` is zero."""

    def __init__(self, genotype: CellGenotype, place: Place) -> None:
        super().__init__()
        self.nodes = [[edge for edge in node if edge.op != "none"] for node in genotype.nodes]
        self.ops = nn.ModuleList(
            nn.ModuleList(BENCH_201_OPS[edge.op](place.channels, 1) for edge in node) for node in self.nodes
        )

    def forward(self, inputs: Sequence[Tensor], drop_path: float) -> Tensor:
        states = list(inputs)
        for node, node_ops in zip(self.nodes, self.ops, strict=True):
            ops: Any = node_ops
            terms = [op(states[edge.input]) for edge, op in zip(node, ops, strict=True)]
            states.append(sum(terms[1:], terms[0]) if terms else torch.zeros_like(states[0]))
        return states[-1]


class AuxiliaryTower(nn.Module):
    """The output of the second reduction to a vector that an auxiliary classifier reads: (B, 768).

    ReLU, average pooling of 5 x 5 to 2 x 2 positions, a 1x1 and a 2x2 convolution with BatchNorm and ReLU,
    as in DARTS; its ImageNet form has no second BatchNorm. The stride of the pooling makes 2 positions of any
    size: 3 of 8 (CIFAR), 2 of 7 (ImageNet), as published.
    """

    def __init__(self, channels: int, size: tuple[int, int], second_norm: bool) -> None:
        super().__init__()
        if min(size) < 6:
            raise InputError(
                f"the auxiliary tower needs at least 6 x 6 positions at the second reduction, got "
                f"{size[0]} x {size[1]}; set search_space.auxiliary=false or take larger images"
            )
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, (size[0] - 5, size[1] - 5), count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, AUXILIARY, 2, bias=False),
            nn.BatchNorm2d(AUXILIARY) if second_norm else nn.Identity(),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)


class FoundNetwork(Network):
    """Stem, the genotype's cells, average pooling; in training also the tap `auxiliary` (B, 768).

    Args:
        space: the settings.
        genotype: the cells.
        inputs: one image.
        drop_path: probability that the last epoch comes near to.
    """

    def __init__(
        self, space: CnnCellSpace, genotype: CnnGenotype, inputs: InputInfos, drop_path: float
    ) -> None:
        super().__init__()
        self.image = image_input(inputs)
        self.modality = inputs[self.image].modality
        self.most_drop_path, self.drop_path = drop_path, 0.0

        def make(place: Place) -> tuple[nn.Module, int]:
            cell = genotype.cell(place.kind)
            if space.vocabulary == "nas_bench_201":
                return FoundBench201Cell(cell, place), place.channels
            return FoundCell(cell, place, space.drop_path_on), len(cell.live_nodes(2)) * place.channels

        channels = space.found_channels
        stem = channels if space.stem == "imagenet" else 3 * channels
        self.widths = (channels, space.stem_width(stem))
        self.skeleton: Skeleton = space.skeleton(
            inputs[self.image].shape,
            space.found_cells,
            channels,
            stem,
            make,
        )
        self.info = self.skeleton.info
        self.auxiliary: AuxiliaryTower | None = None
        if space.auxiliary:
            assert isinstance(self.skeleton, DartsSkeleton)
            self.auxiliary_at = self.skeleton.reductions[1]
            self.auxiliary = AuxiliaryTower(
                self.skeleton.widths[self.auxiliary_at],
                self.skeleton.last_size,
                second_norm=space.stem == "cifar",
            )
            self.info = OutputInfo(self.info.embedding, {**self.info.taps, "auxiliary": (AUXILIARY,)})

    def at_epoch(self, epoch: int, epochs: int) -> None:
        """Drop-path grows linearly and would reach its full value after the last epoch (DARTS)."""
        self.drop_path = self.most_drop_path * epoch / max(epochs, 1)

    def forward(self, inputs: Inputs, present: dict[str, Tensor] | None = None) -> Output:
        def run(kind: str, cell: nn.Module, states: Sequence[Tensor]) -> Tensor:
            return cell(states, self.drop_path)

        image = masked_image(inputs[self.image], present, self.modality)
        output, outputs = self.skeleton(in_layout(image, self.widths), run)
        if self.auxiliary is not None and self.training:
            output.taps["auxiliary"] = self.auxiliary(outputs[self.auxiliary_at])
        return output

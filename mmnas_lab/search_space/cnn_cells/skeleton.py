"""What surrounds the cells, in the supernet and in the found network alike: stem, reductions, pooling.

A skeleton is told how to make and how to run a cell; it knows neither alpha nor genotypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmnas_lab.search_space.cnn_cells.primitive_ops import FactorizedReduce, ReLUConvNorm
from mmnas_lab.types import InputError, InputInfos, Output, OutputInfo

Stem = Literal["cifar", "imagenet"]


@dataclass(frozen=True)
class Place:
    """Where a cell stands: its kind, its channels, and the channels of the two outputs that it reads.

    `halves` says that the earlier of them is twice as high and wide as the other.
    """

    kind: str
    channels: int
    in_channels: tuple[int, ...]
    reduction: bool = False
    halves: bool = False


MakeCell = Callable[[Place], tuple[nn.Module, int]]
"""A place to a cell and the number of its output's channels."""

RunCell = Callable[[str, nn.Module, Sequence[Tensor]], Tensor]
"""(kind, cell, inputs) -> output of a cell."""


class Skeleton(nn.Module, ABC):
    """Stem, cells and what lies between them; (B, 3, H, W) to an embedding (B, D) and taps.

    Attributes:
        info: D, and the taps `stage.0`, `stage.1`, `stage.2`: the output of the last cell at each resolution.
    """

    info: OutputInfo

    @abstractmethod
    def forward(self, image: Tensor, run: RunCell) -> tuple[Output, list[Tensor]]:
        """The output, and the outputs of all cells."""


class DartsSkeleton(Skeleton):
    """Each cell reads the two outputs before it; reductions stand at 1/3 and 2/3 of the depth.

    Args:
        shape: (channels, H, W) of an image.
        depth: number of cells, at least 3, else there is no normal cell.
        channels: C, of the first cells; doubled by each reduction.
        stem: `cifar` keeps the size, `imagenet` divides it by 8.
        stem_channels: of the stem's output.
        make: makes a cell.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        depth: int,
        channels: int,
        stem: Stem,
        stem_channels: int,
        make: MakeCell,
    ) -> None:
        super().__init__()
        if depth < 3:
            raise InputError(f"cnn_cells needs at least 3 cells, or there is no normal cell, got {depth}")
        size = check_size(shape, stem)
        self.reductions = (depth // 3, 2 * depth // 3)
        if stem == "cifar":
            stages = [nn.Sequential(convolution(shape[0], stem_channels, 1), nn.BatchNorm2d(stem_channels))]
        else:
            half = stem_channels // 2
            stages = [
                nn.Sequential(
                    convolution(shape[0], half, 2),
                    nn.BatchNorm2d(half),
                    nn.ReLU(),
                    convolution(half, stem_channels, 2),
                    nn.BatchNorm2d(stem_channels),
                ),
                nn.Sequential(
                    nn.ReLU(), convolution(stem_channels, stem_channels, 2), nn.BatchNorm2d(stem_channels)
                ),
            ]
        self.stem = nn.ModuleList(stages)
        cells: list[nn.Module] = []
        taps: dict[str, tuple[int, ...]] = {}
        before, last, halves = stem_channels, stem_channels, stem == "imagenet"
        self.widths: list[int] = []
        for k in range(depth):
            reduction = k in self.reductions
            if reduction:
                channels, size = 2 * channels, (size[0] // 2, size[1] // 2)
            place = Place("reduce" if reduction else "normal", channels, (before, last), reduction, halves)
            cell, width = make(place)
            cells.append(cell)
            before, last, halves = last, width, reduction
            taps[f"stage.{self._stage(k)}"] = (width, *size)
            self.widths.append(width)
        self.cells = nn.ModuleList(cells)
        self.info = OutputInfo(last, taps)
        self.last_size = size

    def _stage(self, k: int) -> int:
        return sum(k >= reduction for reduction in self.reductions)

    def forward(self, image: Tensor, run: RunCell) -> tuple[Output, list[Tensor]]:
        states = [self.stem[0](image)]
        states.append(self.stem[1](states[0]) if len(self.stem) > 1 else states[0])
        outputs: list[Tensor] = []
        taps: dict[str, Tensor] = {}
        for k, cell in enumerate(self.cells):
            kind = "reduce" if k in self.reductions else "normal"
            outputs.append(run(kind, cell, states))
            states = [states[1], outputs[-1]]
            taps[f"stage.{self._stage(k)}"] = outputs[-1]
        return Output(outputs[-1].mean((2, 3)), taps), outputs


class Bench201Skeleton(Skeleton):
    """NAS-Bench-201's: three stages of cells with one input, a residual block of stride 2 between them.

    Args:
        shape: (channels, H, W) of an image.
        depth: number of cells and residual blocks, 3 N + 2.
        channels: C, of the first stage.
        make: makes a cell.
    """

    def __init__(self, shape: tuple[int, ...], depth: int, channels: int, make: MakeCell) -> None:
        super().__init__()
        if depth < 5 or depth % 3 != 2:
            raise InputError(
                "nas_bench_201 has three stages of N cells and two residual blocks: set the number of cells "
                f"to 3 N + 2 (5, 8, 11, 14 or 17), got {depth}"
            )
        size = check_size(shape, "cifar")
        self.stem = nn.Sequential(convolution(shape[0], channels, 1), nn.BatchNorm2d(channels))
        stage = depth // 3
        self.reductions = (stage, 2 * stage + 1)
        cells: list[nn.Module] = []
        taps: dict[str, tuple[int, ...]] = {}
        for k in range(depth):
            if k in self.reductions:
                cells.append(ResidualBlock(channels, 2 * channels))
                channels, size = 2 * channels, (size[0] // 2, size[1] // 2)
            else:
                cells.append(make(Place("cell", channels, (channels,)))[0])
            taps[f"stage.{sum(k >= r for r in self.reductions)}"] = (channels, *size)
        self.cells = nn.ModuleList(cells)
        self.end = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.info = OutputInfo(channels, taps)

    def forward(self, image: Tensor, run: RunCell) -> tuple[Output, list[Tensor]]:
        h = self.stem(image)
        outputs: list[Tensor] = []
        taps: dict[str, Tensor] = {}
        for k, cell in enumerate(self.cells):
            h = cell(h) if k in self.reductions else run("cell", cell, [h])
            outputs.append(h)
            taps[f"stage.{sum(k >= r for r in self.reductions)}"] = h
        return Output(self.end(h).mean((2, 3)), taps), outputs


class ResidualBlock(nn.Module):
    """Two 3x3 ReLU-Conv-BatchNorm, the first of stride 2, beside an average pooling and a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.first = ReLUConvNorm(in_channels, channels, 3, stride=2)
        self.second = ReLUConvNorm(channels, channels, 3)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(in_channels, channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(self.first(x))


class Preprocess(nn.Module):
    """The outputs that a cell of DARTS reads, brought to its channels and to one size."""

    def __init__(self, place: Place, affine: bool) -> None:
        super().__init__()
        before, last = place.in_channels
        self.before: nn.Module = (
            FactorizedReduce(before, place.channels, affine)
            if place.halves
            else ReLUConvNorm(before, place.channels, 1, affine=affine)
        )
        self.last = ReLUConvNorm(last, place.channels, 1, affine=affine)

    def forward(self, before: Tensor, last: Tensor) -> list[Tensor]:
        return [self.before(before), self.last(last)]


def convolution(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
    """A 3x3 convolution without bias."""
    return nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)


def check_size(shape: tuple[int, ...], stem: Stem) -> tuple[int, int]:
    """Height and width at the first cells; refused where a reduction would meet an odd size.

    Raises:
        InputError: with the next sizes that fit.
    """
    unit = 4 if stem == "cifar" else 32
    height, width = shape[1:]
    # Two strides of the ImageNet stem round up; what they leave must be a multiple of 8.
    fits = all(size % 4 == 0 if stem == "cifar" else -(-size // 4) % 8 == 0 for size in (height, width))
    if not fits or min(height, width) < unit:
        near = sorted({max(unit, size // unit * unit) for size in (height, width)})
        above = sorted({-(-size // unit) * unit for size in (height, width)})
        names = " or ".join(str(size) for size in sorted({*near, *above}))
        raise InputError(
            f"images of {height} x {width} cannot be halved as often as cnn_cells does with the {stem} stem: "
            f"height and width must be multiples of {unit}; resize or pad them to {names}"
        )
    return (height, width) if stem == "cifar" else (-(-height // 8), -(-width // 8))


def image_input(inputs: InputInfos) -> str:
    """The name of the one input that is an image.

    Raises:
        InputError: no image, or more inputs than one.
    """
    images = [name for name, info in inputs.items() if len(info.shape) == 3]
    if len(inputs) != 1 or len(images) != 1:
        got = ", ".join(f"{name} {info.shape}" for name, info in inputs.items()) or "nothing"
        raise InputError(
            f"cnn_cells reads one image of (channels, height, width), got {got}; choose an image dataset and "
            "no backbone, or search_space=fusion for features"
        )
    return images[0]


def masked_image(image: Tensor, present: dict[str, Tensor] | None, modality: str) -> Tensor:
    """The image, with the samples that miss it set to zero, the mean of standardised pixels."""
    if present is None or modality not in present:
        return image
    return image * present[modality].view(-1, 1, 1, 1).to(image.dtype)


def in_layout(image: Tensor, widths: Sequence[int]) -> Tensor:
    """The image in the order in memory that its network computes fastest in.

    On a CPU that is channels last, about twice as fast, but only where every convolution has a multiple of 16
    channels: with others torch 2.15 has been seen to write past the end of its memory there.

    Args:
        image: (B, 3, H, W).
        widths: channels that the network's convolutions are multiples of.
    """
    if image.device.type == "cpu" and all(width % 16 == 0 for width in widths):
        return image.contiguous(memory_format=torch.channels_last)
    return image

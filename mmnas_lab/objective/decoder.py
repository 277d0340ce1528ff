"""From a network's output back to its inputs: decoders of images, and of pooled features."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab.objective.synced_norm import SyncedBatchNorm
from mmnas_lab.types import InputError, InputInfos, Inputs, Output, OutputInfo

Kind = Literal["hierarchical", "plain"]


class ImageDecoder(nn.Module):
    """Images from the levels of a CNN, coarse to fine.

    Hierarchical: each level by a 1x1 convolution to a common width, the coarser sum upsampled bilinearly and
    added; then a 3x3 convolution, BatchNorm and ReLU at the finest level, and a 1x1 convolution to pixels.
    Plain: the same, but of all levels the coarsest alone is read. MAE-NAS (arXiv 2311.12086) names both and
    prints neither's layers. Where the finest level is smaller than the image by a factor s, each of its
    positions gives s x s pixels.

    Args:
        output: taps of shape (C_l, H_l, W_l).
        inputs: images (C, H, W).
        kind: `hierarchical` or `plain`.
        width: channels of the decoder.

    Raises:
        InputError: no tap of such a shape, or sizes that do not divide the images.
    """

    def __init__(self, output: OutputInfo, inputs: InputInfos, kind: Kind, width: int) -> None:
        super().__init__()
        maps = {name: shape for name, shape in output.taps.items() if len(shape) == 3}
        if not maps:
            raise InputError(
                "masked_reconstruction decodes images from feature maps (C, H, W) of the network, and this "
                f"one gives {output.taps or 'none'}; choose a search space on pixels, or another objective"
            )
        levels = sorted(maps, key=lambda name: maps[name][1] * maps[name][2])  # coarsest first
        self.size = maps[levels[-1]][1:]
        self.levels = levels[:1] if kind == "plain" else levels
        self.factors = {name: self._factor(name, info.shape) for name, info in inputs.items()}
        self.laterals = nn.ModuleList(nn.Conv2d(maps[name][0], width, 1) for name in self.levels)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), SyncedBatchNorm(width), nn.ReLU(inplace=True)
        )
        self.heads = nn.ModuleList(
            nn.Conv2d(width, info.shape[0] * self.factors[name] ** 2, 1) for name, info in inputs.items()
        )

    def _factor(self, name: str, shape: tuple[int, ...]) -> int:
        factor = shape[1] // self.size[0]
        if factor == 0 or shape[1:] != tuple(factor * side for side in self.size):
            raise InputError(
                f"masked_reconstruction needs images that are a whole multiple of the network's finest map, "
                f"{self.size[0]} x {self.size[1]}; '{name}' is {shape[1]} x {shape[2]}"
            )
        return factor

    def forward(self, output: Output) -> Inputs:
        """Each image (B, C, H, W) by name."""
        sums: Tensor | None = None
        for name, lateral in zip(self.levels, self.laterals, strict=True):
            level = lateral(output.taps[name])
            sums = level if sums is None else level + resized(sums, level.shape[-2:])
        assert sums is not None
        pixels = self.smooth(resized(sums, torch.Size(self.size)))
        return {
            name: F.pixel_shuffle(head(pixels), factor)
            for (name, factor), head in zip(self.factors.items(), self.heads, strict=True)
        }


def resized(maps: Tensor, size: torch.Size) -> Tensor:
    """Maps (B, C, H, W) at another size, bilinearly."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


class FeatureDecoder(nn.Module):
    """Pooled features from a network's embedding and taps.

    Plain: the embedding alone, by a hidden layer and a linear layer for each feature. Hierarchical: the
    embedding is the coarsest level, given to all positions, to which each tap is added by a linear layer for
    each position; after a ReLU, a feature of as many positions is read off position by position, any other
    off all positions together. Ours: no paper reconstructs fused features. Both read the embedding, so that
    every parameter of the network has a gradient.

    Args:
        output: D, and taps of shape (C_t, L) or (C_t,), which is (C_t, 1).
        inputs: features (C_i, L_i), or (C_i,).
        kind: `hierarchical` or `plain`.
        width: of the hidden layer.

    Raises:
        InputError: a hierarchical decoder and no taps, or taps of several lengths.
    """

    def __init__(self, output: OutputInfo, inputs: InputInfos, kind: Kind, width: int) -> None:
        super().__init__()
        taps = {name: (*shape, 1)[:2] for name, shape in output.taps.items() if len(shape) < 3}
        lengths = {length for _, length in taps.values()}
        if kind == "hierarchical" and len(lengths) != 1:
            raise InputError(
                "objective.decoder=hierarchical needs taps of one length beside the embedding, and this "
                f"network gives {output.taps or 'none'}; set objective.decoder=plain"
            )
        self.taps = list(taps) if kind == "hierarchical" else []
        self.length = lengths.pop() if kind == "hierarchical" else 1
        self.shapes = {name: info.shape for name, info in inputs.items()}
        self.top = nn.Linear(output.embedding, width)
        self.laterals = nn.ModuleList(nn.Linear(taps[name][0], width) for name in self.taps)
        self.aligned = {name: (*shape, 1)[1] == self.length for name, shape in self.shapes.items()}
        self.heads = nn.ModuleList(
            nn.Linear(width, shape[0])
            if self.aligned[name]
            else nn.Linear(self.length * width, torch.Size(shape).numel())
            for name, shape in self.shapes.items()
        )

    def forward(self, output: Output) -> Inputs:
        """Each feature (B, C_i, L_i) by name."""
        h = self.top(output.embedding)[:, None].expand(-1, self.length, -1)  # (B, L, width)
        for name, lateral in zip(self.taps, self.laterals, strict=True):
            tap = output.taps[name]
            h = h + lateral(tap.reshape(*tap.shape[:2], self.length).transpose(1, 2))
        h = torch.relu(h)
        return {
            name: (head(h).transpose(1, 2) if self.aligned[name] else head(h.flatten(1))).reshape(-1, *shape)
            for (name, shape), head in zip(self.shapes.items(), self.heads, strict=True)
        }

"""RaMLP (Lai et al., IJCAI 2023): MLPs across regions of a map, in four stages of halved size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from timm.layers.weight_init import trunc_normal_
from timm.models.metaformer import StarReLU
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import conv2d

from mmnas_lab.search_space.mixers.encoder import Encoder, Protocol, map_shape
from mmnas_lab.types import InputError

MOST_REGIONS = (8, 4, 2, 1)
"""Regions a side in the published stages."""
SCALED = (False, False, True, True)
"""Stages whose residuals have learned scales."""
norm_layer = partial(nn.LayerNorm, eps=1e-6)


class Convolution(nn.Conv2d):
    """A convolution of maps that have their channels last, (B, H, W, C)."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.permute(0, 3, 1, 2)
        return conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups).permute(
            0, 2, 3, 1
        )


class ChannelNorm(nn.BatchNorm2d):
    """BatchNorm of maps that have their channels last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RegionMixing(nn.Module):
    """Regions of a map mixed by one matrix, times a gate: (B, H, W, D) to the same shape.

    The map is cut into R x R regions; the values of `head` channels at one offset of all regions make a
    vector of size q = R^2 head, which is divided by q and multiplied by a (q, q) matrix.

    Args:
        width: D.
        expanded: width in which is mixed.
        regions: R, divides H and W.
        head: channels that are mixed together; divides `expanded`.
    """

    def __init__(self, width: int, expanded: int, regions: int, head: int) -> None:
        super().__init__()
        self.regions, self.head = regions, head
        self.expand = nn.Linear(width, expanded, bias=False)
        self.near = Convolution(expanded, expanded, 5, padding=2, groups=expanded, bias=False)
        mixed = regions**2 * head
        self.mix = nn.Linear(mixed, mixed, bias=False)
        self.norm = ChannelNorm(expanded)
        self.gate = nn.Linear(width, expanded, bias=False)
        self.gate_norm = ChannelNorm(expanded)
        self.project = nn.Linear(expanded, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm(self.across_regions(self.near(self.expand(x))))
        return self.project(mixed * self.gate_norm(self.gate(x)))

    def across_regions(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        batch, height, side, channels = x.shape
        r, head = self.regions, self.head
        x = x.reshape(batch, r, height // r, r, side // r, channels // head, head)
        x = x.permute(0, 2, 4, 5, 6, 1, 3)  # (B, H/R, W/R, C/head, head, R, R)
        mixed = self.mix(x.flatten(4) / self.mix.in_features).view(x.shape)
        return mixed.permute(0, 5, 1, 6, 2, 3, 4).reshape(batch, height, side, channels)


class RaBlock(nn.Module):
    """A depthwise convolution, region mixing and a channel MLP, each on a residual."""

    def __init__(
        self, width: int, mlp_ratio: int, expansion: int, regions: int, head: int, scaled: bool
    ) -> None:
        super().__init__()
        self.near = Convolution(width, width, 3, padding=1, groups=width, bias=False)
        self.norm1, self.norm2 = norm_layer(width), norm_layer(width)
        self.mixing = RegionMixing(width, expansion * width, regions, head)
        self.channels = nn.Sequential(
            nn.Linear(width, mlp_ratio * width, bias=False),
            StarReLU(),
            nn.Linear(mlp_ratio * width, width, bias=False),
        )
        self.scale1: Parameter | None = Parameter(torch.ones(width)) if scaled else None
        self.scale2: Parameter | None = Parameter(torch.ones(width)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.near(x)
        x = (x if self.scale1 is None else x * self.scale1) + self.mixing(self.norm1(x))
        return (x if self.scale2 is None else x * self.scale2) + self.channels(self.norm2(x))


class RaMLP(Encoder):
    """Four stages of blocks on a map; the positions of the last one are the tokens.

    The released code of MixMAS averages them over the height, so that a token is a column.

    Args:
        shape: (C, H, W) of one sample.
        kind: `image` or `audio`.
        depths: blocks of the four stages.
        widths: D of the four stages.
        mlp_ratios: hidden widths of the channel MLPs, in multiples of D.
        expansions: widths in which regions are mixed, in multiples of D.
        regions: regions a side in each stage; null for the largest that fit, at most 8, 4, 2 and 1.
        heads: channels that are mixed together in each stage.
        protocol: of the tokens.

    Raises:
        InputError: an input that is no map, or settings that do not divide it.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: str,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        mlp_ratios: Sequence[int] = (4, 4, 3, 3),
        expansions: Sequence[int] = (3, 3, 2, 2),
        regions: Sequence[int] | None = None,
        heads: Sequence[int] = (1, 4, 16, 64),
        protocol: Protocol = "intended",
    ) -> None:
        super().__init__()
        channels, *sides = map_shape(shape, kind)
        each = {"depths": depths, "widths": widths, "mlp_ratios": mlp_ratios, "expansions": expansions}
        for name, values in {**each, "heads": heads, "regions": regions or MOST_REGIONS}.items():
            if len(values) != 4 or min(values) < 1:
                raise InputError(
                    f"RaMLP's {name} are 4 numbers of at least 1, one a stage, got {list(values)}"
                )
        self.columns = protocol == "released_code"
        self.stages = nn.ModuleList()
        for k, width in enumerate(widths):
            # The stem's 7 x 7 convolution has stride 4 and padding 2, the others stride 2 and padding 1.
            sides = [(side - 3) // 4 + 1 if k == 0 else (side - 1) // 2 + 1 for side in sides]
            if min(sides) < 1:
                raise InputError(f"RaMLP reads maps of at least 3 x 3, got {kind} of shape {shape}")
            count = _regions(k, sides, regions)
            if expansions[k] * width % heads[k]:
                raise InputError(
                    f"RaMLP's stage {k} mixes {expansions[k] * width} channels, which heads of {heads[k]} do "
                    "not divide; set heads to divisors"
                )
            if k == 0:
                down = [Convolution(channels, width, 7, 4, 2), norm_layer(width)]
            else:
                down = [norm_layer(widths[k - 1]), Convolution(widths[k - 1], width, 3, 2, 1)]
            blocks = (
                RaBlock(width, mlp_ratios[k], expansions[k], count, heads[k], SCALED[k])
                for _ in range(depths[k])
            )
            self.stages.append(nn.Sequential(*down, *blocks))
        self.norm = norm_layer(widths[-1])
        self.size = (sides[1] if self.columns else sides[0] * sides[1], widths[-1])
        self.apply(_initialise)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x.mean(1) if self.columns else x.flatten(1, 2))


def _regions(stage: int, sides: Sequence[int], regions: Sequence[int] | None) -> int:
    """Regions a side of a stage. Raises InputError where those that are set do not divide the map."""
    common = math.gcd(*sides)
    if regions is None:
        return max(count for count in range(1, MOST_REGIONS[stage] + 1) if common % count == 0)
    if common % regions[stage]:
        raise InputError(
            f"RaMLP's stage {stage} has {sides[0]} x {sides[1]} positions, which cannot be cut into "
            f"{regions[stage]} x {regions[stage]} regions; set regions[{stage}] to a divisor of both, or "
            "regions to null"
        )
    return regions[stage]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

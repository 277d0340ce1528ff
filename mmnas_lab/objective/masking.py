"""Masks of an input: which parts it has, which of them are hidden, and what stands there instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mmnas_lab.types import InputError

Unit = Literal["patch", "channel", "input"]
Fill = Literal["zero", "mean", "learned", "noise"]


class Units:
    """How one input is cut into U units of n values each, which are masked and scored as a whole.

    `patch` cuts an image (C, H, W) into squares, row by row, and a pooled feature (C, L) into runs of
    positions; a unit holds all channels there. `channel` makes each channel a unit, `input` the whole input
    one.

    Args:
        name: of the input, for messages.
        shape: of one sample: (C, H, W), (C, L), or (C,), which is (C, 1).
        unit: what is masked as a whole.
        patch: side of the square in pixels, or length of the run; used by `patch` alone.

    Attributes:
        count: U.
        size: n.

    Raises:
        InputError: a patch size that does not divide the input.
    """

    def __init__(self, name: str, shape: tuple[int, ...], unit: Unit, patch: int) -> None:
        if patch < 1:
            raise InputError(f"objective.patch must be at least 1, got {patch}")
        self.shape = shape
        self.channels, spatial = shape[0], shape[1:] or (1,)
        if unit == "patch" and any(side % patch for side in spatial):
            fitting = [p for p in range(1, min(spatial) + 1) if not any(side % p for side in spatial)]
            raise InputError(
                f"objective.patch={patch} does not divide '{name}' of {' x '.join(map(str, spatial))} "
                f"positions; choose one of {', '.join(map(str, fitting))}"
            )
        self.grid, self.cut = {
            "patch": (tuple(side // patch for side in spatial), tuple(patch for _ in spatial)),
            "channel": ((1,) * len(spatial), spatial),
            "input": ((1,) * len(spatial), spatial),
        }[unit]
        self.by_channel = unit == "channel"
        values = self.channels * torch.Size(spatial).numel()
        self.count = self.channels if self.by_channel else torch.Size(self.grid).numel()
        self.size = values // self.count

    def split(self, values: Tensor) -> Tensor:
        """(B, *shape) to (B, U, n); within a patch the values are ordered by row, column, then channel."""
        if self.by_channel:
            return values.reshape(len(values), self.count, self.size)
        # (B, C, g_1, p_1, g_2, p_2, ...) to (B, g_1, g_2, ..., p_1, p_2, ..., C)
        axes = [side for pair in zip(self.grid, self.cut, strict=True) for side in pair]
        parted = values.reshape(len(values), self.channels, *axes)
        grid, within = range(2, parted.ndim, 2), range(3, parted.ndim, 2)
        return parted.permute(0, *grid, *within, 1).reshape(len(values), self.count, self.size)

    def join(self, units: Tensor) -> Tensor:
        """(B, U, n) back to (B, *shape)."""
        if self.by_channel:
            return units.reshape(len(units), *self.shape)
        sides = len(self.grid)
        parted = units.reshape(len(units), *self.grid, *self.cut, self.channels)
        pairs = [axis for k in range(sides) for axis in (1 + k, 1 + sides + k)]
        return parted.permute(0, parted.ndim - 1, *pairs).reshape(len(units), *self.shape)

    def expand(self, mask: Tensor) -> Tensor:
        """A mask (B, U) of units as a mask (B, *shape) of values."""
        return self.join(mask[..., None].expand(-1, -1, self.size))


def masked_count(ratio: float, units: int, unit: Unit) -> int:
    """How many of the units of a sample are hidden: the nearest whole number to ratio * units.

    Rounded, not cut off: 0.9 of 50 is 45 whatever the product is in floating point.

    Raises:
        InputError: a ratio outside (0, 1), or one that hides none or all of so few units.
    """
    count = int(ratio * units + 0.5)
    if not 0 < ratio < 1 or not 0 < count < units:
        raise InputError(
            f"objective.mask_ratio={ratio:g} hides {min(max(count, 0), units)} of {units} units ({unit}); "
            "it must lie between 0 and 1, and at least one unit must be hidden and one be seen"
        )
    return count


def draw_masks(
    samples: int, units: int, hidden: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """A fresh mask for each sample, uniform over all masks that hide exactly so many units.

    Args:
        samples: B.
        units: U.
        hidden: units to hide in each sample.
        device: of the masks.
        generator: on the CPU; None draws from torch's own state on the device, which a fit reseeds at every
            step by its address.

    Returns:
        (B, U) bool, True where hidden.
    """
    noise = torch.rand(samples, units, generator=generator, device=None if generator else device).to(device)
    first = noise.argsort(1)[:, :hidden]
    return torch.zeros(samples, units, dtype=torch.bool, device=device).scatter(1, first, True)


def draw_noise(inputs: Mapping[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Standard normal values in the shapes of the inputs, drawn as `draw_masks` draws."""
    return {
        name: torch.randn(
            values.shape, generator=generator, device=None if generator else values.device, dtype=values.dtype
        ).to(values.device)
        for name, values in inputs.items()
    }


def visible_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the visible values of each channel of each sample, (B, C, 1, ...); 0 where none is visible.

    Args:
        values: (B, C, ...).
        mask: of the same shape, True where hidden.
    """
    flat, visible = values.flatten(1).view(*values.shape[:2], -1), ~mask.view(*mask.shape[:2], -1)
    means = (flat * visible).sum(-1) / visible.sum(-1).clamp(min=1)
    return means.view(*values.shape[:2], *[1] * (values.ndim - 2))


def normalised(units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each unit with mean 0 and variance 1 over its own values (MAE's per-patch normalisation).

    Args:
        units: (B, U, n), n of at least 2.

    Returns:
        The normalised units, their means and their stds (B, U, 1); the variance is unbiased, plus 1e-6.
    """
    mean = units.mean(-1, keepdim=True)
    std = (units.var(-1, keepdim=True) + 1e-6).sqrt()
    return (units - mean) / std, mean, std

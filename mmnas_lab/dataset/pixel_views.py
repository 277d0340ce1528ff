"""Random views of whole batches of pictures on their device; every sample has its own draws."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmnas_lab.types import InputError

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey value (ITU-R 601, as in PIL)."""


class PixelViews:
    """Views of pictures: crop, flip, colours, grey, solarise, normalise, cutout, in this order.

    Args:
        crop_padding: pad with black by so many pixels and crop at random (DARTS, CIFAR: 4).
        least_area: crop a part of this share of the area to all of it, aspect 3/4 to 4/3, and resize it
            (SimCLR on CIFAR: 0.2); 1 crops nothing.
        flip: mirror left and right with probability 0.5.
        jitter: strength of brightness, contrast and saturation (factors of 1 +- 0.8 * jitter) and hue
            (+- 0.2 * jitter), with probability 0.8; SimCLR's CIFAR set is 0.5.
        grey: probability of a grey picture.
        solarise: probability that values above a half are inverted; in the second view of a pair only.
        cutout: side of the square that is set to the mean (DARTS, CIFAR: 16); 0 cuts nothing.

    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        crop_padding: int = 0,
        least_area: float = 1.0,
        flip: bool = False,
        jitter: float = 0.0,
        grey: float = 0.0,
        solarise: float = 0.0,
        cutout: int = 0,
    ) -> None:
        for name, value, low, high in (
            ("crop_padding", crop_padding, 0, 1 << 16),
            ("least_area", least_area, 0.01, 1),
            ("jitter", jitter, 0, 1.25),
            ("grey", grey, 0, 1),
            ("solarise", solarise, 0, 1),
            ("cutout", cutout, 0, 1 << 16),
        ):
            if not low <= value <= high:
                raise InputError(f"pixel_views.{name} must be in [{low}, {high}], got {value}")
        self.crop_padding, self.least_area, self.flip = crop_padding, least_area, flip
        self.jitter, self.grey, self.solarise, self.cutout = jitter, grey, solarise, cutout

    def __call__(
        self, images: Tensor, mean: Tensor, std: Tensor, generator: torch.Generator, second: bool = False
    ) -> Tensor:
        """A view of each picture.

        Args:
            images: (B, 3, H, W) uint8, or (B, 1, H, W) grey ones, which colours do not change.
            mean: of values in [0, 1] by channel.
            std: of values in [0, 1] by channel.
            generator: source of all randomness, on any device.
            second: whether this is the second view of a pair.

        Returns:
            float32 of the same shape, normalised.
        """
        draw = _Draw(len(images), generator, images.device)
        if self.crop_padding or self.flip:
            images = self._shifted(images, draw)
        pixels = images.float().div_(255)
        if self.least_area < 1:
            pixels = self._resized(pixels, draw)
        if self.jitter:
            pixels = self._jittered(pixels, draw)
        if self.grey:
            pixels = chosen(draw.uniform() < self.grey, to_grey(pixels).expand_as(pixels), pixels)
        if self.solarise and second:
            pixels = chosen(
                draw.uniform() < self.solarise, torch.where(pixels < 0.5, pixels, 1 - pixels), pixels
            )
        pixels = normalised(pixels, mean, std)
        return self._cut(pixels, draw) if self.cutout else pixels

    def settings(self) -> dict[str, Any]:
        """Everything that decides the distribution of views."""
        return {"family": "pixels", "version": 1, **vars(self)}

    def _shifted(self, images: Tensor, draw: _Draw) -> Tensor:
        """A window of the padded picture, mirrored or not, by one gather."""
        _, _, height, width = images.shape
        p = self.crop_padding
        top, left = draw.integers(2 * p + 1), draw.integers(2 * p + 1)
        rows = top[:, None] + torch.arange(height, device=images.device)  # (B, H)
        columns = left[:, None] + torch.arange(width, device=images.device)  # (B, W)
        if self.flip:
            columns = torch.where((draw.uniform() < 0.5)[:, None], columns.flip(1), columns)
        padded = F.pad(images, (p, p, p, p)).movedim(1, 3)  # (B, H + 2p, W + 2p, 3)
        sample = torch.arange(len(images), device=images.device)[:, None, None]
        return padded[sample, rows[:, :, None], columns[:, None, :]].movedim(3, 1)

    def _resized(self, pixels: Tensor, draw: _Draw) -> Tensor:
        """A part of the picture, resized to all of it (bilinear)."""
        area = self.least_area + (1 - self.least_area) * draw.uniform()
        aspect = torch.exp((2 * draw.uniform() - 1) * float(torch.log(torch.tensor(4 / 3))))
        width, height = ((area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1))
        theta = pixels.new_zeros(len(pixels), 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = width, height
        theta[:, 0, 2] = (2 * draw.uniform() - 1) * (1 - width)
        theta[:, 1, 2] = (2 * draw.uniform() - 1) * (1 - height)
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    def _jittered(self, pixels: Tensor, draw: _Draw) -> Tensor:
        """Brightness, contrast, saturation, hue, as torchvision computes them."""
        jittered = pixels
        factors = [1 + 0.8 * self.jitter * (2 * draw.uniform() - 1) for _ in range(3)]
        shift = 0.2 * self.jitter * (2 * draw.uniform() - 1)
        for change, factor in zip((brightness, contrast, saturation), factors, strict=True):
            jittered = change(jittered, factor)
        return chosen(draw.uniform() < 0.8, hue(jittered, shift), pixels)

    def _cut(self, pixels: Tensor, draw: _Draw) -> Tensor:
        """A square around a random centre set to 0, clipped at the border (DeVries & Taylor 2017)."""
        _, _, height, width = pixels.shape

        def outside(size: int) -> Tensor:
            start = draw.integers(size)[:, None] - self.cutout // 2
            places = torch.arange(size, device=pixels.device)
            return (places < start) | (places >= start + self.cutout)  # (B, size)

        return pixels * (outside(height)[:, None, :, None] | outside(width)[:, None, None, :])


class _Draw:
    """Draws for B samples, made where the generator lives."""

    def __init__(self, batch: int, generator: torch.Generator, device: torch.device) -> None:
        self.batch, self.generator, self.device = batch, generator, device

    def uniform(self) -> Tensor:
        return torch.rand(self.batch, generator=self.generator, device=self.generator.device).to(self.device)

    def integers(self, end: int) -> Tensor:
        drawn = torch.randint(end, (self.batch,), generator=self.generator, device=self.generator.device)
        return drawn.to(self.device)


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] less the mean, over the deviation, by channel."""
    return (pixels - mean[:, None, None]) / std[:, None, None]


def chosen(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """One of two pictures for each sample, by (B,) bool."""
    return torch.where(condition[:, None, None, None], yes, no)


def to_grey(pixels: Tensor) -> Tensor:
    """(B, 1, H, W) grey values."""
    if pixels.shape[1] == 1:
        return pixels
    return torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(GREY))[:, None]


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Times (B,) factors, within [0, 1]."""
    return (pixels * factor[:, None, None, None]).clamp(0, 1)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Away from the mean grey value by (B,) factors, within [0, 1]."""
    return _away(pixels, to_grey(pixels).mean((2, 3), keepdim=True), factor)


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Away from the grey picture by (B,) factors, within [0, 1]."""
    return _away(pixels, to_grey(pixels), factor)


def _away(pixels: Tensor, origin: Tensor, factor: Tensor) -> Tensor:
    return (origin + factor[:, None, None, None] * (pixels - origin)).clamp(0, 1)


def hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Hues turned by (B,) shifts in turns, at the same saturation and value (HSV)."""
    if pixels.shape[1] == 1:
        return pixels
    value, brightest = pixels.max(1)  # (B, H, W)
    chroma = value - pixels.amin(1)
    red, green, blue = pixels.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.stack([(green - blue) / safe % 6, (blue - red) / safe + 2, (red - green) / safe + 4])
    turned = sector.gather(0, brightest[None])[0] + 6 * shift[:, None, None]  # in sixths of a turn
    # A colour with chroma c and value v has channel v - c * clamp(min(k, 4 - k), 0, 1), k = (n + hue) mod 6.
    channels = []
    for n in (5, 3, 1):
        k = (n + turned) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)

"""Label-free views of arrays: spectrograms, series, skeletons, tabular features and videos."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mmnas_lab.dataset.views import checked_strength
from mmnas_lab.types import InputError

Sample = NDArray[np.float32]

WARP_KNOTS = 4
"""Pieces of a series, each of which a time warp stretches or shortens."""


class AudioViews:
    """Views of a spectrogram (1, F, T) in [0, 1]: shift in time, noise, masked times and frequencies.

    At strength 1 the spectrogram is shifted by at most a tenth of its length, silence following; Gaussian
    noise of deviation 0.05 is added; and one span of times and one of frequencies, each at most a fifth of
    all, are set to the mean (SpecAugment, Park et al. 2019).

    Args:
        strength: factor of all these; 0 leaves spectrograms unchanged.

    Raises:
        InputError: a negative strength.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = checked_strength("AudioViews", strength)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        if self.strength == 0:
            return sample
        draw = _Draw(generator)
        _, frequencies, times = sample.shape
        mean = sample.mean()
        view = np.full_like(sample, sample.min())
        by = round(min(0.1 * self.strength, 0.9) * times * draw.symmetric())
        view[..., max(by, 0) : times + min(by, 0)] = sample[..., max(-by, 0) : times - max(by, 0)]
        view = (view + 0.05 * self.strength * draw.normal(*sample.shape)).clip(0, 1)
        view[..., draw.span(times, 0.2 * self.strength)] = mean
        view[:, draw.span(frequencies, 0.2 * self.strength)] = mean
        return view

    def settings(self) -> dict[str, Any]:
        return {"family": "audio", "version": 1, "strength": self.strength}


class SeriesViews:
    """Views of a series (T, F): a crop, resized and warped in time, scaled by feature, with noise.

    At strength 1 a part of 0.6 to all of the series is resized to its length, its quarters in time being
    stretched by exp(0.3 z); each feature is multiplied by exp(0.1 z); and noise of a tenth of the feature's
    own deviation is added, so that a constant feature stays so up to its scale (Um et al. 2017).

    Args:
        strength: factor of all these; 0 leaves series unchanged.

    Raises:
        InputError: a negative strength.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = checked_strength("SeriesViews", strength)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        if self.strength == 0:
            return sample
        draw = _Draw(generator)
        view = _at(sample, _warped_times(len(sample), self.strength, draw))
        view = view * draw.factors(0.1 * self.strength, 1, sample.shape[1])
        noise = 0.1 * self.strength * sample.std(axis=0) * draw.normal(*sample.shape)
        return _finite(view + noise)

    def settings(self) -> dict[str, Any]:
        return {"family": "series", "version": 1, "strength": self.strength}


class SkeletonViews:
    """Views of a skeleton (T, J, 3): turned about the vertical, scaled, warped in time, with noise.

    At strength 1 the turn is at most 30 degrees to either side, the same for all frames; the size is
    multiplied by exp(0.1 z); a part of 0.6 to all of the frames is resized and warped as by `SeriesViews`;
    and noise of a fiftieth of the deviation of all places is added.

    Args:
        strength: factor of all these; 0 leaves skeletons unchanged.
        vertical: axis of the vertical, 0 to 2; a Kinect's is 1.

    Raises:
        InputError: a negative strength, or another axis.
    """

    def __init__(self, strength: float = 1.0, vertical: int = 1) -> None:
        self.strength = checked_strength("SkeletonViews", strength)
        if vertical not in (0, 1, 2):
            raise InputError(f"SkeletonViews needs vertical to be 0, 1 or 2, got {vertical}; a Kinect's is 1")
        self.vertical = vertical

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        if self.strength == 0:
            return sample
        draw = _Draw(generator)
        angle = min(self.strength * np.pi / 6, np.pi) * draw.symmetric()
        view = _at(sample, _warped_times(len(sample), self.strength, draw)) @ turn(angle, self.vertical).T
        view = view * draw.factors(0.1 * self.strength, 1)
        return _finite(view + 0.02 * self.strength * sample.std() * draw.normal(*sample.shape))

    def settings(self) -> dict[str, Any]:
        return {"family": "skeleton", "version": 1, "strength": self.strength, "vertical": self.vertical}


class TabularViews:
    """Views of features (F,): some are replaced by those of other samples (SCARF, Bahri et al. 2022).

    At strength 1 each feature is replaced with probability 0.3 by its value in a sample that was given to
    `fit`, a sample of its own for each feature. Without `fit` it is set to 0 instead, the mean of
    standardised features, and noise of deviation 0.1 is added to the others.

    Args:
        strength: factor of the probability and the noise; 0 leaves features unchanged.

    Raises:
        InputError: a negative strength.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = checked_strength("TabularViews", strength)
        self._reference: NDArray[np.float32] | None = None

    def fit(self, samples: Iterable[Sample]) -> None:
        """Take the training samples, without labels, as those that features are replaced from.

        Raises:
            InputError: no sample.
        """
        found = list(samples)
        if not found:
            raise InputError("TabularViews.fit needs at least one sample, got none")
        self._reference = np.stack(found)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        if self.strength == 0:
            return sample
        draw = _Draw(generator)
        replaced = draw.uniform(len(sample)) < min(0.3 * self.strength, 1.0)
        if self._reference is None:
            noise = 0.1 * self.strength * draw.normal(len(sample))
            return _finite(np.where(replaced, 0, sample + noise))
        rows = (draw.uniform(len(sample)) * len(self._reference)).astype(np.int64)
        others = self._reference[rows.clip(max=len(self._reference) - 1), np.arange(len(sample))]
        return np.where(replaced, others, sample)

    def settings(self) -> dict[str, Any]:
        reference = None
        if self._reference is not None:
            reference = hashlib.blake2b(self._reference.tobytes(), digest_size=16).hexdigest()
        return {"family": "tabular", "version": 1, "strength": self.strength, "reference": reference}


class VideoViews:
    """Views of a video (T, H, W) in [0, 1]: a crop in time and space, resized to all of it, with noise.

    At strength 1 a part of 0.6 to all of the frames and of height and width is kept, with one share for
    height and width; Gaussian noise of deviation 0.05 is added.

    Args:
        strength: factor of all these; 0 leaves videos unchanged.
        flip: mirror left and right with probability 0.5 times the strength, at most 0.5. Off, because
            actions of the left and the right hand would be one.

    Raises:
        InputError: a negative strength.
    """

    def __init__(self, strength: float = 1.0, flip: bool = False) -> None:
        self.strength = checked_strength("VideoViews", strength)
        self.flip = flip

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        if self.strength == 0:
            return sample
        draw = _Draw(generator)
        least, shape = _least_part(self.strength), sample.shape
        time, space = (least + (1 - least) * draw.uniform(1).item() for _ in range(2))
        lengths = [max(1, round(part * n)) for part, n in zip((time, space, space), shape, strict=True)]
        starts = [int(draw.uniform(1).item() * (n - k + 1)) for n, k in zip(shape, lengths, strict=True)]
        part = sample[tuple(slice(s, s + k) for s, k in zip(starts, lengths, strict=True))]
        tensor = torch.from_numpy(np.ascontiguousarray(part))[None, None]
        view = F.interpolate(tensor, shape, mode="trilinear", align_corners=False)[0, 0].numpy()
        mirrored = draw.uniform(1).item() < 0.5 * min(self.strength, 1.0)
        if self.flip and mirrored:
            view = view[..., ::-1]
        noise = 0.05 * self.strength * draw.normal(*shape)
        return (view + noise).clip(0, 1).astype(np.float32)

    def settings(self) -> dict[str, Any]:
        return {"family": "video", "version": 1, "strength": self.strength, "flip": self.flip}


class _Draw:
    """Draws from a generator on any device, as arrays."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, *shape: int) -> NDArray[np.float32]:
        return self._array(torch.rand(*shape, generator=self.generator, device=self.generator.device))

    def normal(self, *shape: int) -> NDArray[np.float32]:
        return self._array(torch.randn(*shape, generator=self.generator, device=self.generator.device))

    def factors(self, deviation: float, *shape: int) -> NDArray[np.float32]:
        """exp(deviation * z) for normal z, within exp(-3) and exp(3)."""
        return np.exp((deviation * self.normal(*shape)).clip(-3, 3))

    def symmetric(self) -> float:
        """Uniform in [-1, 1)."""
        return 2 * self.uniform(1).item() - 1

    def span(self, length: int, share: float) -> slice:
        """A part of at most this share of a length, anywhere in it."""
        size = int(self.uniform(1).item() * (min(share, 0.9) * length + 1))
        start = int(self.uniform(1).item() * (length - size + 1))
        return slice(start, start + size)

    def _array(self, values: Tensor) -> NDArray[np.float32]:
        return values.cpu().numpy()


def turn(angle: float, axis: int) -> NDArray[np.float32]:
    """(3, 3) rotation about an axis by an angle in radians."""
    first, second = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(3, dtype=np.float32)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[second, first], matrix[first, second] = np.sin(angle), -np.sin(angle)
    return matrix


def _least_part(strength: float) -> float:
    """Share of a crop's sides that is kept at least."""
    return 1 - min(0.4 * strength, 0.9)


def _warped_times(length: int, strength: float, draw: _Draw) -> NDArray[np.float64]:
    """(T,) rising times in [0, T - 1] at which a cropped and warped series is read."""
    least = _least_part(strength)
    part = least + (1 - least) * draw.uniform(1).item()
    start = draw.uniform(1).item() * (1 - part)
    pace = draw.factors(0.3 * strength, WARP_KNOTS).astype(np.float64)
    knots = np.concatenate([[0.0], np.cumsum(pace) / pace.sum()])
    warped = np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(knots)), knots)
    return (start + part * warped) * (length - 1)


def _at(values: Sample, times: NDArray[np.float64]) -> Sample:
    """Values (T, ...) at times in [0, T - 1], by linear interpolation."""
    low = np.minimum(times.astype(np.int64), max(len(values) - 2, 0))
    high = np.minimum(low + 1, len(values) - 1)
    weight = (times - low).astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    return values[low] * (1 - weight) + values[high] * weight


def _finite(values: NDArray[np.floating]) -> Sample:
    """Float32, cut to what float32 can hold."""
    limit = np.finfo(np.float32).max
    return values.clip(-limit, limit).astype(np.float32)

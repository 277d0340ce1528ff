"""Mean and deviation by channel of raw samples of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

SMALLEST_STD = 1e-6
CHANNEL_AXIS = {"image": 0, "audio": 0, "text": -1, "series": -1, "skeleton": -1, "tabular": -1}
"""Axis of a sample along which the statistics differ: colours, features, coordinates; a video has one."""


class Moments:
    """Mean and standard deviation of each channel of samples that come in blocks, in float64.

    Blocks are merged as by Chan, Golub & LeVeque (1983), so that large means cost no digits.

    Args:
        kind: of the modality.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.count = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, samples: Array) -> None:
        """Take in a block of samples (n, ...)."""
        values = by_channel(samples, self.kind).astype(np.float64)
        if not len(values):
            return
        count = self.count + len(values)
        mean = values.mean(0)
        step = mean - self._mean
        self._squares = (
            self._squares + ((values - mean) ** 2).sum(0) + step**2 * self.count * len(values) / count
        )
        self._mean = self._mean + step * len(values) / count
        self.count = count

    @property
    def mean(self) -> Tensor:
        """(C,) float32."""
        return torch.from_numpy(self._mean).float()

    @property
    def std(self) -> Tensor:
        """(C,) float32; 1 for a constant channel."""
        std = np.sqrt(self._squares / self.count)
        return torch.from_numpy(np.where(std < SMALLEST_STD, 1.0, std)).float()


def by_channel(samples: Array, kind: str) -> Array:
    """Samples (n, ...) as (m, C) values of each channel."""
    if kind not in CHANNEL_AXIS:
        return samples.reshape(-1, 1)
    axis = CHANNEL_AXIS[kind] + (1 if CHANNEL_AXIS[kind] >= 0 else 0)
    return np.moveaxis(samples, axis, -1).reshape(-1, samples.shape[axis])


def standardised(samples: Tensor, mean: Tensor, std: Tensor, kind: str) -> Tensor:
    """Samples (B, ...) less the mean (C,), over the deviation (C,), by channel."""
    shape = [1] * samples.ndim
    axis = CHANNEL_AXIS.get(kind, -1)
    if kind in CHANNEL_AXIS:
        shape[axis + 1 if axis >= 0 else axis] = len(mean)
    return (samples - mean.view(shape)) / std.view(shape)

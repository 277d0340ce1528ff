"""From WAV files to log-spectrograms, clean or in white noise."""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import ShortTimeFFT, resample_poly
from scipy.signal.windows import hann

from mmnas_lab.types import InputError

DYNAMIC_RANGE_DB = 80.0
"""From the loudest cell of a spectrogram, which is 1, down to 0."""


def read_wav(content: Path | bytes, name: str, rate: int) -> NDArray[np.float64]:
    """The samples of a WAV file in [-1, 1]; several channels are averaged, other rates resampled.

    Args:
        content: the file, or its bytes.
        name: of the recording in messages.
        rate: in Hz.

    Returns:
        (n,) samples, n >= 1.

    Raises:
        InputError: a file that is no WAV file, is empty or silent, or holds values that are not finite.
    """
    try:
        own_rate, values = wavfile.read(io.BytesIO(content) if isinstance(content, bytes) else content)
    except (OSError, ValueError, EOFError, struct.error) as error:
        raise InputError(
            f"cannot read the recording '{name}' as WAV: {error}; get or write it anew"
        ) from error
    if len(values) == 0:
        raise InputError(f"the recording '{name}' has no samples; get it anew or remove it")
    if values.dtype == np.uint8:
        signal = (values.astype(np.float64) - 128) / 128
    elif np.issubdtype(values.dtype, np.integer):
        signal = values / -float(np.iinfo(values.dtype).min)
    else:
        signal = values.astype(np.float64)
    if signal.ndim == 2:
        signal = signal.mean(axis=1)
    if not np.isfinite(signal).all():
        raise InputError(f"the recording '{name}' has values that are not finite; get or write it anew")
    if not signal.any():
        raise InputError(f"the recording '{name}' is silent; get it anew or remove it")
    if own_rate != rate:
        shared = math.gcd(own_rate, rate)
        signal = resample_poly(signal, rate // shared, own_rate // shared)
    return signal


def log_spectrogram(
    signal: NDArray[np.float64], num_samples: int, frequencies: int, frames: int
) -> NDArray[np.float32]:
    """Level of each frequency over time, the loudest cell being 1 and `DYNAMIC_RANGE_DB` below it 0.

    The signal is cut or padded with silence on both sides to `num_samples`. Hann windows of
    2 (frequencies - 1) samples, evenly spaced.

    Args:
        signal: (n,) samples.
        num_samples: what the spectrogram spans.
        frequencies: F, from 0 to half the sampling rate.
        frames: T.

    Returns:
        (F, T) in [0, 1]; the first row is the lowest frequency.
    """
    surplus = len(signal) - num_samples
    if surplus > 0:
        signal = signal[surplus // 2 : surplus // 2 + num_samples]
    else:
        signal = np.pad(signal, (-surplus // 2, -surplus - -surplus // 2))
    transform = ShortTimeFFT(hann(2 * (frequencies - 1), sym=False), hop=num_samples // frames, fs=1.0)
    return _levels(np.abs(transform.stft(signal, p0=0, p1=frames)))


def in_white_noise(
    spectrogram: NDArray[np.float32], snr_db: float, generator: np.random.Generator
) -> NDArray[np.float32]:
    """The log-spectrogram of the same sound in white noise of its own for each call.

    A cell of magnitude |X| becomes |X + N| with complex Gaussian N, whose power is the same in all cells;
    the phase of X does not matter. The noise of overlapping frames is taken as independent.

    Args:
        spectrogram: (F, T) in [0, 1], as `log_spectrogram` gives it.
        snr_db: mean power of the sound over that of the noise, over the whole spectrogram.
        generator: of the noise.
    """
    magnitude = 10 ** ((spectrogram - 1) * np.float32(DYNAMIC_RANGE_DB / 20))
    noise_power = np.mean(magnitude**2) / 10 ** (snr_db / 10)
    noise = generator.standard_normal((2, *spectrogram.shape), dtype=np.float32)
    real, imaginary = noise * np.sqrt(noise_power / 2, dtype=np.float32)
    return _levels(np.hypot(magnitude + real, imaginary))


def averaged(spectrogram: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """The log-spectrogram of the mean power of blocks of cells.

    Args:
        spectrogram: (F, T) in [0, 1], as `log_spectrogram` gives it.
        side: cells of a block along either axis; divides F and T.

    Returns:
        (F / side, T / side) in [0, 1]; the loudest block is 1. With `side` 1 the spectrogram itself.
    """
    if side == 1:
        return spectrogram
    power = 10 ** ((spectrogram - 1) * np.float32(DYNAMIC_RANGE_DB / 10))
    frequencies, frames = (length // side for length in spectrogram.shape)
    return _levels(np.sqrt(power.reshape(frequencies, side, frames, side).mean((1, 3))))


def _levels(magnitude: NDArray[np.floating]) -> NDArray[np.float32]:
    loudest = magnitude.max()
    floor = 10 ** (-DYNAMIC_RANGE_DB / 20)
    levels = 20 * np.log10(np.maximum(magnitude / loudest, floor)) / DYNAMIC_RANGE_DB + 1
    return levels.clip(0, 1).astype(np.float32)

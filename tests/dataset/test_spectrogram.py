"""WAV files and their spectrograms against plain sums over samples."""

import io

import numpy as np
import pytest
from scipy.io import wavfile

from mmnas_lab.dataset.spectrogram import (
    DYNAMIC_RANGE_DB,
    averaged,
    in_white_noise,
    log_spectrogram,
    read_wav,
)
from mmnas_lab.types import InputError


def wav(values, rate=8000):
    stream = io.BytesIO()
    wavfile.write(stream, rate, values)
    return stream.getvalue()


def tone(hertz, rate=8000, seconds=0.5):
    return np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize(
    ("convert", "tolerance"),
    [
        (lambda x: (x * 32767).astype(np.int16), 1e-4),
        (lambda x: (x * 2147483000).astype(np.int32), 1e-6),
        (lambda x: (x * 127 + 128).astype(np.uint8), 0.02),
        (lambda x: x.astype(np.float32), 1e-6),
    ],
    ids=["int16", "int32", "uint8", "float32"],
)
def test_every_sample_format_gives_the_same_signal(convert, tolerance):
    signal = read_wav(wav(convert(tone(440))), "tone", 8000)
    assert signal == pytest.approx(tone(440), abs=tolerance)


def test_two_channels_are_averaged():
    left, right = tone(440), tone(880)
    signal = read_wav(wav(np.stack([left, right], 1).astype(np.float32)), "stereo", 8000)
    assert signal == pytest.approx((left + right) / 2, abs=1e-6)


@pytest.mark.parametrize("rate", [16000, 11025, 44100])
def test_another_rate_is_resampled(rate):
    signal = read_wav(wav(tone(440, rate).astype(np.float32), rate), "tone", 8000)
    assert len(signal) == pytest.approx(4000, abs=1)
    assert signal[200:3800] == pytest.approx(tone(440)[200:3800], abs=0.02)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wav(np.zeros(0, np.int16)), "'0_ann_3' has no samples"),
        (wav(np.zeros(50, np.int16)), "'0_ann_3' is silent"),
        (wav(np.full(50, np.nan, np.float32)), "not finite"),
        (b"RIFF", "cannot read the recording '0_ann_3' as WAV"),
        (b"", "cannot read the recording '0_ann_3' as WAV"),
        (b"no wav file at all, only text", "cannot read the recording '0_ann_3' as WAV"),
    ],
)
def test_a_bad_recording_is_named(content, message):
    with pytest.raises(InputError, match=message):
        read_wav(content, "0_ann_3", 8000)


@pytest.mark.parametrize("length", [300, 2000, 3001])
def test_levels_are_those_of_a_plain_fourier_sum(length):
    signal = np.random.default_rng(0).normal(size=length)
    num_samples, frequencies, frames = 2000, 9, 7
    found = log_spectrogram(signal, num_samples, frequencies, frames)

    window = 2 * (frequencies - 1)
    surplus = num_samples - length
    whole = [0.0] * (surplus // 2) + list(signal) + [0.0] * (surplus - surplus // 2)
    if surplus < 0:
        whole = list(signal[-surplus // 2 :][:num_samples])
    magnitude = np.zeros((frequencies, frames))
    for t in range(frames):
        for k in range(frequencies):
            total = 0j
            for n in range(window):
                place = t * (num_samples // frames) - window // 2 + n
                value = whole[place] if 0 <= place < num_samples else 0.0
                hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / window)
                total += hann * value * np.exp(-2j * np.pi * k * n / window)
            magnitude[k, t] = abs(total)
    decibels = 20 * np.log10(np.maximum(magnitude, 1e-12) / magnitude.max())
    assert found == pytest.approx(np.clip(1 + decibels / DYNAMIC_RANGE_DB, 0, 1), abs=1e-5)
    assert found.shape == (frequencies, frames)
    assert found.dtype == np.float32


def test_a_high_tone_lies_in_a_high_row():
    rows = [log_spectrogram(tone(hertz), 4000, 33, 10)[:, 5].argmax() for hertz in (500, 1000, 3000)]
    assert rows == [4, 8, 24]


def test_noise_has_the_power_that_is_asked_for_and_its_own_draws():
    clean = log_spectrogram(tone(1000) + 0.1 * tone(300), 4000, 65, 64)
    power = 10 ** ((clean - 1) * DYNAMIC_RANGE_DB / 10)
    rng = np.random.default_rng(0)
    first, second = (in_white_noise(clean, -15.0, rng) for _ in range(2))
    assert not np.array_equal(first, second)
    noisy = 10 ** ((first - 1) * DYNAMIC_RANGE_DB / 10)
    quiet = power < 1e-6 * power.max()
    # The scale is lost with the new loudest cell; the share of the tone in all power is not.
    share = power.mean() / 10 ** (-15 / 10) / (power.mean() * (1 + 10 ** (15 / 10)))
    assert noisy[quiet].mean() / noisy.mean() == pytest.approx(share, rel=0.1)
    assert in_white_noise(clean, 60.0, rng)[clean > 0.6] == pytest.approx(clean[clean > 0.6], abs=0.05)


@pytest.mark.parametrize(("shape", "side"), [((6, 4), 2), ((9, 3), 3), ((8, 12), 4)])
def test_an_averaged_spectrogram_has_the_mean_power_of_each_block(shape, side):
    fine = np.random.default_rng(0).random(shape, dtype=np.float32)
    power = np.zeros((shape[0] // side, shape[1] // side))
    for i in range(shape[0]):
        for j in range(shape[1]):
            power[i // side, j // side] += 10 ** ((fine[i, j] - 1) * DYNAMIC_RANGE_DB / 10) / side**2
    decibels = 10 * np.log10(power / power.max())
    found = averaged(fine, side)
    assert found == pytest.approx(np.clip(1 + decibels / DYNAMIC_RANGE_DB, 0, 1), abs=1e-5)
    assert found.dtype == np.float32
    assert averaged(fine, 1) is fine

"""AV-MNIST: a written digit and the same digit spoken."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.dataset.records import RecordDataset, digest_of
from mmnas_lab.dataset.spectrogram import averaged, in_white_noise, log_spectrogram, read_wav
from mmnas_lab.types import InputError, Settings, Split

RATE = 8000
"""Sampling rate of the recordings in Hz."""

TEST_INDEX, VAL_INDEX = 5, 10
"""Recordings of a speaker and digit below the first number are test (FSDD's rule), below the second val."""

WAV_NAME = re.compile(r"(\d)_([^_/]+)_(\d+)\.wav")
MNIST_FILES = ("train", "t10k")


@dataclass(frozen=True)
class Clip:
    """One recording of a spoken digit."""

    name: str
    digit: int
    speaker: str
    index: int
    content: Path | bytes

    @cached_property
    def hash(self) -> bytes:
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return digest_of(self.name.encode(), content)


@dataclass(frozen=True)
class Pair:
    """A picture of a digit and a recording of it.

    Attributes:
        split: of the pair.
        file: MNIST file of the picture, `train` or `t10k`.
        row: in that file.
        pixels: (28, 28) uint8.
        clip: the recording.
    """

    split: Split
    file: str
    row: int
    pixels: NDArray[np.uint8]
    clip: Clip

    @property
    def id(self) -> str:
        return f"{self.file}-{self.row:05d}"

    def digest(self) -> bytes:
        return digest_of(self.id.encode(), self.pixels.tobytes(), self.clip.hash)


class AVMNIST(RecordDataset[Pair]):
    """MNIST digits (LeCun et al. 1998) paired with recordings of the Free Spoken Digit Dataset.

    In the way of AV-MNIST (Vielzeuf et al. 2018), whose generator was not published: each picture is given a
    recording of the same digit, drawn with replacement from the recordings of its split. So the pairing reads
    the digits, as it did when the dataset was made; it is part of the inputs, and nothing else that is given
    to label-free stages depends on a digit.

    Pictures of mode L, 28 x 28. Recordings as log-spectrograms (1, F, T), or averaged ones, over `seconds`,
    padded or cut at both ends alike. Degraded, as AV-MNIST is: pictures are reduced to their first principal
    components of the training pictures, around the training mean; recordings are in white noise, which
    differs for each pair. Undegraded, either modality tells nearly all digits.

    `path` holds the folders `mnist` (four idx files, packed or not) and `fsdd` (the repository's recordings
    `<digit>_<speaker>_<index>.wav`, or parquet files with the columns audio, digit, speaker, index).

    Args:
        path: the folder.
        degraded: whether pictures and recordings are.
        components: principal components that are kept of a degraded picture.
        snr_db: power of a degraded recording over that of its noise, in dB.
        disjoint: `clips` gives train, val and test recordings of their own (index 10 and above, 5 to 9, 0 to
            4), `speakers` speakers of their own (the last by name is test, the one before val).
        num_train: the first rows of MNIST's training file.
        num_val: the last rows of MNIST's training file.
        num_test: the first rows of MNIST's test file.
        frequencies: F; 8 to 512.
        frames: T; 8 to 512.
        seconds: that a spectrogram spans.
        average: power is averaged over so many x so many cells at the end, noise included, which leaves
            (1, F / average, T / average). Few recordings tell more in this form.
        seed: of the pairing and the noise.
        on_bad_sample: `stop` or `skip`, for pairs whose recording cannot be used.

    Raises:
        InputError: a setting outside its range.
    """

    name = "avmnist"
    classes = tuple(str(digit) for digit in range(10))

    def __init__(
        self,
        path: str,
        degraded: bool = True,
        components: int = 4,
        snr_db: float = -20.0,
        disjoint: Literal["clips", "speakers"] = "clips",
        num_train: int = 55_000,
        num_val: int = 5_000,
        num_test: int = 10_000,
        frequencies: int = 112,
        frames: int = 112,
        seconds: float = 1.0,
        average: int = 1,
        seed: int = 0,
        on_bad_sample: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__(path, {"image": "image", "audio": "audio"}, on_bad_sample)
        if disjoint not in ("clips", "speakers"):
            raise InputError(f"dataset.disjoint must be clips or speakers, got '{disjoint}'")
        for key, value, low, high in (
            ("components", components, 1, 784),
            ("snr_db", snr_db, -60, 60),
            ("num_train", num_train, 1, 60_000),
            ("num_val", num_val, 1, 60_000),
            ("num_test", num_test, 1, 10_000),
            ("frequencies", frequencies, 8, 512),
            ("frames", frames, 8, 512),
            ("seconds", seconds, 0.2, 10),
            ("average", average, 1, 64),
            ("seed", seed, 0, 2**31 - 1),
        ):
            if not low <= value <= high:
                raise InputError(f"dataset.{key} must be in [{low}, {high}], got {value}")
        if frequencies % average or frames % average:
            raise InputError(
                f"dataset.average={average} must divide dataset.frequencies={frequencies} and "
                f"dataset.frames={frames}"
            )
        self.average = average
        self.degraded, self.components, self.snr_db, self.disjoint = degraded, components, snr_db, disjoint
        self.counts: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}
        self.frequencies, self.frames, self.seconds, self.seed = frequencies, frames, seconds, seed
        self._spectrograms: dict[str, NDArray[np.uint8]] = {}  # by clip: (F, T), 255 for the loudest cell

    def index(self) -> dict[Split, list[Pair]]:
        clips = _by_split(self._clips(), self.disjoint, self.path / "fsdd")
        return {split: self._pairs(split, clips[split]) for split in SPLITS}

    def sample(self, record: Pair, modality: str) -> Any:
        return self._picture(record) if modality == "image" else self._sound(record)

    def label(self, record: Pair) -> int:
        return int(self._digits[record.file][record.row])

    def problem(self, record: Pair) -> str | None:
        try:
            self._levels(record.clip)
        except InputError as error:
            return str(error)
        return None

    def settings(self) -> Settings:
        degradation = {"components": self.components, "snr_db": self.snr_db} if self.degraded else {}
        return {
            "version": 1,
            "disjoint": self.disjoint,
            "frequencies": self.frequencies,
            "frames": self.frames,
            "seconds": self.seconds,
            "seed": self.seed,
            **({"average": self.average} if self.average > 1 else {}),
            **degradation,
        }

    # Pairs

    @cached_property
    def _pixels(self) -> dict[str, NDArray[np.uint8]]:
        return {file: read_idx(self.path / "mnist", f"{file}-images-idx3-ubyte", 3) for file in MNIST_FILES}

    @cached_property
    def _digits(self) -> dict[str, NDArray[np.uint8]]:
        found = {file: read_idx(self.path / "mnist", f"{file}-labels-idx1-ubyte", 1) for file in MNIST_FILES}
        for file, digits in found.items():
            if len(digits) != len(self._pixels[file]) or digits.max(initial=0) > 9:
                raise InputError(
                    f"'{self.path / 'mnist'}' has {len(self._pixels[file])} pictures and {len(digits)} "
                    f"labels up to {digits.max(initial=0)} in its {file} files; get both anew"
                )
        return found

    def _pairs(self, split: Split, clips: list[list[Clip]]) -> list[Pair]:
        file = "t10k" if split == "test" else "train"
        pixels, digits = self._pixels[file], self._digits[file]
        needed = self.counts["test"] if split == "test" else self.counts["train"] + self.counts["val"]
        if needed > len(pixels):
            keys = "dataset.num_test" if split == "test" else "dataset.num_train and dataset.num_val"
            raise InputError(
                f"the {file} pictures in '{self.path / 'mnist'}' are {len(pixels)}, but {needed} are asked "
                f"for; lower {keys}"
            )
        count = self.counts[split]
        first = len(pixels) - count if split == "val" else 0
        draws = np.random.default_rng([self.seed, SPLITS.index(split)]).random(count)
        pairs = []
        for row, draw in zip(range(first, first + count), draws, strict=True):
            fitting = clips[digits[row]]
            pairs.append(Pair(split, file, row, pixels[row], fitting[int(draw * len(fitting))]))
        return pairs

    def _clips(self) -> list[Clip]:
        folder = self.path / "fsdd"
        files = sorted(folder.glob("*.parquet"))
        clips = [clip for file in files for clip in _parquet_clips(file)] if files else _wav_clips(folder)
        if not clips:
            raise InputError(
                f"AVMNIST needs recordings '<digit>_<speaker>_<index>.wav' or parquet files in '{folder}'; "
                f"get them with `python scripts/prepare_avmnist.py --path {self.path}`, or set dataset.path="
            )
        return sorted(clips, key=lambda clip: (clip.digit, clip.speaker, clip.index))

    # Samples

    @cached_property
    def _principal(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean (784,) and components (k, 784) of the training pictures."""
        from sklearn.decomposition import PCA

        pictures = np.stack([pair.pixels for pair in self.records("train", dropped=True)])
        kept = min(self.components, len(pictures))
        fitted = PCA(kept, svd_solver="covariance_eigh").fit(
            pictures.reshape(len(pictures), -1) / np.float32(255)
        )
        return fitted.mean_, fitted.components_

    def _picture(self, pair: Pair) -> Image.Image:
        if not self.degraded:
            return Image.fromarray(pair.pixels)
        mean, components = self._principal
        values = pair.pixels.reshape(-1) / np.float32(255)
        reduced = mean + components.T @ (components @ (values - mean))
        return Image.fromarray(np.rint(255 * reduced.clip(0, 1)).astype(np.uint8).reshape(pair.pixels.shape))

    def _sound(self, pair: Pair) -> NDArray[np.float32]:
        levels = self._levels(pair.clip).astype(np.float32) / np.float32(255)
        if self.degraded:
            noise = np.random.default_rng([self.seed, SPLITS.index(pair.split), pair.row, 1])
            levels = in_white_noise(levels, self.snr_db, noise)
        return averaged(levels, self.average)[None]

    def _levels(self, clip: Clip) -> NDArray[np.uint8]:
        if clip.name not in self._spectrograms:
            signal = read_wav(clip.content, clip.name, RATE)
            levels = log_spectrogram(signal, round(self.seconds * RATE), self.frequencies, self.frames)
            self._spectrograms[clip.name] = np.rint(255 * levels).astype(np.uint8)
        return self._spectrograms[clip.name]


def read_idx(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """The bytes of an idx file, `name` or `name.gz` in a folder.

    Returns:
        (n, 28, 28) for three dimensions, (n,) for one.

    Raises:
        InputError: a file that is missing or is no such idx file.
    """
    file = next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)
    if file is None:
        raise InputError(
            f"AVMNIST needs '{folder / name}.gz'; get it with `python scripts/prepare_avmnist.py --path "
            f"{folder.parent}`, or set dataset.path= to a folder with MNIST in its folder 'mnist'"
        )
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot unpack '{file}': {error}; get it anew") from error
    head = np.frombuffer(content[: 4 + 4 * dimensions], ">u4")
    expected = (28, 28) if dimensions == 3 else ()
    if (
        len(head) != 1 + dimensions
        or head[0] != 0x800 + dimensions
        or tuple(head[2:]) != expected
        or len(content) != 4 + 4 * dimensions + np.prod(head[1:], dtype=np.int64)
    ):
        raise InputError(
            f"'{file}' is not an idx file of {dimensions} dimensions, or is cut off; get it anew"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(head[1:])


def _parquet_clips(file: Path) -> list[Clip]:
    wanted = ["audio", "digit", "speaker", "index"]
    try:
        columns = pq.read_schema(file).names
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise InputError(
                f"'{file}' has no column '{missing[0]}', which AVMNIST needs; it has: {', '.join(columns)}"
            )
        rows = pq.read_table(file, columns=wanted).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{file}' as parquet: {error}; get it anew") from error
    return [
        Clip(
            f"{row['digit']}_{row['speaker']}_{row['index']}",
            row["digit"],
            row["speaker"],
            row["index"],
            row["audio"]["bytes"] or b"",
        )
        for row in rows
    ]


def _wav_clips(folder: Path) -> list[Clip]:
    matches = [(file, WAV_NAME.fullmatch(file.name)) for file in folder.rglob("*.wav")]
    return [
        Clip(file.stem, int(match[1]), match[2], int(match[3]), file)
        for file, match in matches
        if match is not None
    ]


def _by_split(
    clips: Sequence[Clip], disjoint: Literal["clips", "speakers"], folder: Path
) -> dict[Split, list[list[Clip]]]:
    """The recordings of each digit in each split."""
    speakers = sorted({clip.speaker for clip in clips})
    if disjoint == "speakers" and len(speakers) < 3:
        raise InputError(
            f"dataset.disjoint=speakers needs three speakers, '{folder}' has {', '.join(speakers)}; use clips"
        )

    def split_of(clip: Clip) -> Split:
        if disjoint == "speakers":
            return (
                "test" if clip.speaker == speakers[-1] else "val" if clip.speaker == speakers[-2] else "train"
            )
        return "test" if clip.index < TEST_INDEX else "val" if clip.index < VAL_INDEX else "train"

    found: dict[Split, list[list[Clip]]] = {split: [[] for _ in range(10)] for split in SPLITS}
    for clip in clips:
        found[split_of(clip)][clip.digit].append(clip)
    for split, digits in found.items():
        for digit, fitting in enumerate(digits):
            if not fitting:
                rule = {"test": "index 0 to 4", "val": "index 5 to 9", "train": "index 10 and above"}[split]
                raise InputError(
                    f"'{folder}' has no recording of the digit {digit} for the {split} split "
                    f"({rule if disjoint == 'clips' else 'of its speakers'}); complete the folder with "
                    "`python scripts/prepare_avmnist.py`"
                )
    return found

"""UTD-MHAD: actions seen by a Kinect as skeleton and depth, and felt by a wearable inertial sensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline
from scipy.io import loadmat

from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.dataset.records import RecordDataset, digest_of
from mmnas_lab.types import InputError, Settings, Split

ACTIONS = (
    "right arm swipe to the left",
    "right arm swipe to the right",
    "right hand wave",
    "two hand front clap",
    "right arm throw",
    "cross arms in the chest",
    "basketball shoot",
    "right hand draw x",
    "right hand draw circle (clockwise)",
    "right hand draw circle (counter clockwise)",
    "draw triangle",
    "bowling (right hand)",
    "front boxing",
    "baseball swing from right",
    "tennis right hand forehand swing",
    "arm curl (two arms)",
    "tennis serve",
    "two hand push",
    "right hand knock on door",
    "right hand catch an object",
    "right hand pick up and throw",
    "jogging in place",
    "walking in place",
    "sit to stand",
    "stand to sit",
    "forward lunge (left foot forward)",
    "squat (two arms stretch out)",
)
HIP_CENTER = 3
"""Joint that the others are measured from."""

NEAREST, FARTHEST = 500.0, 4500.0
"""Millimetres that become 1 and 0 in a video; what has no depth is 0 as well."""

MAT_NAME = re.compile(r"a(\d+)_s(\d+)_t(\d+)_(skeleton|inertial|depth)\.mat")
MAT_FIELDS = {"skeleton": "d_skel", "inertial": "d_iner", "depth": "d_depth"}
SHAPES = {"skeleton": (None, 20, 3), "inertial": (None, 6), "depth": (None, None, None)}
"""Of raw arrays, time first."""

Raw = NDArray[Any]


@dataclass(frozen=True)
class Performance:
    """One subject's performance of one action.

    Attributes:
        action: 1 to 27.
        subject: 1 to 8.
        trial: 1 to 4.
        hash: of its content; of files their sizes.
    """

    action: int
    subject: int
    trial: int
    hash: bytes = field(repr=False)

    @property
    def id(self) -> str:
        return f"a{self.action}_s{self.subject}_t{self.trial}"

    def digest(self) -> bytes:
        return digest_of(self.id.encode(), self.hash)


class Source(Protocol):
    """A way in which performances lie on disk."""

    def performances(self) -> list[Performance]:
        """All of them, in a fixed order."""

    def raw(self, performance: Performance, modality: str) -> Raw:
        """Skeleton (T, 20, 3) in metres, inertial (T, 6), or depth (T, H, W) in millimetres.

        Raises:
            InputError: data that is missing or cannot be read.
        """


class UTDMHAD(RecordDataset[Performance]):
    """UTD-MHAD (Chen et al. 2015): 27 actions of 8 subjects, up to 4 trials, split by subject.

    The skeleton (T, 20, 3) is measured from the hip centre of its frame, in metres, and resampled in time.
    The inertial series (T, 6), acceleration and rotation, is resampled and standardised by channel with the
    statistics of the training subjects. The depth video (T, H, W) has frames at even distances, averaged
    down; near is 1, far and background are 0.

    `path` holds the authors' files `a<action>_s<subject>_t<trial>_{skeleton,inertial,depth}.mat`, in any
    folders, or parquet files with the columns action, subject, trial, skeleton, skeleton_frames, inertial,
    inertial_samples and depth, as 16 frames of 120 x 160 uint16.

    Args:
        path: the folder.
        val_subjects: of the subjects that are not for testing, those that become val.
        test_subjects: the usual protocol tests even subjects.
        skeleton_frames: to which skeletons are resampled; 2 to 512.
        inertial_samples: to which inertial series are resampled; 2 to 1024.
        depth_frames: of a video; 1 to 256.
        depth_height: in pixels; 4 to 480.
        depth_width: in pixels; 4 to 640.
        on_bad_sample: `stop` or `skip`.

    Raises:
        InputError: a setting outside its range, or subjects in two splits.
    """

    name = "utd_mhad"
    classes = ACTIONS

    def __init__(
        self,
        path: str,
        val_subjects: Sequence[int] = (7,),
        test_subjects: Sequence[int] = (2, 4, 6, 8),
        skeleton_frames: int = 32,
        inertial_samples: int = 64,
        depth_frames: int = 16,
        depth_height: int = 60,
        depth_width: int = 80,
        on_bad_sample: Literal["stop", "skip"] = "stop",
    ) -> None:
        kinds = {"skeleton": "skeleton", "inertial": "series", "depth": "video"}
        super().__init__(path, kinds, on_bad_sample)
        for key, value, low, high in (
            ("skeleton_frames", skeleton_frames, 2, 512),
            ("inertial_samples", inertial_samples, 2, 1024),
            ("depth_frames", depth_frames, 1, 256),
            ("depth_height", depth_height, 4, 480),
            ("depth_width", depth_width, 4, 640),
        ):
            if not low <= value <= high:
                raise InputError(f"dataset.{key} must be in [{low}, {high}], got {value}")
        if both := sorted(set(val_subjects) & set(test_subjects)):
            raise InputError(
                f"subject {both[0]} is in dataset.val_subjects and in dataset.test_subjects; leave it in one"
            )
        self.val_subjects, self.test_subjects = tuple(val_subjects), tuple(test_subjects)
        self.skeleton_frames, self.inertial_samples = skeleton_frames, inertial_samples
        self.video_shape = (depth_frames, depth_height, depth_width)
        self._videos: dict[str, NDArray[np.float16]] = {}

    def index(self) -> dict[Split, list[Performance]]:
        found: dict[Split, list[Performance]] = {split: [] for split in SPLITS}
        for performance in self._source.performances():
            subject = performance.subject
            split: Split = (
                "test"
                if subject in self.test_subjects
                else "val"
                if subject in self.val_subjects
                else "train"
            )
            found[split].append(performance)
        return found

    def sample(self, record: Performance, modality: str) -> NDArray[np.float32]:
        if modality == "inertial":
            mean, std = self._inertial_statistics
            return (self._inertial(record) - mean) / std
        if modality == "skeleton":
            joints = _checked(self._source.raw(record, modality), record, modality)
            return resampled(joints - joints[:, HIP_CENTER : HIP_CENTER + 1], self.skeleton_frames)
        if record.id not in self._videos:
            depth = _checked(self._source.raw(record, modality), record, modality)
            self._videos[record.id] = video(depth, self.video_shape).astype(np.float16)
        return self._videos[record.id].astype(np.float32)

    def label(self, record: Performance) -> int:
        return record.action - 1

    def settings(self) -> Settings:
        return {
            "version": 1,
            "skeleton_frames": self.skeleton_frames,
            "inertial_samples": self.inertial_samples,
            "video": self.video_shape,
        }

    @cached_property
    def _source(self) -> Source:
        if not self.path.is_dir():
            raise InputError(
                f"UTDMHAD needs the folder '{self.path}', which does not exist; download UTD-MHAD from "
                "its authors (https://personal.utdallas.edu/~kehtar/UTD-MHAD.html) and unpack Skeleton.zip, "
                "Inertial.zip and Depth.zip there, or set dataset.path="
            )
        files = sorted(self.path.glob("*.parquet"))
        return ParquetPerformances(files) if files else MatPerformances(self.path)

    def _inertial(self, record: Performance) -> NDArray[np.float32]:
        return resampled(
            _checked(self._source.raw(record, "inertial"), record, "inertial"), self.inertial_samples
        )

    @cached_property
    def _inertial_statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and deviation (6,) of the training series that can be read."""
        series = []
        for record in self.records("train", dropped=True):
            try:
                series.append(self._inertial(record))
            except InputError:
                continue
        if not series:
            raise InputError(f"no inertial series of the training subjects in '{self.path}' can be read")
        values = np.concatenate(series).astype(np.float64)
        std = values.std(axis=0)
        return values.mean(axis=0).astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)


class ParquetPerformances:
    """Performances in parquet files; depth stays packed there, but for the row group read last."""

    COLUMNS = (
        "action",
        "subject",
        "trial",
        "skeleton",
        "skeleton_frames",
        "inertial",
        "inertial_samples",
        "depth",
    )
    DEPTH_SHAPE = (16, 120, 160)

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._arrays: dict[tuple[str, str], Raw] = {}  # by performance and modality, without depth
        self._places: dict[str, tuple[Path, int, int]] = {}  # file, row group and row in it
        self._last: tuple[tuple[Path, int], Any] | None = None  # file and row group, and its column depth

    def performances(self) -> list[Performance]:
        return [performance for file in self.files for performance in self._read(file)]

    def raw(self, performance: Performance, modality: str) -> Raw:
        if modality != "depth":
            return self._arrays[performance.id, modality]
        file, group, row = self._places[performance.id]
        if self._last is None or self._last[0] != (file, group):
            column = pq.ParquetFile(file).read_row_group(group, columns=["depth"])["depth"]
            self._last = (file, group), column
        content = self._last[1][row].as_py() or b""
        if len(content) != 2 * np.prod(self.DEPTH_SHAPE):
            raise InputError(
                f"depth of {performance.id} in '{file}' must be {self.DEPTH_SHAPE} uint16, got "
                f"{len(content)} bytes; get the file anew"
            )
        return np.frombuffer(content, "<u2").reshape(self.DEPTH_SHAPE)

    def _read(self, file: Path) -> Iterator[Performance]:
        try:
            stored = pq.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read '{file}' as parquet: {error}; get it anew") from error
        found = stored.schema_arrow.names
        if missing := [name for name in self.COLUMNS if name not in found]:
            raise InputError(
                f"'{file}' has no column '{missing[0]}', which UTDMHAD needs; it has: {', '.join(found)}"
            )
        for group in range(stored.num_row_groups):
            table = stored.read_row_group(group, columns=list(self.COLUMNS))
            for row in range(table.num_rows):
                yield self._performance(table, row, (file, group, row))

    def _performance(self, table: Any, row: int, place: tuple[Path, int, int]) -> Performance:
        cell = {name: table[name][row] for name in self.COLUMNS}
        depth = cell["depth"].as_buffer() if cell["depth"].is_valid else b""  # half a megabyte: not copied
        arrays = {
            name: cell[name].values.to_numpy() if cell[name].is_valid else np.empty(0, np.float32)
            for name in ("skeleton", "inertial")
        }
        content = [array.tobytes() for array in arrays.values()] + [depth]
        action, subject, trial = (cell[name].as_py() for name in ("action", "subject", "trial"))
        performance = Performance(action, subject, trial, digest_of(*content))
        self._places[performance.id] = place
        for name, length in (("skeleton", "skeleton_frames"), ("inertial", "inertial_samples")):
            shape = (cell[length].as_py(), *SHAPES[name][1:])
            fits = arrays[name].size == np.prod(shape)
            self._arrays[performance.id, name] = arrays[name].reshape(shape) if fits else arrays[name]
        return performance


class MatPerformances:
    """Performances in the authors' MAT files, one file a modality, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Path]] = {}  # by performance and modality
        self._found: dict[str, tuple[int, int, int]] = {}
        for file in sorted(folder.rglob("*.mat")):
            if match := MAT_NAME.fullmatch(file.name):
                action, subject, trial = (int(match[k]) for k in (1, 2, 3))
                name = f"a{action}_s{subject}_t{trial}"
                self.files.setdefault(name, {})[match[4]] = file
                self._found[name] = action, subject, trial

    def performances(self) -> list[Performance]:
        return [
            Performance(*self._found[name], digest_of(*(self._size(name, kind) for kind in MAT_FIELDS)))
            for name in sorted(self._found, key=lambda name: self._found[name])
        ]

    def raw(self, performance: Performance, modality: str) -> Raw:
        file = self.files[performance.id].get(modality)
        if file is None:
            raise InputError(
                f"'{self.folder}' has no file '{performance.id}_{modality}.mat', though it has others of "
                "this performance; complete the folder"
            )
        wanted = MAT_FIELDS[modality]
        try:
            content = loadmat(file)
        except Exception as error:  # scipy raises many kinds on damaged files
            raise InputError(f"cannot read '{file}' as MAT file: {error}; get it anew") from error
        if wanted not in content:
            fields = ", ".join(name for name in content if not name.startswith("__")) or "nothing"
            raise InputError(f"'{file}' has no field '{wanted}'; it has: {fields}. Get the file anew")
        array = np.asarray(content[wanted])
        if modality == "skeleton" and array.ndim == 3:
            return array.transpose(2, 0, 1)  # (20, 3, T)
        if modality == "depth" and array.ndim == 3:
            return array.transpose(2, 0, 1)  # (H, W, T)
        return array

    def _size(self, name: str, modality: str) -> bytes:
        file = self.files[name].get(modality)
        return str(file.stat().st_size if file else -1).encode()


def resampled(values: Raw, length: int) -> NDArray[np.float32]:
    """Values (T, ...) at `length` even distances from the first to the last, by linear interpolation."""
    places = np.linspace(0, len(values) - 1, length)
    return make_interp_spline(np.arange(len(values)), values, k=1)(places).astype(np.float32)


def video(depth: Raw, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Depth (T', H', W') in millimetres as a video of `shape` in [0, 1], of which 1 is near.

    Frames are the nearest to even distances from the first to the last; pixels are means over areas.
    """
    frames, height, width = shape
    chosen = depth[np.rint(np.linspace(0, len(depth) - 1, frames)).astype(int)].astype(np.float32)
    nearness = ((FARTHEST - chosen) / (FARTHEST - NEAREST)).clip(0, 1) * (chosen > 0)
    return F.adaptive_avg_pool2d(torch.from_numpy(nearness), (height, width)).numpy()


def _checked(values: Raw, record: Performance, modality: str) -> Raw:
    wanted = SHAPES[modality]
    fits = values.ndim == len(wanted) and all(
        w in (None, n) for w, n in zip(wanted, values.shape, strict=True)
    )
    if not fits or min(values.shape) < 1 or len(values) < 2:
        sizes = ", ".join("n" if size is None else str(size) for size in wanted)
        raise InputError(
            f"{modality} of {record.id} must have the shape ({sizes}) with two or more frames, got "
            f"{values.shape}; get it anew or remove the performance"
        )
    if not np.isfinite(values).all():
        raise InputError(f"{modality} of {record.id} has values that are not finite; get it anew")
    return values

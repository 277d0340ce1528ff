"""No encoder: arrays of every kind of modality, for networks that read the samples themselves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmnas_lab.backbone.base import LiveViews, Progress
from mmnas_lab.backbone.feature_writer import MARK_SECONDS, Mapped, array_path, read_json, write_json
from mmnas_lab.backbone.moments import Moments
from mmnas_lab.backbone.pixels import to_size
from mmnas_lab.backbone.raw_source import RawSource
from mmnas_lab.dataset.base import SPLITS, LabelFree
from mmnas_lab.dataset.families import KINDS
from mmnas_lab.dataset.views import TextViews, TokenViews, ViewFamily
from mmnas_lab.types import InputError, InputInfo, InputInfos, Settings, Split

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAYOUT_FILE = "raw.json"
PROGRESS_FILE = "progress.json"
CHUNK_ROWS = 256
CHANNELS = {"L": 1, "RGB": 3}
STORED = {"image": "uint8", "audio": "float16", "text": "float16"}
"""Types in which kinds are kept; others are float32. Half precision keeps values in [0, 1] to 0.0003."""


@runtime_checkable
class TokenEncoder(Protocol):
    """What turns texts into features of their tokens, as `text.HFText`.

    Attributes:
        max_tokens: that are read of a text.
        width: D, values of a token.
    """

    max_tokens: int
    label_free: bool

    @property
    def width(self) -> int: ...

    def fingerprint(self) -> str:
        """Hash of everything that changes `sequences`, but the positions."""

    def sequences(self, samples: list[str], positions: int) -> tuple[Tensor, Tensor]:
        """(B, positions, D) float32, zero after a text's end, and (B,) numbers of its tokens."""


class Raw:
    """The samples of all modalities as arrays, whatever their kinds.

    Image (C, H, W), text (T, D), audio (1, F, T), series (T, F), skeleton (T, J, 3), tabular (F,), video
    (T, H, W).
    """

    def __init__(
        self,
        size: int | list[int] | None = None,
        channels: Literal[1, 3] | None = None,
        text: TokenEncoder | None = None,
        tokens: int = 64,
    ) -> None:
        """Check the settings; nothing is read.

        Args:
            size: of pictures. A number: the shorter side is resized to it (bicubic), the longer one cropped
                to its middle. [height, width]: resized without cropping. None: all must have the first one's.
            channels: of pictures, 1 (grey) or 3; None: as the first training picture has them.
            text: an encoder that gives features of tokens; needed where there are texts.
            tokens: T, positions of a text; shorter ones are filled up with zeros.

        Raises:
            InputError: a setting that cannot be.
        """
        sides = [] if size is None else [size] if isinstance(size, int) else list(size)
        if any(side < 1 for side in sides) or (not isinstance(size, int) and len(sides) not in (0, 2)):
            raise InputError(f"backbone.size must be a positive number or [height, width], got {size}")
        if tokens < 1:
            raise InputError(f"backbone.tokens must be at least 1, got {tokens}")
        self.size: int | tuple[int, int] | None = size if isinstance(size, int) else None
        if len(sides) == 2:
            self.size = (sides[0], sides[1])
        self.channels, self.text, self.tokens = channels, text, tokens

    @property
    def label_free(self) -> bool:
        """False if the text encoder was trained with labels of this very dataset."""
        return self.text is None or self.text.label_free

    def check(self, dataset_modalities: dict[str, str]) -> None:
        """Refuse kinds that have no arrays. Raises InputError."""
        for name, kind in dataset_modalities.items():
            if kind not in KINDS:
                raise InputError(
                    f"backbone=raw reads {', '.join(KINDS)}; modality '{name}' is of kind '{kind}'"
                )
            if kind == "text" and self.text is None:
                raise InputError(
                    f"backbone=raw needs an encoder of tokens for the text modality '{name}'; set "
                    "backbone.text as conf/backbone/raw.yaml does"
                )

    def settings(self) -> Settings:
        """Everything that decides the arrays."""
        return {
            "kind": "raw",
            "size": self.size,
            "channels": self.channels,
            "text": None if self.text is None else self.text.fingerprint(),
            "tokens": None if self.text is None else self.tokens,
        }

    def views(self, families: dict[str, ViewFamily], modalities: dict[str, str]) -> dict[str, ViewFamily]:
        """All but those of pictures, which have views of whole batches; texts are kept as tokens."""
        return {
            name: TokenViews(family.strength) if isinstance(family, TextViews) else family
            for name, family in families.items()
            if modalities[name] != "image"
        }

    def write(self, dataset: LabelFree, folder: Path, progress: Progress | None = None) -> None:
        """Write `<split>.<modality>.npy`, (n, ...), and the training samples' statistics.

        Raises:
            InputError: a sample of another shape than the first one, or with values that cannot be kept.
        """
        self.check(dataset.modalities)
        if not (folder / LAYOUT_FILE).exists():
            _Writer(self, dataset, folder, progress).run()

    def open(self, folder: Path) -> RawCache:
        """What `write` wrote. Raises InputError where it is not complete."""
        return RawCache(folder)

    def arrays(self, kind: str, samples: list[Any]) -> tuple[list[NDArray[Any]], list[int] | None]:
        """Arrays of raw samples, and of texts the numbers of their tokens."""
        if kind == "text":
            assert self.text is not None
            states, lengths = self.text.sequences(samples, self.tokens)
            return list(states.numpy()), lengths.tolist()
        if kind == "image":
            return [self._pixels(sample) for sample in samples], None
        return [np.asarray(sample, np.float32) for sample in samples], None

    def _pixels(self, picture: Image.Image) -> NDArray[np.uint8]:
        """(C, H, W)."""
        picture = to_size(picture, self.size)
        if self.channels is not None:
            picture = picture.convert("L" if self.channels == 1 else "RGB")
        elif picture.mode not in CHANNELS:
            picture = picture.convert("RGB")
        pixels = np.asarray(picture, np.uint8)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class _Writer:
    """One call of `Raw.write`: chunks of rows, marked as done once they are on the disk."""

    def __init__(self, raw: Raw, dataset: LabelFree, folder: Path, progress: Progress | None) -> None:
        self.raw, self.dataset, self.folder, self.progress = raw, dataset, folder, progress
        self.ids = {split: dataset.ids(split) for split in SPLITS}
        if not self.ids["train"]:
            raise InputError(f"dataset '{dataset.name}' has no training sample")
        self.chunks: list[tuple[str, Split, int, int]] = [
            (name, split, start, min(start + CHUNK_ROWS, len(ids)))
            for name in dataset.modalities
            for split, ids in self.ids.items()
            for start in range(0, len(ids), CHUNK_ROWS)
        ]
        self.shapes = {
            name: raw.arrays(kind, dataset.read("train", name, [0]))[0][0].shape
            for name, kind in dataset.modalities.items()
        }
        self.plan = {
            "dataset": dataset.fingerprint(),
            "settings": raw.settings(),
            "chunk_rows": CHUNK_ROWS,
            "rows": [len(ids) for ids in self.ids.values()],
            "shapes": [[name, *shape] for name, shape in self.shapes.items()],
        }

    def run(self) -> None:
        done = self._begun()
        rest: Iterable[int] = [k for k in range(len(self.chunks)) if k not in done]
        if self.progress is not None:
            rest = self.progress(rest, "features", len(list(rest)))
        opened: dict[Path, Mapped] = {}
        marked = time.monotonic()
        try:
            for number in rest:
                self._write(*self.chunks[number], opened)
                done.add(number)
                if time.monotonic() - marked > MARK_SECONDS:
                    self._mark(done, opened)
                    marked = time.monotonic()
        finally:
            self._mark(done, opened)
        statistics = {name: self._moments(name) for name in self.shapes}
        layout = {
            "rows": {split: len(ids) for split, ids in self.ids.items()},
            "modalities": {
                name: {
                    "kind": self.dataset.modalities[name],
                    "shape": shape,
                    "mean": statistics[name].mean.tolist(),
                    "std": statistics[name].std.tolist(),
                }
                for name, shape in self.shapes.items()
            },
        }
        write_json(self.folder / LAYOUT_FILE, layout)
        (self.folder / PROGRESS_FILE).unlink()

    def _begun(self) -> set[int]:
        """Chunks that an interrupted call of the same plan wrote; without one, empty arrays are made."""
        path = self.folder / PROGRESS_FILE
        if path.exists():
            found = read_json(path)
            if found["plan"] == json.loads(json.dumps(self.plan)):
                return set(found["done"])
            path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, kind in self.dataset.modalities.items():
            for split, ids in self.ids.items():
                self._create(split, name, STORED.get(kind, "float32"), (len(ids), *self.shapes[name]))
                if kind == "text":
                    self._create(split, f"{name}.lengths", "int32", (len(ids),))
        return set()

    def _create(self, split: Split, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        path = array_path(self.folder, split, name)
        if np.prod(shape) == 0:
            np.save(path, np.zeros(shape, dtype))
        else:
            np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape).flush()

    def _write(self, name: str, split: Split, start: int, stop: int, opened: dict[Path, Mapped]) -> None:
        kind = self.dataset.modalities[name]
        arrays, lengths = self.raw.arrays(kind, self.dataset.read(split, name, range(start, stop)))
        stored = self._opened(split, name, opened)
        for row, array in enumerate(arrays, start):
            if array.shape != self.shapes[name]:
                remedy = "; set backbone.size and backbone.channels to bring all to one" * (kind == "image")
                raise InputError(
                    f"{split} sample '{self.ids[split][row]}' of modality '{name}' has the shape "
                    f"{array.shape}, the first one {self.shapes[name]}{remedy}"
                )
            with np.errstate(over="ignore"):
                stored[row] = array
            if not np.isfinite(stored[row]).all():
                raise InputError(
                    f"{split} sample '{self.ids[split][row]}' of modality '{name}' has values that are not "
                    f"finite in {stored.dtype}; repair it, or leave it out"
                )
        if lengths is not None:
            self._opened(split, f"{name}.lengths", opened)[start:stop] = lengths

    def _opened(self, split: Split, name: str, opened: dict[Path, Mapped]) -> Mapped:
        path = array_path(self.folder, split, name)
        if path not in opened:
            opened[path] = np.lib.format.open_memmap(path, "r+")
        return opened[path]

    def _mark(self, done: set[int], opened: dict[Path, Mapped]) -> None:
        """Note what is done, after it is on the disk."""
        for array in opened.values():
            array.flush()
        opened.clear()
        write_json(self.folder / PROGRESS_FILE, {"plan": self.plan, "done": sorted(done)})

    def _moments(self, name: str) -> Moments:
        """Of the stored training samples; of texts, over their tokens."""
        kind = self.dataset.modalities[name]
        values = np.load(array_path(self.folder, "train", name), mmap_mode="r")
        moments = Moments(kind)
        lengths = None
        if kind == "text":
            lengths = np.load(array_path(self.folder, "train", f"{name}.lengths"))
        for start in range(0, len(values), CHUNK_ROWS):
            block = np.asarray(values[start : start + CHUNK_ROWS])
            if kind == "image":
                block = block / 255
            if lengths is not None:
                block = block[np.arange(block.shape[1]) < lengths[start : start + CHUNK_ROWS, None]]
            moments.add(block)
        return moments


class RawCache:
    """What `Raw.write` wrote.

    Attributes:
        infos: the arrays' shapes and kinds, under the names of their modalities.
        statistics: mean and standard deviation (C,) by channel of the training samples: of colours in [0, 1],
            of features, of coordinates; one value of a video. Those of texts are over their tokens.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises InputError where it is not complete."""
        if not (folder / LAYOUT_FILE).exists():
            raise InputError(f"'{folder}' holds no complete arrays; run the features stage again")
        layout = read_json(folder / LAYOUT_FILE)
        self.folder = folder
        self.infos: InputInfos = {
            name: InputInfo(tuple(one["shape"]), name, one["kind"])
            for name, one in layout["modalities"].items()
        }
        self.statistics = {
            name: (torch.tensor(one["mean"]), torch.tensor(one["std"]))
            for name, one in layout["modalities"].items()
        }
        self._rows: dict[Split, int] = layout["rows"]

    def rows(self, split: Split) -> int:
        """Number of samples in a split."""
        return self._rows[split]

    def array(self, split: Split, name: str) -> NDArray[Any]:
        """A modality of a split, (n, ...) in the type in which it is kept, memory-mapped."""
        path = array_path(self.folder, split, name)
        array: NDArray[Any] = np.load(path, mmap_mode="r" if self.rows(split) else None)
        return array

    def lengths(self, split: Split, name: str) -> NDArray[np.int32] | None:
        """(n,) numbers of tokens of a modality of texts; None for other kinds."""
        if self.infos[name].kind != "text":
            return None
        lengths: NDArray[np.int32] = np.load(array_path(self.folder, split, f"{name}.lengths"))
        return lengths

    def source(
        self,
        split: Split,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        names: tuple[str, ...] | None = None,
        views: LiveViews | None = None,
        device: torch.device | str = "cpu",
    ) -> RawSource:
        """Samples of a split in these views."""
        return RawSource(self, split, rows, labels, names, views, device=device)

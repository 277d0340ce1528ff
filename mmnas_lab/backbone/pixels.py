"""No backbone: networks that read the pictures themselves, which lie on the device as uint8."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmnas_lab.backbone.base import LiveViews, Progress
from mmnas_lab.dataset.base import SPLITS, LabelFree
from mmnas_lab.dataset.pixel_views import PixelViews, normalised
from mmnas_lab.types import Batch, InputError, InputInfo, InputInfos, Inputs, Split

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mmnas_lab.dataset.views import ViewFamily

LAYOUT_FILE = "pixels.json"
CHUNK_ROWS = 512


class Pixels:
    """Pictures as they are, in one size.

    Args:
        size: height and width that pictures are brought to: the shorter side is resized (bicubic), the
            longer one cropped to its middle. None: they must all have the size of the first.
    """

    label_free = True

    def __init__(self, size: int | None = None) -> None:
        if size is not None and size < 1:
            raise InputError(f"backbone.size must be at least 1, got {size}")
        self.size = size

    def check(self, dataset_modalities: dict[str, str]) -> None:
        """Refuse a dataset that is not of pictures alone. Raises InputError."""
        if list(dataset_modalities.values()) != ["image"]:
            raise InputError(
                f"backbone=pixels reads pictures alone, the dataset has {', '.join(dataset_modalities)}; "
                "choose a dataset of pictures, or another backbone"
            )

    def settings(self) -> dict[str, Any]:
        """Everything that decides the pixels."""
        return {"kind": "pixels", "size": self.size}

    def views(self, families: dict[str, ViewFamily], modalities: dict[str, str]) -> dict[str, ViewFamily]:
        """None: pictures have views of whole batches."""
        return {}

    def write(self, dataset: LabelFree, folder: Path, progress: Progress | None = None) -> None:
        """Decode all pictures into `<split>.npy`, (n, 3, H, W) uint8, with the training pictures' statistics.

        Raises:
            InputError: a picture of another size than the first one, where `size` is not set.
        """
        (name,) = dataset.modalities
        shape: tuple[int, int] | None = None
        total, squares, count = np.zeros(3), np.zeros(3), 0
        rows = {split: len(dataset.ids(split)) for split in SPLITS}
        chunks: Iterable[tuple[Split, range]] = [
            (split, range(start, min(start + CHUNK_ROWS, rows[split])))
            for split in SPLITS
            for start in range(0, rows[split], CHUNK_ROWS)
        ]
        if progress is not None:
            chunks = progress(chunks, "features", len(list(chunks)))
        arrays: dict[Split, NDArray[np.uint8]] = {}
        for split, chunk in chunks:
            pictures = [self.sized(picture) for picture in dataset.read(split, name, chunk)]
            for row, picture in zip(chunk, pictures, strict=True):
                shape = picture.shape[1:] if shape is None else shape
                if picture.shape[1:] != shape:
                    height, width = picture.shape[1:]
                    raise InputError(
                        f"{split} picture '{dataset.ids(split)[row]}' is {width} x {height}, the first one "
                        f"{shape[1]} x {shape[0]}; set backbone.size to bring all to one size"
                    )
            assert shape is not None
            if split not in arrays:
                path = folder / f"{split}.npy"
                arrays[split] = np.lib.format.open_memmap(
                    path, "w+", dtype=np.uint8, shape=(rows[split], 3, *shape)
                )
            block = np.stack(pictures)
            arrays[split][chunk.start : chunk.stop] = block
            if split == "train":
                values = block.astype(np.float64) / 255
                total += values.sum((0, 2, 3))
                squares += (values**2).sum((0, 2, 3))
                count += values.size // 3
        if shape is None or not count:
            raise InputError(f"dataset '{dataset.name}' has no training picture")
        for split in SPLITS:
            if split not in arrays:
                np.save(folder / f"{split}.npy", np.zeros((0, 3, *shape), np.uint8))
            else:
                arrays[split].flush()  # type: ignore[attr-defined]
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        layout = {
            "modality": name,
            "shape": [3, *shape],
            "rows": rows,
            "mean": mean.tolist(),
            "std": np.where(std < 1e-6, 1.0, std).tolist(),
        }
        (folder / LAYOUT_FILE).write_text(json.dumps(layout))

    def open(self, folder: Path) -> PixelCache:
        """What `write` wrote. Raises InputError where it is not complete."""
        return PixelCache(folder)

    def sized(self, picture: Image.Image) -> NDArray[np.uint8]:
        """(3, H, W) values of a picture in the size of all."""
        pixels = to_size(picture.convert("RGB"), self.size)
        return np.asarray(pixels, np.uint8).transpose(2, 0, 1)


def to_size(picture: Image.Image, size: int | tuple[int, int] | None) -> Image.Image:
    """A picture in another size (bicubic).

    Args:
        picture: any.
        size: a number: the shorter side is resized to it, the longer one cropped to its middle. Height and
            width: resized without cropping. None: left as it is.
    """
    if size is None:
        return picture
    if isinstance(size, tuple):
        height, width = size
        if picture.size == (width, height):
            return picture
        return picture.resize((width, height), Image.Resampling.BICUBIC)
    if picture.size == (size, size):
        return picture
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


class PixelCache:
    """What `Pixels.write` wrote.

    Attributes:
        infos: the one input and its shape (3, H, W), under the modality's name.
        statistics: mean and standard deviation (3,) of the training pictures' values in [0, 1].
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises InputError where it is not complete."""
        if not (folder / LAYOUT_FILE).exists():
            raise InputError(f"'{folder}' holds no complete pictures; run the features stage again")
        layout = json.loads((folder / LAYOUT_FILE).read_text())
        self.folder = folder
        self.name: str = layout["modality"]
        self.infos: InputInfos = {self.name: InputInfo(tuple(layout["shape"]), self.name, "image")}
        self.statistics = {self.name: (torch.tensor(layout["mean"]), torch.tensor(layout["std"]))}

    def array(self, split: Split) -> NDArray[np.uint8]:
        """(n, 3, H, W) uint8, memory-mapped."""
        path = self.folder / f"{split}.npy"
        array: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        return array if array.size else np.load(path)

    def source(
        self,
        split: Split,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        names: tuple[str, ...] | None = None,
        views: LiveViews | None = None,
        device: torch.device | str = "cpu",
    ) -> PixelSource:
        """Pictures of a split in these views."""
        return PixelSource(self, split, rows, labels, views.pixels if views else None, device=device)


class PixelSource:
    """Pictures of one split by position, on the device as far as they fit; a `loader.Source`.

    Attributes:
        infos: the one input.
        labels: labels of the samples; None where they are hidden.
    """

    def __init__(
        self,
        cache: PixelCache,
        split: Split,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        views: PixelViews | None = None,
        in_memory_bytes: int = 4 << 30,
        device: torch.device | str = "cpu",
    ) -> None:
        """Open the pictures.

        Args:
            cache: the decoded pictures.
            split: which samples.
            rows: (n,) long, rows of the split that are the samples; None: all.
            labels: aligned with the rows of the split.
            views: random changes of `views` and `mixed`.
            in_memory_bytes: up to this size the pictures are kept on the device.
            device: where batches are given.
        """
        array = cache.array(split)
        rows = torch.arange(len(array)) if rows is None else rows.cpu().long()
        self.infos, self.name = cache.infos, cache.name
        self.device = torch.device(device)
        self.labels: Tensor | None = None
        if labels is not None:
            if len(labels) != len(array):
                raise InputError(f"'{split}' has {len(array)} pictures, got labels of {len(labels)}")
            chosen = labels.cpu()[rows]
            self.labels = (chosen.float() if chosen.ndim == 2 else chosen.long()).to(self.device)
        self._rows, self._array = rows, array
        self._views = views or PixelViews()
        self._mean, self._std = (value.to(self.device) for value in cache.statistics[cache.name])
        size = len(rows) * int(np.prod(array.shape[1:]))
        self._memory: Tensor | None = None
        if size <= in_memory_bytes:
            self._memory = torch.from_numpy(np.asarray(array[rows.numpy()])).to(self.device)

    def __len__(self) -> int:
        return len(self._rows)

    def clean(self, index: Tensor) -> Batch:
        """The pictures as they are, normalised: (B, 3, H, W) float32."""
        pixels = normalised(self._pictures(index).float().div_(255), self._mean, self._std)
        return self._batch(index, {self.name: pixels})

    def views(self, index: Tensor, generator: torch.Generator, count: int) -> Batch:
        """One or two random views of each picture."""
        if count not in (1, 2):
            raise ValueError(f"PixelSource.views gives 1 or 2 views, got count={count}")
        images = self._pictures(index)
        views = [
            {self.name: self._views(images, self._mean, self._std, generator, second=bool(k))}
            for k in range(count)
        ]
        return self._batch(index, *views)

    def mixed(self, index: Tensor, generator: torch.Generator, clean_probability: float) -> Batch:
        """One view of each picture: itself with a probability, else a random view."""
        clean = torch.rand(len(index), generator=generator, device=generator.device) < clean_probability
        viewed = self.views(index, generator, 1).views[0][self.name]
        if clean.any():
            itself = self.clean(index).views[0][self.name]
            viewed = torch.where(clean.to(viewed.device)[:, None, None, None], itself, viewed)
        return self._batch(index, {self.name: viewed})

    def _pictures(self, index: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 on the device."""
        if self._memory is not None:
            return self._memory.index_select(0, index.to(self.device))
        rows = self._rows[index.cpu()].numpy()
        return torch.from_numpy(self._array[rows]).to(self.device)

    def _batch(self, index: Tensor, *views: Inputs) -> Batch:
        labels = None if self.labels is None else self.labels[index.to(self.device)]
        return Batch(views, labels)

"""Pictures of one class each: CIFAR-10 and CIFAR-100, ImageNet, and any folder of classes."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.types import InputError, Split, Task

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test",),
}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True)
class Picture:
    """One row, without its label: its identity, and its pixels or the file or bytes that hold them."""

    id: str
    content: Path | bytes | NDArray[np.uint8]

    def read(self) -> Image.Image:
        """The picture in RGB, decoded in full. Raises InputError."""
        if isinstance(self.content, np.ndarray):
            return Image.fromarray(self.content)
        file = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content
        try:
            with Image.open(file) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"cannot read the picture '{self.id}': {error}") from error

    def digest(self) -> bytes:
        """Hash of identity and content; a file counts by its size."""
        if isinstance(self.content, Path):
            content = str(self.content.stat().st_size).encode()
        else:
            content = self.content if isinstance(self.content, bytes) else self.content.tobytes()
        return hashlib.blake2b(self.id.encode() + b"\0" + content, digest_size=16).digest()


class PictureFiles(Protocol):
    """A way in which pictures and classes lie on disk. Splits that are not there are absent."""

    def pictures(self) -> dict[Split, list[Picture]]:
        """All pictures; reads no label."""

    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their indices."""

    def labels(self, split: Split) -> list[int]:
        """Class index of each of `pictures()[split]`."""


class ImageClasses:
    """What the datasets of pictures with one class each have in common.

    Splits that the files lack are taken out of train by a hash of the identity, which reads no label.

    Args:
        path: where the files lie.
        val_share: share of the training pictures that becomes val where the files have none, in [0, 1).
        test_share: likewise test.
        on_bad_sample: what becomes of pictures that cannot be decoded: `stop` lists them all, `skip` leaves
            them out.
    """

    name = "images"
    task: Task = "multiclass"

    def __init__(
        self,
        path: str,
        val_share: float = 0.1,
        test_share: float = 0.1,
        on_bad_sample: Literal["stop", "skip"] = "stop",
    ) -> None:
        for key, share in (("val_share", val_share), ("test_share", test_share)):
            if not 0 <= share < 1:
                raise InputError(f"dataset.{key} must be in [0, 1), got {share:g}; 0.1 is usual")
        if on_bad_sample not in ("stop", "skip"):
            raise InputError(f"dataset.on_bad_sample must be stop or skip, got '{on_bad_sample}'")
        self.path = Path(path)
        self.val_share, self.test_share, self.on_bad_sample = val_share, test_share, on_bad_sample
        self.modalities = {"image": "image"}
        self._rows: dict[Split, list[tuple[Split, int]]] = {}  # of this split: split and row in the files

    def files(self) -> PictureFiles:
        """How the data lies under `path`. Raises InputError."""
        raise NotImplementedError

    @cached_property
    def _files(self) -> PictureFiles:
        return self.files()

    @cached_property
    def _pictures(self) -> dict[Split, list[Picture]]:
        return self._files.pictures()

    @property
    def classes(self) -> tuple[str, ...]:
        return self._files.classes()

    def open(self) -> None:
        if self._rows:
            return
        found = self._pictures
        if not found.get("train"):
            raise InputError(f"no training picture under '{self.path}'; each class needs some")
        rows: dict[Split, list[tuple[Split, int]]] = {
            split: [(split, row) for row in range(len(found.get(split, ())))] for split in SPLITS
        }
        for split, share in (("test", self.test_share), ("val", self.val_share)):
            if split not in found:
                ids = [found["train"][row].id for _, row in rows["train"]]
                taken = held_out(ids, share, split)
                rows[split] = [rows["train"][k] for k in sorted(taken)]  # type: ignore[index]
                rows["train"] = [row for k, row in enumerate(rows["train"]) if k not in taken]
        self._rows = rows

    def ids(self, split: Split) -> list[str]:
        return [picture.id for picture in self._chosen(split)]

    def read(self, split: Split, modality: str, rows: Sequence[int]) -> list[Any]:
        if modality != "image":
            raise InputError(f"dataset '{self.name}' has the modality image, got '{modality}'")
        self.open()
        return [self._pictures[name][own].read() for name, own in (self._rows[split][row] for row in rows)]

    def unreadable(self, split: Split) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for row, picture in enumerate(self._chosen(split)):
            if not isinstance(picture.content, np.ndarray):
                try:
                    picture.read()
                except InputError as error:
                    reasons[row] = str(error)
        return reasons

    def drop(self, rows: dict[Split, list[int]]) -> None:
        self.open()
        for split, dropped in rows.items():
            gone = set(dropped)
            self._rows[split] = [row for k, row in enumerate(self._rows[split]) if k not in gone]

    def fingerprint(self) -> str:
        total = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            chosen = self._chosen(split)
            total.update(f"{split}:{len(chosen)};".encode())
            for picture in chosen:
                total.update(picture.digest())
        return total.hexdigest()

    def labels(self, split: Split) -> Tensor:
        self.open()
        by_split = {name: self._files.labels(name) for name in {name for name, _ in self._rows[split]}}
        return torch.tensor([by_split[name][row] for name, row in self._rows[split]], dtype=torch.int64)

    def label_fingerprint(self) -> str:
        total = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            labels = self.labels(split)
            total.update(f"{split}:{len(labels)};".encode() + labels.numpy().tobytes())
        return total.hexdigest()

    def _chosen(self, split: Split) -> list[Picture]:
        self.open()
        return [self._pictures[name][row] for name, row in self._rows[split]]


def held_out(ids: Sequence[str], share: float, purpose: str) -> set[int]:
    """round(share * n) rows, the same ones for the same ids in any order, without a look at labels."""
    digests = [hashlib.blake2b(f"{purpose}\0{name}".encode(), digest_size=8).digest() for name in ids]
    return set(sorted(range(len(ids)), key=lambda row: digests[row])[: round(share * len(ids))])


class CIFAR(ImageClasses):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test pictures of 32 x 32.

    `path` holds the authors' Python archive (`cifar-10-batches-py`, `cifar-100-python`, as torchvision
    downloads them), or parquet files `train*.parquet` and `test*.parquet` with the columns `image` (or
    `img`) and `label` (`fine_label` for the 100 classes).

    Args:
        path: the folder.
        num_classes: 10 or 100.
        val_share: share of the training pictures that becomes val, in [0, 1).
        on_bad_sample: `stop` or `skip`.
    """

    def __init__(
        self,
        path: str,
        num_classes: Literal[10, 100] = 10,
        val_share: float = 0.1,
        on_bad_sample: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__(path, val_share, 0.0, on_bad_sample)
        if num_classes not in (10, 100):
            raise InputError(f"dataset.num_classes of CIFAR must be 10 or 100, got {num_classes}")
        self.num_classes = num_classes
        self.name = f"cifar{num_classes}"

    def files(self) -> PictureFiles:
        archive = "cifar-10-batches-py" if self.num_classes == 10 else "cifar-100-python"
        for folder in (self.path / archive, self.path):
            if (folder / ("data_batch_1" if self.num_classes == 10 else "meta")).is_file():
                return PickledCIFAR(folder, self.num_classes)
        found = parquet_files(self.path)
        if "train" in found and "test" in found:
            label = ("label",) if self.num_classes == 10 else ("fine_label", "label")
            return ParquetPictures(found, label, self.num_classes)
        raise InputError(
            f"CIFAR-{self.num_classes} needs '{self.path / archive}' or parquet files train*.parquet and "
            f"test*.parquet in '{self.path}'; get it with `python scripts/prepare_cifar.py --classes "
            f"{self.num_classes} --path {self.path}`, or set dataset.path= to a folder that has it"
        )


class ImageFolder(ImageClasses):
    """A folder of classes: `<path>/<class>/<picture>`, or `<path>/train/<class>/<picture>` and so on.

    Splits are the folders train, val (or valid, validation, dev) and test. Where there are train and val
    but no test, as in ImageNet, val is the test split, and val is taken out of train.

    Args:
        path: the folder.
        val_share: see `ImageClasses`.
        test_share: see `ImageClasses`.
        on_bad_sample: `stop` or `skip`.
        name: of the dataset in stage folders and messages.
    """

    def __init__(
        self,
        path: str,
        val_share: float = 0.1,
        test_share: float = 0.1,
        on_bad_sample: Literal["stop", "skip"] = "stop",
        name: str = "image_folder",
    ) -> None:
        super().__init__(path, val_share, test_share, on_bad_sample)
        self.name = name

    def files(self) -> PictureFiles:
        if not self.path.is_dir():
            raise InputError(
                f"the folder of classes '{self.path}' does not exist; set dataset.path= to a folder with one "
                "subfolder of pictures for each class"
            )
        return FolderPictures(self.path)


class FolderPictures:
    """Pictures in one folder a class, perhaps in one folder a split above."""

    def __init__(self, path: Path) -> None:
        self.path = path
        split_folders = {
            split: path / name
            for split, names in SPLIT_NAMES.items()
            for name in names
            if (path / name).is_dir()
        }
        if "train" not in split_folders:
            split_folders = {"train": path}
        elif "val" in split_folders and "test" not in split_folders:
            split_folders["test"] = split_folders.pop("val")
        self.folders = split_folders
        names = sorted(folder.name for folder in self.folders["train"].iterdir() if folder.is_dir())
        if len(names) < 2:
            raise InputError(
                f"'{self.folders['train']}' has {len(names)} folders of pictures, and a classifier needs at "
                "least two classes; put the pictures of each class in a folder of its own"
            )
        self.names = tuple(names)

    @cached_property
    def _found(self) -> dict[Split, list[tuple[Path, int]]]:
        found: dict[Split, list[tuple[Path, int]]] = {}
        for split, folder in self.folders.items():
            unknown = sorted({f.name for f in folder.iterdir() if f.is_dir()} - set(self.names))
            if unknown:
                raise InputError(
                    f"'{folder}' has the class '{unknown[0]}', which '{self.folders['train']}' has not; "
                    "rename the folder, or add training pictures of that class"
                )
            found[split] = [
                (file, index)
                for index, name in enumerate(self.names)
                for file in sorted((folder / name).rglob("*"))
                if file.suffix.lower() in SUFFIXES
            ]
        return found

    def pictures(self) -> dict[Split, list[Picture]]:
        return {
            split: [Picture(str(file.relative_to(self.path)), file) for file, _ in files]
            for split, files in self._found.items()
        }

    def classes(self) -> tuple[str, ...]:
        return self.names

    def labels(self, split: Split) -> list[int]:
        return [index for _, index in self._found[split]]


def parquet_files(path: Path) -> dict[Split, list[Path]]:
    """Parquet files by split, as far as there are any."""
    found = {
        split: sorted(file for name in names for file in path.glob(f"{name}*.parquet"))
        for split, names in SPLIT_NAMES.items()
    }
    return {split: files for split, files in found.items() if files}


class ParquetPictures:
    """Pictures as encoded bytes in parquet files, as Hugging Face's `datasets` writes them."""

    def __init__(
        self, files: dict[Split, list[Path]], label_columns: tuple[str, ...], num_classes: int
    ) -> None:
        self.files, self.label_columns, self.num_classes = files, label_columns, num_classes

    def pictures(self) -> dict[Split, list[Picture]]:
        found: dict[Split, list[Picture]] = {}
        for split, files in self.files.items():
            found[split] = []
            for file in files:
                column = self._column(file, ("image", "img"))
                for value in pq.read_table(file, columns=[column])[column].to_pylist():
                    content = value["bytes"] if isinstance(value, dict) else value
                    if content is None:
                        raise InputError(f"'{file}' has rows without bytes in '{column}'; embed the pictures")
                    found[split].append(Picture(f"{split}-{len(found[split]):06d}", content))
        return found

    def classes(self) -> tuple[str, ...]:
        file = self.files["train"][0]
        column = self._column(file, self.label_columns)
        features = json.loads((pq.read_schema(file).metadata or {}).get(b"huggingface", b"{}"))
        names = features.get("info", {}).get("features", {}).get(column, {}).get("names")
        return tuple(names) if names else tuple(f"class {k}" for k in range(self.num_classes))

    def labels(self, split: Split) -> list[int]:
        labels: list[int] = []
        for file in self.files[split]:
            column = self._column(file, self.label_columns)
            labels += pq.read_table(file, columns=[column])[column].to_pylist()
        wrong = sorted(
            {label for label in labels if label is None or not 0 <= label < self.num_classes}, key=str
        )
        if wrong:
            raise InputError(
                f"label {wrong[0]} in the {split} files is not in [0, {self.num_classes}); repair the column"
            )
        return labels

    def _column(self, file: Path, names: tuple[str, ...]) -> str:
        found = pq.read_schema(file).names
        for name in names:
            if name in found:
                return name
        raise InputError(f"'{file}' has no column '{names[0]}'; it has: {', '.join(found)}. Rename or add it")


class PickledCIFAR:
    """The authors' Python archive: pickles of (n, 3072) uint8, opened without running what they name."""

    def __init__(self, folder: Path, num_classes: int) -> None:
        self.folder = folder
        self.batches: dict[Split, list[str]] = {"train": ["train"], "test": ["test"]}
        if num_classes == 10:
            self.batches = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
        self.label_key = "labels" if num_classes == 10 else "fine_labels"
        self.names = ("batches.meta", "label_names") if num_classes == 10 else ("meta", "fine_label_names")

    def pictures(self) -> dict[Split, list[Picture]]:
        found: dict[Split, list[Picture]] = {}
        for split, batches in self.batches.items():
            data = np.concatenate([np.asarray(self._load(name)["data"], np.uint8) for name in batches])
            images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            found[split] = [
                Picture(f"{split}-{row:06d}", np.ascontiguousarray(image)) for row, image in enumerate(images)
            ]
        return found

    def classes(self) -> tuple[str, ...]:
        file, key = self.names
        return tuple(name.decode() if isinstance(name, bytes) else name for name in self._load(file)[key])

    def labels(self, split: Split) -> list[int]:
        return [int(label) for name in self.batches[split] for label in self._load(name)[self.label_key]]

    def _load(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        try:
            with file.open("rb") as stream:
                content = ArrayUnpickler(stream, encoding="bytes").load()
        except FileNotFoundError:
            raise InputError(f"'{file}' is missing; get the archive anew") from None
        except (pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise InputError(f"'{file}' cannot be read ({error}); get the archive anew") from None
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that makes plain values and numpy arrays, and refuses all else that a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in (
            "_reconstruct",
            "ndarray",
            "dtype",
            "scalar",
            "_frombuffer",
        ):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not an array")

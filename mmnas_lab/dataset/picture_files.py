"""How pictures of one class each lie on disk: folders of classes, parquet files, CIFAR's Python archive."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from mmnas_lab.types import InputError, Split

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

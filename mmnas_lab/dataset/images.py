"""Pictures of one class each: CIFAR-10 and CIFAR-100, ImageNet, and any folder of classes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.dataset.picture_files import (
    FolderPictures,
    ParquetPictures,
    PickledCIFAR,
    Picture,
    PictureFiles,
    parquet_files,
)
from mmnas_lab.types import InputError, Split, Task


class ImageClasses(ABC):
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

    @abstractmethod
    def files(self) -> PictureFiles:
        """How the data lies under `path`. Raises InputError."""

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

"""What datasets of records have in common: rows in use, hashes, and samples that cannot be read."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.types import InputError, Settings, Split, Task

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Record(Protocol):
    """What identifies and holds one sample in all its modalities, without its label."""

    @property
    def id(self) -> str:
        """Unique over all splits."""

    def digest(self) -> bytes:
        """Hash of identity and content; a file counts by its size."""


R = TypeVar("R", bound=Record)


class RecordDataset(ABC, Generic[R]):
    """A multiclass dataset with one record a row.

    Args:
        path: where the data lies.
        modalities: kind of each modality by its name.
        on_bad_sample: what becomes of samples that cannot be used: `stop` lists them all, `skip` leaves them
            out.

    Raises:
        InputError: an unknown `on_bad_sample`.
    """

    name: str
    task: Task = "multiclass"
    classes: tuple[str, ...]

    def __init__(
        self, path: str, modalities: dict[str, str], on_bad_sample: Literal["stop", "skip"] = "stop"
    ) -> None:
        if on_bad_sample not in ("stop", "skip"):
            raise InputError(f"dataset.on_bad_sample must be stop or skip, got '{on_bad_sample}'")
        self.path = Path(path)
        self.modalities = modalities
        self.on_bad_sample = on_bad_sample
        self._all: dict[Split, list[R]] = {}  # as found
        self._used: dict[Split, list[R]] = {}  # as found, less what was dropped

    @abstractmethod
    def index(self) -> dict[Split, list[R]]:
        """All records of each split. Raises InputError."""

    @abstractmethod
    def sample(self, record: R, modality: str) -> Any:
        """Raw sample of one modality. Raises InputError where it cannot be used."""

    @abstractmethod
    def label(self, record: R) -> int:
        """Class index. Raises InputError."""

    @abstractmethod
    def settings(self) -> Settings:
        """What decides the samples beside the records."""

    def problem(self, record: R) -> str | None:
        """Why a record cannot be used; None where it can."""
        reasons = []
        for modality in self.modalities:
            try:
                self.sample(record, modality)
            except InputError as error:
                reasons.append(str(error))
        return "; ".join(dict.fromkeys(reasons)) or None

    def open(self) -> None:
        if self._all:
            return
        found = self.index()
        seen: set[str] = set()
        for split in SPLITS:
            if not found[split]:
                raise InputError(
                    f"dataset '{self.name}' found no sample for the {split} split in '{self.path}'; each "
                    "split needs at least one"
                )
            for record in found[split]:
                if record.id in seen:
                    raise InputError(
                        f"the sample '{record.id}' of dataset '{self.name}' occurs twice in '{self.path}'; "
                        "keep one of them"
                    )
                seen.add(record.id)
        self._all, self._used = found, {split: list(found[split]) for split in SPLITS}

    def ids(self, split: Split) -> list[str]:
        return [record.id for record in self.records(split)]

    def read(self, split: Split, modality: str, rows: Sequence[int]) -> list[Any]:
        if modality not in self.modalities:
            raise InputError(
                f"dataset '{self.name}' has the modalities {', '.join(self.modalities)}, got '{modality}'"
            )
        records = self.records(split)
        return [self.sample(records[row], modality) for row in rows]

    def unreadable(self, split: Split) -> dict[int, str]:
        reasons = {row: self.problem(record) for row, record in enumerate(self.records(split))}
        return {row: reason for row, reason in reasons.items() if reason is not None}

    def drop(self, rows: dict[Split, list[int]]) -> None:
        self.open()
        for split, dropped in rows.items():
            gone = set(dropped)
            self._used[split] = [r for row, r in enumerate(self._used[split]) if row not in gone]

    def fingerprint(self) -> str:
        """Hash of the settings and of all records in use."""
        total = hashlib.blake2b(json.dumps(self.settings(), sort_keys=True).encode(), digest_size=16)
        for split in SPLITS:
            total.update(f"{split}:{len(self.records(split))};".encode())
            for record in self.records(split):
                total.update(record.digest())
        return total.hexdigest()

    def labels(self, split: Split) -> Tensor:
        return torch.tensor([self.label(record) for record in self.records(split)], dtype=torch.int64)

    def label_fingerprint(self) -> str:
        total = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            labels = self.labels(split)
            total.update(f"{split}:{len(labels)};".encode() + labels.numpy().tobytes())
        return total.hexdigest()

    def records(self, split: Split, dropped: bool = False) -> list[R]:
        """The records in use, or with `dropped` those that were left out as well."""
        self.open()
        return (self._all if dropped else self._used)[split]


def digest_of(*parts: Buffer) -> bytes:
    """One hash of several byte strings or buffers, each with its length."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        view = memoryview(part)
        digest.update(view.nbytes.to_bytes(8, "little"))
        digest.update(view)
    return digest.digest()

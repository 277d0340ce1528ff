"""A long tail cut into the training pictures of any labelled dataset, and its test sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmnas_lab.dataset.base import SPLITS, Dataset
from mmnas_lab.dataset.images import held_out
from mmnas_lab.types import InputError, Split, Task

MANY, FEW = 100, 20
"""More training samples than the first are many, fewer than the second are few (Liu et al. 2019)."""

Profile = Literal["exponential", "step"]


def class_counts(largest: int, num_classes: int, profile: Profile, mu: float) -> list[int]:
    """Samples that each class keeps, from the head to the tail (LDAM's recipe for CIFAR, Cao et al. 2019).

    Args:
        largest: samples of the first class.
        num_classes: Y.
        profile: `exponential` is largest * mu^(c / (Y - 1)); `step` leaves the first Y / 2 classes whole and
            keeps largest * mu of the others.
        mu: smallest class over largest, in (0, 1].

    Returns:
        Y counts, rounded down.
    """
    if profile == "step":
        head = num_classes // 2
        counts = [float(largest)] * head + [largest * mu] * (num_classes - head)
    else:
        counts = [largest * mu ** (c / max(num_classes - 1, 1)) for c in range(num_classes)]
    return [int(count + 1e-9) for count in counts]  # 0.01 ** 1.0 * 5000 must not become 49


class LongTail:
    """A dataset whose training rows thin out from class to class.

    For one class a sample, each class keeps its count of `class_counts`, the largest class of the dataset
    being the measure. With several labels a sample, rows are visited in their random order and kept unless
    one of their classes is full, so no class exceeds its count; rows without a label stay.

    The val split is a share of the long-tailed rows, taken without a look at labels. The test split stays as
    it is; `subsets` names its long-tailed part, which has the same profile, and the rows whose class has
    many, a medium number of or few training samples.

    Args:
        dataset: the dataset; its own val split is put back into train first.
        profile: `exponential` or `step`.
        mu: smallest class over largest, in (0, 1].
        val_share: share of the long-tailed rows that becomes val, in [0, 1).
        class_order: which class is the head: `index`, or `shuffled` by the seed.
        seed: of the rows that are kept, and of the shuffled order.

    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        dataset: Dataset,
        profile: Profile = "exponential",
        mu: float = 0.01,
        val_share: float = 0.1,
        class_order: Literal["index", "shuffled"] = "index",
        seed: int = 0,
    ) -> None:
        if not 0 < mu <= 1:
            raise InputError(
                f"dataset.mu must be in (0, 1], got {mu:g}: it is the smallest class over "
                "the largest, such as 0.1 or 0.01; 1 leaves the classes as they are"
            )
        if not 0 <= val_share < 1:
            raise InputError(f"dataset.val_share must be in [0, 1), got {val_share:g}; 0.1 is usual")
        self.dataset, self.profile, self.mu, self.val_share = dataset, profile, mu, val_share
        self.class_order, self.seed = class_order, seed
        self.name = f"{dataset.name}_lt"
        self.task: Task = dataset.task
        self.modalities = dataset.modalities
        if hasattr(dataset, "on_bad_sample"):
            self.on_bad_sample = dataset.on_bad_sample
        self._rows: dict[Split, list[tuple[Split, int]]] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    def open(self) -> None:
        if self._rows:
            return
        self.dataset.open()
        pool: list[tuple[Split, int]] = [
            (split, row) for split in ("train", "val") for row in range(len(self.dataset.ids(split)))
        ]
        labels = torch.cat([self.dataset.labels("train"), self.dataset.labels("val")])
        kept = [pool[k] for k in self._thinned(pool, labels, train=True)]
        ids = {split: self.dataset.ids(split) for split in SPLITS}
        held = held_out([ids[split][row] for split, row in kept], self.val_share, "val")
        self._rows = {
            "train": [row for k, row in enumerate(kept) if k not in held],
            "val": [row for k, row in enumerate(kept) if k in held],
            "test": [("test", row) for row in range(len(ids["test"]))],
        }

    def _order(self) -> list[int]:
        """Classes from head to tail."""
        count = len(self.classes)
        if self.class_order == "index":
            return list(range(count))
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()

    def _room(self, members: Tensor) -> Tensor:
        """(Y,) samples that each class may keep, of members (n, Y)."""
        counts = class_counts(int(members.sum(0).max()), len(self.classes), self.profile, self.mu)
        room = torch.zeros(len(self.classes), dtype=torch.int64)
        room[self._order()] = torch.tensor(counts)
        return room

    def _thinned(self, rows: Sequence[tuple[Split, int]], labels: Tensor, train: bool = False) -> list[int]:
        """Positions in `rows` that are kept, in their order."""
        members = labels.bool() if labels.ndim == 2 else one_hot(labels, len(self.classes))
        left = self._room(members).tolist()
        if train and 0 in left:
            raise InputError(
                f"dataset.mu={self.mu:g} leaves no sample of class '{self.classes[left.index(0)]}'; "
                "raise mu, or use more data"
            )
        ids = {split: self.dataset.ids(split) for split in {split for split, _ in rows}}

        def place(k: int) -> bytes:
            split, row = rows[k]
            return hashlib.blake2b(f"{self.seed}\0{ids[split][row]}".encode(), digest_size=8).digest()

        kept = []
        for k in sorted(range(len(rows)), key=place):
            classes = members[k].nonzero()[:, 0].tolist()
            if all(left[c] > 0 for c in classes):
                kept.append(k)
                for c in classes:
                    left[c] -= 1
        return sorted(kept)

    def ids(self, split: Split) -> list[str]:
        self.open()
        ids = {name: self.dataset.ids(name) for name in SPLITS}
        return [ids[name][row] for name, row in self._rows[split]]

    def read(self, split: Split, modality: str, rows: Sequence[int]) -> list[Any]:
        self.open()
        wanted = [self._rows[split][row] for row in rows]
        samples: list[Any] = [None] * len(wanted)
        for name in {name for name, _ in wanted}:
            places = [k for k, (part, _) in enumerate(wanted) if part == name]
            found = self.dataset.read(name, modality, [wanted[k][1] for k in places])
            for k, sample in zip(places, found, strict=True):
                samples[k] = sample
        return samples

    def unreadable(self, split: Split) -> dict[int, str]:
        self.open()
        reasons = {name: self.dataset.unreadable(name) for name in {name for name, _ in self._rows[split]}}
        return {
            k: reasons[name][row] for k, (name, row) in enumerate(self._rows[split]) if row in reasons[name]
        }

    def drop(self, rows: dict[Split, list[int]]) -> None:
        self.open()
        for split, dropped in rows.items():
            gone = set(dropped)
            self._rows[split] = [row for k, row in enumerate(self._rows[split]) if k not in gone]

    def fingerprint(self) -> str:
        """Hash of the dataset's inputs and of the rows in use."""
        rows = "".join(f"{split}:{';'.join(self.ids(split))}\n" for split in SPLITS)
        return hashlib.blake2b((self.dataset.fingerprint() + rows).encode(), digest_size=16).hexdigest()

    def labels(self, split: Split) -> Tensor:
        self.open()
        every = {name: self.dataset.labels(name) for name in {name for name, _ in self._rows[split]}}
        if not every:
            return self.dataset.labels("train")[:0]
        return torch.stack([every[name][row] for name, row in self._rows[split]])

    def label_fingerprint(self) -> str:
        total = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            total.update(f"{split};".encode() + self.labels(split).numpy().tobytes())
        return total.hexdigest()

    def subsets(self, split: Split) -> dict[str, Tensor]:
        """Rows of the test split by name: `long_tailed`, and `many_shot`, `medium_shot`, `few_shot`."""
        if split != "test":
            return {}
        self.open()
        labels = self.labels("test")
        found = {"long_tailed": torch.tensor(self._thinned(self._rows["test"], labels))}
        if self.task == "multiclass":
            seen = torch.cat([self.labels("train"), self.labels("val")])
            counts = torch.bincount(seen, minlength=len(self.classes))
            groups = {
                "many_shot": counts > MANY,
                "medium_shot": (counts >= FEW) & (counts <= MANY),
                "few_shot": counts < FEW,
            }
            found |= {name: group[labels].nonzero()[:, 0] for name, group in groups.items()}
        return {name: rows for name, rows in found.items() if len(rows)}


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(n, Y) bool of class indices (n,)."""
    return labels[:, None] == torch.arange(num_classes)

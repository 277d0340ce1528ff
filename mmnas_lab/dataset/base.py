"""What a dataset is: rows of raw samples, a few facts, and labels that can be left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from mmnas_lab.types import InputError, Split, Task

if TYPE_CHECKING:
    from torch import Tensor

SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Dataset(Protocol):
    """A labelled multimodal dataset with fixed splits. Rows are numbered from 0 in each split.

    Constructors take plain settings and check them, but read no data; `open` reads the index.
    """

    name: str
    task: Task
    modalities: dict[str, str]  # name -> kind: {"image": "image", "text": "text"}

    def open(self) -> None:
        """Read the index of all splits. Touches no label. Calling it again does nothing.

        Raises:
            InputError: data that is missing or cannot be used, with the path and the remedy.
        """

    def ids(self, split: Split) -> list[str]:
        """Identity of each row, unique over all splits."""

    def read(self, split: Split, modality: str, rows: Sequence[int]) -> list[Any]:
        """Raw samples of one modality, in the form of its kind.

        image: `PIL.Image` in mode RGB or L; text: `str`; the others float32 arrays of one shape a dataset:
        audio (1, F, T), a log-spectrogram in [0, 1]; series (T, F); skeleton (T, J, 3) coordinates of J
        joints; tabular (F,); video (T, H, W).
        """

    def unreadable(self, split: Split) -> dict[int, str]:
        """Rows that cannot be used (corrupt picture, empty text), with the reason. Slow: decodes all."""

    def drop(self, rows: dict[Split, list[int]]) -> None:
        """Leave rows out from now on; the rows after them move up."""

    def fingerprint(self) -> str:
        """Hash of ids and input columns only."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the Y classes in the order of the label columns."""

    def labels(self, split: Split) -> Tensor:
        """(n, Y) uint8 multi-hot, or (n,) int64 for a multiclass task.

        Raises:
            InputError: no labels in the data, or labels that cannot be read.
        """

    def label_fingerprint(self) -> str:
        """Hash of all labels."""


class LabelFree:
    """The same dataset without its labels: what the label-free stages are given."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.name = dataset.name
        self.modalities = dataset.modalities
        self.ids = dataset.ids
        self.read = dataset.read
        self.fingerprint = dataset.fingerprint

    def __getattr__(self, name: str) -> NoReturn:
        if name in {"labels", "label_fingerprint", "classes", "task"}:
            raise InputError(f"a label-free stage asked for '{name}' of dataset '{self.name}'")
        raise AttributeError(name)

"""What a dataset is: rows of raw samples, a few facts, and labels that can be left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from mmnas_lab.types import InputError, Split, Task

if TYPE_CHECKING:
    from torch import Tensor

SPLITS: tuple[Split, ...] = ("train", "val", "test")
CHUNK_ROWS = 64


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
        """Raw samples of one modality; those that are arrays all have one shape.

        - image: `PIL.Image` in mode RGB, or in mode L where the dataset's pictures are grey.
        - text: `str`.
        - audio: float32 array (1, F, T), a log-spectrogram in [0, 1], the lowest frequency first.
        - series: float32 array (T, F), without gaps.
        - skeleton: float32 array (T, J, 3), places of J joints.
        - tabular: float32 array (F,), without gaps.
        - video: float32 array (T, H, W) in [0, 1].
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


def training_samples(dataset: LabelFree, modality: str) -> Iterator[Any]:
    """Raw training samples of one modality, read in chunks."""
    count = len(dataset.ids("train"))
    for start in range(0, count, CHUNK_ROWS):
        yield from dataset.read("train", modality, range(start, min(start + CHUNK_ROWS, count)))

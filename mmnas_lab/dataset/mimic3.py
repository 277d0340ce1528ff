"""MIMIC-III as MultiBench shapes it: twelve measures over a day, and five descriptors."""

from __future__ import annotations

import random
import zipfile
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmnas_lab.dataset.records import RecordDataset, digest_of
from mmnas_lab.types import InputError, Settings, Split

ARRAYS: dict[str, tuple[int, ...]] = {
    "ep_tdata": (24, 12),
    "adm_features_all": (5,),
    "adm_labels_all": (6,),
    "y_icd9": (20,),
}
"""Arrays of the authors' file by their names there, and the shape of one admission in each."""

MORTALITY = (
    "survived the year",
    "died within 1 day",
    "died within 2 days",
    "died within 3 days",
    "died within 30 days",
    "died within a year",
)


@dataclass(frozen=True)
class Admission:
    """One row of the arrays.

    Attributes:
        row: in the arrays.
        series: (24, 12) measures by hour.
        descriptors: (5,) age, AIDS, haematologic malignancy, metastatic cancer, admission type.
    """

    row: int
    series: NDArray[np.float64]
    descriptors: NDArray[np.float64]

    @property
    def id(self) -> str:
        return f"admission-{self.row:05d}"

    def digest(self) -> bytes:
        return digest_of(self.id.encode(), self.series.tobytes(), self.descriptors.tobytes())


class MIMIC3(RecordDataset[Admission]):
    """MIMIC-III admissions (Johnson et al. 2016; Purushotham et al. 2018) as MultiBench uses them.

    The series (24, 12) and the tabular features (5,) with infinite and missing values set to 0, standardised
    by feature. Rows are shuffled by Python's `random` with seed 10; the first tenth is val, the second test.

    `path` is the file that `scripts/prepare_mimic3.py` makes of `im.pk`, which credentialed users get from
    MultiBench's authors.

    Args:
        path: the `.npz` file.
        target: `mortality` has six classes, the first period in which the patient died or none; `icd9` has
            two, whether a diagnosis of the group was made.
        icd9_group: column of the diagnoses, 0 to 19; MultiBench uses 1 and 7.
        statistics: rows that features are standardised by: `train`, or `all` as in MultiBench, where test
            rows have a part in it.
        on_bad_sample: `stop` or `skip`; rows without any finite measure cannot be used.

    Raises:
        InputError: a setting outside its range.
    """

    name = "mimic3"

    def __init__(
        self,
        path: str,
        target: Literal["mortality", "icd9"] = "mortality",
        icd9_group: int = 7,
        statistics: Literal["train", "all"] = "train",
        on_bad_sample: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__(path, {"series": "series", "tabular": "tabular"}, on_bad_sample)
        if target not in ("mortality", "icd9"):
            raise InputError(f"dataset.target must be mortality or icd9, got '{target}'")
        if statistics not in ("train", "all"):
            raise InputError(f"dataset.statistics must be train or all, got '{statistics}'")
        if not 0 <= icd9_group < ARRAYS["y_icd9"][0]:
            raise InputError(
                f"dataset.icd9_group must be in [0, 19], got {icd9_group}; MultiBench uses 1 and 7"
            )
        self.target, self.icd9_group, self.statistics = target, icd9_group, statistics
        group = f"a diagnosis of group {icd9_group}"
        self.classes = MORTALITY if target == "mortality" else (f"not {group}", group)

    def index(self) -> dict[Split, list[Admission]]:
        series, descriptors = self._array("ep_tdata"), self._array("adm_features_all")
        if len(series) != len(descriptors):
            raise InputError(
                f"'{self.path}' has {len(series)} series and {len(descriptors)} rows of descriptors; make it "
                "anew with `python scripts/prepare_mimic3.py`"
            )
        rows = shuffled(len(series))
        tenth, fifth = len(rows) // 10, len(rows) // 5
        found: dict[Split, list[int]] = {
            "train": rows[fifth:],
            "val": rows[:tenth],
            "test": rows[tenth:fifth],
        }
        return {
            split: [Admission(row, series[row], descriptors[row]) for row in chosen]
            for split, chosen in found.items()
        }

    def problem(self, record: Admission) -> str | None:
        if np.isfinite(record.series).any():
            return None
        return f"row {record.row} of '{self.path}' has no finite value in its series"

    def sample(self, record: Admission, modality: str) -> Any:
        if (reason := self.problem(record)) is not None:
            raise InputError(reason)
        values = record.series if modality == "series" else record.descriptors
        mean, std = self._statistics[modality]
        return ((finite(values) - mean) / std).astype(np.float32)

    def label(self, record: Admission) -> int:
        if self.target == "icd9":
            return self._label_of(record, self._labels[record.row, self.icd9_group])
        return mortality_class([self._label_of(record, value) for value in self._labels[record.row]])

    def settings(self) -> Settings:
        return {"version": 1, "statistics": self.statistics}

    def _label_of(self, record: Admission, value: float) -> int:
        if value not in (0, 1):
            raise InputError(f"labels of row {record.row} in '{self.path}' must be 0 or 1, got {value}")
        return int(value)

    @cached_property
    def _labels(self) -> NDArray[np.float64]:
        labels = self._array("adm_labels_all" if self.target == "mortality" else "y_icd9")
        count = sum(len(self.records(split, dropped=True)) for split in ("train", "val", "test"))
        if len(labels) != count:
            raise InputError(
                f"'{self.path}' has {count} series and {len(labels)} rows of labels; make it anew with "
                "`python scripts/prepare_mimic3.py`"
            )
        return labels

    @cached_property
    def _statistics(self) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Mean and deviation of each feature, (12,) and (5,)."""
        records = self.records("train", dropped=True)
        if self.statistics == "all":
            records = records + self.records("val", dropped=True) + self.records("test", dropped=True)
        values = {
            "series": np.concatenate([finite(record.series) for record in records]),
            "tabular": np.stack([finite(record.descriptors) for record in records]),
        }
        return {
            name: (rows.mean(axis=0), np.where(rows.std(axis=0) > 0, rows.std(axis=0), 1))
            for name, rows in values.items()
        }

    def _array(self, name: str) -> NDArray[np.float64]:
        if not self.path.is_file():
            raise InputError(
                f"MIMIC3 needs '{self.path}'; get im.pk from MultiBench's authors, who give it to "
                "credentialed users of MIMIC-III, and run `python scripts/prepare_mimic3.py im.pk --out "
                f"{self.path}`"
            )
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                if name not in stored:
                    raise InputError(
                        f"'{self.path}' has no array '{name}'; it has: {', '.join(stored)}. Make it "
                        "anew with `python scripts/prepare_mimic3.py`"
                    )
                array = np.asarray(stored[name], np.float64)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(
                f"cannot read '{self.path}': {error}; make it anew with `python scripts/prepare_mimic3.py`"
            ) from error
        check_shape(array, name, str(self.path))
        return array


def check_shape(array: NDArray[Any], name: str, where: str) -> None:
    """Raises InputError where an array of `ARRAYS` has another shape than (n, ...)."""
    wanted = ARRAYS[name]
    if array.shape[1:] != wanted or array.ndim != len(wanted) + 1:
        sizes = ", ".join(str(size) for size in wanted)
        raise InputError(f"'{name}' in '{where}' must have the shape (n, {sizes}), got {array.shape}")


def shuffled(count: int) -> list[int]:
    """The rows in MultiBench's order."""
    rows = list(range(count))
    random.Random(10).shuffle(rows)
    return rows


def finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Infinite and missing values set to 0."""
    return np.where(np.isfinite(values), values, 0)


def mortality_class(died: list[int]) -> int:
    """Class of six 0/1: died in hospital (which does not count), within 1, 2, 3 and 30 days, and a year."""
    return next((place for place in range(1, 6) if died[place]), 0)

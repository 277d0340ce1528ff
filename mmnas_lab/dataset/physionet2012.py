"""PhysioNet/CinC Challenge 2012: the first two days of a stay in intensive care, and its end."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmnas_lab.dataset.images import held_out
from mmnas_lab.dataset.records import RecordDataset, digest_of
from mmnas_lab.types import InputError, Settings, Split

HOURS = 48

POSSIBLE: dict[str, tuple[float, float]] = {
    "ALP": (1, 5000),
    "ALT": (1, 30000),
    "AST": (1, 30000),
    "Albumin": (0.5, 7),
    "BUN": (1, 300),
    "Bilirubin": (0.05, 80),
    "Cholesterol": (10, 1000),
    "Creatinine": (0.05, 40),
    "DiasABP": (10, 200),
    "FiO2": (0.2, 1),
    "GCS": (3, 15),
    "Glucose": (5, 2000),
    "HCO3": (2, 70),
    "HCT": (5, 75),
    "HR": (10, 300),
    "K": (1, 15),
    "Lactate": (0.05, 40),
    "MAP": (10, 250),
    "MechVent": (0, 1),
    "Mg": (0.2, 15),
    "NIDiasABP": (10, 200),
    "NIMAP": (10, 250),
    "NISysABP": (20, 300),
    "Na": (80, 200),
    "PaCO2": (5, 200),
    "PaO2": (15, 700),
    "Platelets": (1, 2500),
    "RespRate": (1, 100),
    "SaO2": (20, 100),
    "SysABP": (20, 300),
    "Temp": (25, 45),
    "TroponinI": (0, 200),
    "TroponinT": (0, 100),
    "Urine": (0, 5000),
    "WBC": (0.05, 500),
    "Weight": (20, 350),
    "pH": (6.5, 8),
}
"""Variables in the order of the features, and the range outside which a value counts as not measured."""

SKEWED = (
    *("ALP", "ALT", "AST", "BUN", "Bilirubin", "Creatinine", "Glucose", "Lactate", "PaO2", "Platelets"),
    *("TroponinI", "TroponinT", "Urine", "WBC"),
)
"""Variables that are standardised as log(1 + value): some stays lie a hundred times above the median."""

IS_SKEWED = np.array([name in SKEWED for name in POSSIBLE])
LOWEST, HIGHEST = np.array(list(POSSIBLE.values()), np.float32).T

DESCRIPTORS: dict[str, tuple[float, float]] = {
    "age": (10, 120),
    "gender": (0, 1),
    "height": (100, 230),
    "weight": (20, 350),
}
"""Descriptors on admission in the order of the features, and their possible values."""

ICU_TYPES = ("coronary care", "cardiac surgery recovery", "medical", "surgical")
MINUTES_TO_HOURS = 60

LIMIT = 8.0
"""Deviations from the mean to which standardised values are cut."""


@dataclass(frozen=True)
class Stay:
    """What was measured in one stay.

    Attributes:
        id: number of the record.
        descriptors: (5,) age, gender, height, weight and type of the unit (1 to 4); below 0 where unknown.
        hours: (n,) int, whole hours since admission, in the order of the file.
        variables: (n,) int, places in `POSSIBLE`.
        values: (n,) float32.
    """

    id: str
    descriptors: NDArray[np.float32] = field(repr=False)
    hours: NDArray[np.int64] = field(repr=False)
    variables: NDArray[np.int64] = field(repr=False)
    values: NDArray[np.float32] = field(repr=False)

    def digest(self) -> bytes:
        arrays = (self.descriptors, self.hours, self.variables, self.values)
        return digest_of(self.id.encode(), *(array.tobytes() for array in arrays))

    @cached_property
    def grid(self) -> NDArray[np.float32]:
        """(48, 37) last possible value of each hour; NaN where nothing was measured."""
        grid = np.full((HOURS, len(POSSIBLE)), np.nan, np.float32)
        low, high = LOWEST[self.variables], HIGHEST[self.variables]
        possible = (self.values >= low) & (self.values <= high)
        hours = np.minimum(self.hours[possible], HOURS - 1)
        grid[hours, self.variables[possible]] = self.values[possible]  # of equal places the last remains
        return grid

    @cached_property
    def described(self) -> NDArray[np.float32]:
        """(4,) age, gender, height, weight; NaN where unknown or impossible."""
        low, high = np.array(list(DESCRIPTORS.values()), np.float32).T
        values = self.descriptors[:-1]
        return np.where((values >= low) & (values <= high), values, np.float32(np.nan))


class Source(Protocol):
    """A way in which a set of stays lies on disk."""

    def stays(self) -> Iterator[Stay]:
        """All stays; reads no outcome."""

    def deaths(self) -> dict[str, int]:
        """1 for each stay that ended with death in hospital, else 0."""


class PhysioNet2012(RecordDataset[Stay]):
    """Stays of the challenge (Silva et al. 2012): 37 variables over 48 hours, descriptors, death in hospital.

    Set a is train and val, set b is test. Values that cannot be (`POSSIBLE`) count as not measured.

    The series (48, 74) has the last value of each variable in each hour, or else its last value before, or
    else, before any, the median of the training stays (0 for mechanical ventilation), all standardised with
    the statistics of the training stays; then 1 for each variable that was measured in that hour. The
    tabular features (12,) are age, gender, height and weight, standardised, or 0 where they are unknown; 1
    for each of these that is unknown; and 1 for the type of the unit. Standardised values are cut to +- 8.

    `path` holds parquet files `set-a.parquet` and `set-b.parquet`, one row a stay, or the challenge's folders
    `set-a` and `set-b` of `<id>.txt` with `Outcomes-a.txt` and `Outcomes-b.txt` beside them.

    Args:
        path: the folder.
        val_share: share of set a that becomes val by a hash of the number, in [0, 1).
        on_bad_sample: `stop` or `skip`. Twelve stays of the three sets have no measurement at all.

    Raises:
        InputError: a setting outside its range.
    """

    name = "physionet2012"
    classes = ("survived", "died")

    def __init__(
        self, path: str, val_share: float = 0.2, on_bad_sample: Literal["stop", "skip"] = "stop"
    ) -> None:
        super().__init__(path, {"series": "series", "tabular": "tabular"}, on_bad_sample)
        if not 0 <= val_share < 1:
            raise InputError(f"dataset.val_share must be in [0, 1), got {val_share:g}; 0.2 is usual")
        self.val_share = val_share

    def index(self) -> dict[Split, list[Stay]]:
        learning, test = (sorted(self._source(name).stays(), key=lambda stay: stay.id) for name in "ab")
        held = held_out([stay.id for stay in learning], self.val_share, "val")
        return {
            "train": [stay for row, stay in enumerate(learning) if row not in held],
            "val": [stay for row, stay in enumerate(learning) if row in held],
            "test": test,
        }

    def problem(self, record: Stay) -> str | None:
        if np.isfinite(record.grid).any():
            return None
        return f"the stay {record.id} has no measurement of any variable in its first {HOURS} hours"

    def sample(self, record: Stay, modality: str) -> Any:
        if (reason := self.problem(record)) is not None:
            raise InputError(reason)
        return self._series(record) if modality == "series" else self._tabular(record)

    def label(self, record: Stay) -> int:
        for deaths in self._deaths:
            if record.id in deaths:
                if deaths[record.id] not in (0, 1):
                    raise InputError(
                        f"in-hospital death of the stay {record.id} must be 0 or 1, got {deaths[record.id]}; "
                        f"get the outcomes in '{self.path}' anew"
                    )
                return deaths[record.id]
        raise InputError(f"the outcomes in '{self.path}' lack the stay {record.id}; get them anew")

    def settings(self) -> Settings:
        return {"version": 1}

    def _source(self, name: str) -> Source:
        if (file := self.path / f"set-{name}.parquet").is_file():
            return ParquetStays(file)
        if (folder := self.path / f"set-{name}").is_dir():
            return TextStays(folder, self.path / f"Outcomes-{name}.txt")
        raise InputError(
            f"PhysioNet2012 needs '{file}' or the folder '{folder}'; download set-{name} and "
            f"Outcomes-{name}.txt from https://physionet.org/content/challenge-2012/1.0.0 and unpack them "
            "there, or set dataset.path="
        )

    @cached_property
    def _deaths(self) -> tuple[dict[str, int], ...]:
        return tuple(self._source(name).deaths() for name in "ab")

    @cached_property
    def _usable(self) -> list[Stay]:
        """Training stays with a measurement, those of the statistics."""
        stays = self.records("train", dropped=True)
        return [stay for stay in stays if np.isfinite(stay.grid).any()]

    @cached_property
    def _series_statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """First value, mean and deviation of each variable, (37,), of values as `_scaled` gives them."""
        grids = np.concatenate([_scaled(stay.grid) for stay in self._usable])
        first = _of_columns(np.median, grids)
        first[list(POSSIBLE).index("MechVent")] = 0
        return first, _of_columns(np.mean, grids), _deviation(grids)

    @cached_property
    def _tabular_statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        values = np.stack([stay.described for stay in self._usable])
        return _of_columns(np.mean, values), _deviation(values)

    def _series(self, stay: Stay) -> NDArray[np.float32]:
        first, mean, std = self._series_statistics
        grid = _scaled(stay.grid)
        measured = np.isfinite(grid)
        latest = np.where(measured, np.arange(HOURS)[:, None], -1)  # (48, 37) hour of the last value
        latest = np.maximum.accumulate(latest, axis=0)
        values = np.where(latest >= 0, np.take_along_axis(grid, latest.clip(0), axis=0), first)
        standardised = ((values - mean) / std).clip(-LIMIT, LIMIT)
        return np.concatenate([standardised, measured], axis=1, dtype=np.float32)

    def _tabular(self, stay: Stay) -> NDArray[np.float32]:
        mean, std = self._tabular_statistics
        unknown = np.isnan(stay.described)
        values = np.where(unknown, 0, (stay.described - mean) / std).clip(-LIMIT, LIMIT)
        unit = stay.descriptors[-1] == np.arange(1, len(ICU_TYPES) + 1)
        return np.concatenate([values, unknown, unit], dtype=np.float32)


class ParquetStays:
    """Stays of one set, one row each, with their measurements as lists."""

    COLUMNS = ("record_id", *DESCRIPTORS, "icu_type", "time_min", "variable", "value")

    def __init__(self, file: Path) -> None:
        self.file = file

    def stays(self) -> Iterator[Stay]:
        table = self._read(list(self.COLUMNS)).combine_chunks()
        stored = json.loads((table.schema.metadata or {}).get(b"variables", "[]"))
        names = stored or list(POSSIBLE)
        if unknown := [name for name in names if name not in POSSIBLE]:
            raise InputError(
                f"'{self.file}' has the unknown variable '{unknown[0]}'; known are {', '.join(POSSIBLE)}"
            )
        place = np.array([list(POSSIBLE).index(name) for name in names])
        columns = [table[name].to_numpy() for name in (*DESCRIPTORS, "icu_type")]
        descriptors = np.stack(columns, axis=1).astype(np.float32)
        lists = {name: table[name].combine_chunks() for name in ("time_min", "variable", "value")}
        offsets = {name: column.offsets.to_numpy() for name, column in lists.items()}
        flat = {name: column.values.to_numpy() for name, column in lists.items()}
        for row, number in enumerate(table["record_id"].to_pylist()):
            minutes, variables, values = (
                flat[name][offsets[name][row] : offsets[name][row + 1]] for name in lists
            )
            if not len(minutes) == len(variables) == len(values):
                raise InputError(
                    f"the lists of the stay {number} in '{self.file}' differ in length; get it anew"
                )
            if len(variables) and not 0 <= variables.min() <= variables.max() < len(names):
                raise InputError(
                    f"the stay {number} in '{self.file}' has the variable {variables.max()}, but there are "
                    f"{len(names)}; get it anew"
                )
            hours = minutes.astype(np.int64) // MINUTES_TO_HOURS
            yield Stay(str(number), descriptors[row], hours, place[variables], values)

    def deaths(self) -> dict[str, int]:
        table = self._read(["record_id", "in_hospital_death"])
        return {
            str(number): death
            for number, death in zip(*(column.to_pylist() for column in table.columns), strict=True)
        }

    def _read(self, columns: list[str]) -> Any:
        try:
            found = pq.read_schema(self.file).names
            if missing := [name for name in columns if name not in found]:
                raise InputError(
                    f"'{self.file}' has no column '{missing[0]}', which PhysioNet2012 needs; it has: "
                    f"{', '.join(found)}"
                )
            return pq.read_table(self.file, columns=columns)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read '{self.file}' as parquet: {error}; get it anew") from error


class TextStays:
    """Stays of one set as the challenge gives them: `<id>.txt` with lines Time,Parameter,Value."""

    DESCRIBED = ("Age", "Gender", "Height", "Weight", "ICUType")

    def __init__(self, folder: Path, outcomes: Path) -> None:
        self.folder, self.outcomes = folder, outcomes

    def stays(self) -> Iterator[Stay]:
        for file in sorted(self.folder.glob("*.txt")):
            yield self._stay(file)

    def deaths(self) -> dict[str, int]:
        rows = self._rows(self.outcomes, ("RecordID", "In-hospital_death"))
        return {number.strip(): int(death) if death.strip() in {"0", "1"} else -1 for number, death in rows}

    def _stay(self, file: Path) -> Stay:
        places = {name: k for k, name in enumerate(POSSIBLE)}
        descriptors = np.full(len(self.DESCRIBED), -1, np.float32)
        hours, variables, values = [], [], []
        for time, name, text in self._rows(file, ("Time", "Parameter", "Value")):
            try:
                hour, value = int(time.split(":")[0]), float(text)
            except ValueError:
                raise InputError(
                    f"'{file}' has the line '{time},{name},{text}', which is no time and value; get it anew"
                ) from None
            if time == "00:00" and name in self.DESCRIBED:
                place = self.DESCRIBED.index(name)
                descriptors[place] = value if descriptors[place] < 0 else descriptors[place]
            if name in places:
                hours.append(hour)
                variables.append(places[name])
                values.append(value)
        return Stay(
            file.stem,
            descriptors,
            np.array(hours, np.int64),
            np.array(variables, np.int64),
            np.array(values, np.float32),
        )

    def _rows(self, file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        try:
            with file.open(newline="", encoding="utf-8") as stream:
                reader = csv.DictReader(stream)
                if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                    raise InputError(f"'{file}' has no column '{missing[0]}' in its first line; get it anew")
                for row in reader:
                    yield tuple(row[name] or "" for name in columns)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read '{file}': {error}; get it anew") from error


def _scaled(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values (T, 37) with the logarithm of skewed variables."""
    return np.where(IS_SKEWED, np.log1p(grid), grid)


def _of_columns(function: Callable[..., Any], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """A statistic of each column of (n, F) without its NaNs; 0 where nothing is left."""
    columns = [column[np.isfinite(column)].astype(np.float64) for column in values.T]
    return np.array([function(column) if len(column) else 0 for column in columns], np.float32)


def _deviation(values: NDArray[np.float32]) -> NDArray[np.float32]:
    std = _of_columns(np.std, values)
    return np.where(std > 0, std, np.float32(1))

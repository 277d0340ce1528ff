"""MM-IMDB: posters, plots and 23 genres of movies, from parquet files or from the authors' archive."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.types import InputError, Split, Task

GENRES = (
    "Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror", "Documentary",
    "Mystery", "Sci-Fi", "Fantasy", "Family", "Biography", "War", "History", "Music", "Animation", "Musical",
    "Western", "Sport", "Short", "Film-Noir",
)  # fmt: skip
"""The columns of the labels, in the order of the MM-IMDB authors (by frequency)."""

DROPPED_GENRES = ("News", "Adult", "Talk-Show", "Reality-TV")
"""Genres of the archive that the authors left out of the task; their movies stay, for their other genres."""

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "val": ("dev", "val"), "test": ("test",)}
"""What each split may be called in file names and in `split.json`."""

TextColumns = Literal["plot", "plot_and_overview"]


@dataclass(frozen=True)
class Movie:
    """One row: what identifies and describes a movie, without its labels.

    Attributes:
        id: IMDb id.
        text: what is read of it; empty where the data has none.
        poster: file of the poster, or its bytes.
        source: file that the movie was read from.
    """

    id: str
    text: str
    poster: Path | bytes
    source: Path

    def digest(self) -> bytes:
        """Hash of id, text and poster; a poster that lies in a file counts by its size."""
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(self.poster, bytes):
            poster = self.poster
        else:
            poster = str(self.poster.stat().st_size if self.poster.is_file() else -1).encode()
        for part in (self.id.encode(), self.text.encode(), poster):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()


class Source(Protocol):
    """A way in which the movies lie on disk."""

    def movies(self) -> dict[Split, list[Movie]]:
        """All movies; reads no label."""

    def genres(self, split: Split) -> list[Any]:
        """Of each movie of `movies()[split]`, its genre names, or its row of `GENRES` as 0 and 1."""


class MMIMDB:
    """Movies with poster, plot and some of the 23 genres of MM-IMDB (Arevalo et al. 2017).

    The data is either a folder of parquet files, `train*.parquet`, `dev*.parquet` (or `val*`) and
    `test*.parquet` with the columns imdb_id, poster, plot, genres (or labels), or the folder of the authors'
    archive, `split.json` with `<id>.json` and `<id>.jpeg` beside it or in `dataset/`. Of several plots the
    longest is used.

    Args:
        path: the folder.
        text: "plot", or "plot_and_overview": the plot followed by the parquet column `overview` where that
            adds to it.
        on_bad_sample: what becomes of movies with a corrupt poster or an empty plot: "stop" lists them all,
            "skip" leaves them out.

    Raises:
        InputError: an unknown `text` or `on_bad_sample`.
    """

    name = "mmimdb"
    task: Task = "multilabel"

    def __init__(
        self, path: str, text: TextColumns = "plot", on_bad_sample: Literal["stop", "skip"] = "stop"
    ) -> None:
        if text not in ("plot", "plot_and_overview"):
            raise InputError(f"MMIMDB needs dataset.text to be 'plot' or 'plot_and_overview', got '{text}'")
        if on_bad_sample not in ("stop", "skip"):
            raise InputError(f"MMIMDB needs on_bad_sample to be 'stop' or 'skip', got '{on_bad_sample}'")
        self.path = Path(path)
        self.text = text
        self.on_bad_sample = on_bad_sample
        self.modalities = {"image": "image", "text": "text"}
        self._source: Source | None = None
        self._movies: dict[Split, list[Movie]] = {}
        self._kept: dict[Split, list[int]] = {}
        self._digests: dict[str, bytes] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        return GENRES

    def open(self) -> None:
        if self._source is None:
            source = self._find_source()
            movies = source.movies()
            _check(movies)
            self._source, self._movies = source, movies
            self._kept = {split: list(range(len(movies[split]))) for split in SPLITS}

    def ids(self, split: Split) -> list[str]:
        return [movie.id for movie in self._rows(split)]

    def read(self, split: Split, modality: str, rows: Sequence[int]) -> list[Any]:
        if modality not in self.modalities:
            raise InputError(f"MMIMDB has the modalities {sorted(self.modalities)}, got '{modality}'")
        movies = self._rows(split)
        if modality == "text":
            return [movies[row].text for row in rows]
        return [_read_poster(movies[row]) for row in rows]

    def unreadable(self, split: Split) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for row, movie in enumerate(self._rows(split)):
            problems = [] if movie.text.strip() else ["empty text"]
            try:
                _read_poster(movie)
            except InputError as error:
                problems.insert(0, str(error))
            if problems:
                reasons[row] = "; ".join(problems)
        return reasons

    def drop(self, rows: dict[Split, list[int]]) -> None:
        self.open()
        for split, dropped in rows.items():
            gone = set(dropped)
            self._kept[split] = [index for row, index in enumerate(self._kept[split]) if row not in gone]

    def fingerprint(self) -> str:
        """Hash of ids, texts and posters of the rows in use; each row is hashed once."""
        total = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            total.update(f"{split}:{len(self._rows(split))};".encode())
            for movie in self._rows(split):
                if movie.id not in self._digests:
                    self._digests[movie.id] = movie.digest()
                total.update(self._digests[movie.id])
        return total.hexdigest()

    def labels(self, split: Split) -> Tensor:
        movies = self._rows(split)
        assert self._source is not None
        genres = self._source.genres(split)
        rows = [_multi_hot(genres[i], movie) for i, movie in zip(self._kept[split], movies, strict=True)]
        return torch.from_numpy(np.array(rows, dtype=np.uint8).reshape(len(rows), len(GENRES)))

    def label_fingerprint(self) -> str:
        total = hashlib.blake2b(digest_size=16)
        for split in SPLITS:
            labels = self.labels(split)
            total.update(f"{split}:{len(labels)};".encode() + labels.numpy().tobytes())
        return total.hexdigest()

    def _rows(self, split: Split) -> list[Movie]:
        self.open()
        return [self._movies[split][index] for index in self._kept[split]]

    def _find_source(self) -> Source:
        get_it = (
            "get MM-IMDB with `python scripts/prepare_mmimdb.py`, or set dataset.path= to a folder that has "
            "it; the same experiment on bundled data: `python run.py experiment=ssl_nas_movies`"
        )
        if not self.path.is_dir():
            raise InputError(f"MMIMDB needs the folder '{self.path}', which does not exist; {get_it}")
        if (self.path / "split.json").is_file():
            return RawFolder(self.path, self.text)
        files = {
            split: sorted(file for name in names for file in self.path.glob(f"{name}*.parquet"))
            for split, names in SPLIT_NAMES.items()
        }
        missing = [SPLIT_NAMES[split][0] for split in SPLITS if not files[split]]
        if missing:
            wanted = " and ".join(f"'{self.path / name}*.parquet'" for name in missing)
            raise InputError(f"MMIMDB needs '{self.path / 'split.json'}', or {wanted}; {get_it}")
        return ParquetFolder(files, self.text)


class ParquetFolder:
    """Movies in parquet files; posters stay in memory as the bytes of their files."""

    def __init__(self, files: dict[Split, list[Path]], text: TextColumns) -> None:
        self.files = files
        self.columns = ["imdb_id", "poster", "plot"] + (["overview"] if text == "plot_and_overview" else [])

    def movies(self) -> dict[Split, list[Movie]]:
        return {split: [row for file in self.files[split] for row in self._read(file)] for split in SPLITS}

    def genres(self, split: Split) -> list[Any]:
        return [genres for file in self.files[split] for genres in self._read_genres(file)]

    def _read(self, file: Path) -> list[Movie]:
        found = _columns(file)
        for column in self.columns:
            if column not in found:
                raise InputError(
                    f"'{file}' has no column '{column}', which MMIMDB needs; it has: {', '.join(found)}. "
                    "Rename or add the column"
                    + (", or set dataset.text=plot" if column == "overview" else "")
                )
        rows = pq.read_table(file, columns=self.columns).to_pylist()
        return [
            Movie(row["imdb_id"], _join(row["plot"], row.get("overview")), _poster_bytes(row["poster"]), file)
            for row in rows
        ]

    def _read_genres(self, file: Path) -> list[Any]:
        found = _columns(file)
        column = next((name for name in ("genres", "labels") if name in found), None)
        if column is None:
            raise InputError(
                f"'{file}' has no column 'genres' (names) or 'labels' (23 numbers, 0 or 1), so that nothing "
                f"can be trained or tested with labels; it has: {', '.join(found)}. Add one of them"
            )
        return list(pq.read_table(file, columns=[column])[column].to_pylist())


class RawFolder:
    """The folder of the authors' archive; posters stay on disk until they are read."""

    def __init__(self, path: Path, text: TextColumns) -> None:
        self.path = path
        if text != "plot":
            raise InputError(
                f"'{path}' is the MM-IMDB archive, which has no overviews; set dataset.text=plot, "
                "or dataset.path= to parquet files with the column 'overview'"
            )

    def movies(self) -> dict[Split, list[Movie]]:
        return {split: [self._movie(movie_id) for movie_id in self._ids(split)] for split in SPLITS}

    def genres(self, split: Split) -> list[Any]:
        genres = []
        for movie_id in self._ids(split):
            file = self._file(movie_id, "json")
            content = _read_json(file)
            if "genres" not in content:
                raise InputError(
                    f"'{file}' has no 'genres', so that nothing can be trained or tested with labels; "
                    "get the archive anew with `python scripts/prepare_mmimdb.py`"
                )
            genres.append(content["genres"])
        return genres

    def _ids(self, split: Split) -> list[str]:
        index = _read_json(self.path / "split.json")
        for name in SPLIT_NAMES[split]:
            if name in index:
                return [str(movie_id) for movie_id in index[name]]
        raise InputError(
            f"'{self.path / 'split.json'}' needs a list of ids named '{SPLIT_NAMES[split][0]}'; "
            f"it has: {', '.join(sorted(index))}"
        )

    def _movie(self, movie_id: str) -> Movie:
        file = self._file(movie_id, "json")
        content = _read_json(file)
        if "plot" not in content:
            raise InputError(
                f"'{file}' has no 'plot', which MMIMDB needs; it has: {', '.join(sorted(content))}. "
                "Add it, or leave the movie out of split.json"
            )
        plots = content["plot"] if isinstance(content["plot"], list) else [content["plot"]]
        text = max((plot for plot in plots if plot), key=lambda plot: len(plot.strip()), default="")
        return Movie(movie_id, text, self._file(movie_id, "jpeg"), file)

    def _file(self, movie_id: str, suffix: str) -> Path:
        beside = self.path / f"{movie_id}.{suffix}"
        return beside if beside.is_file() else self.path / "dataset" / beside.name


def _check(movies: dict[Split, list[Movie]]) -> None:
    seen: dict[str, Split] = {}
    for split in SPLITS:
        if not movies[split]:
            raise InputError(f"MMIMDB found no movie for the {split} split; each split needs at least one")
        for movie in movies[split]:
            if movie.id in seen:
                raise InputError(
                    f"the movie '{movie.id}' of '{movie.source}' occurs twice, in {seen[movie.id]} and in "
                    f"{split}; keep one of them"
                )
            seen[movie.id] = split


def _read_poster(movie: Movie) -> Image.Image:
    """The poster in RGB, decoded in full."""
    file: Path | io.BytesIO
    if isinstance(movie.poster, bytes):
        file, where = io.BytesIO(movie.poster), f"of {movie.id} in '{movie.source}'"
    else:
        file, where = movie.poster, f"'{movie.poster}'"
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the poster {where}: {error}") from error


def _multi_hot(genres: Any, movie: Movie) -> list[int]:
    """(23,) of 0 and 1 from genre names or from a row that is multi-hot already."""
    genres = [] if genres is None else genres
    if genres and not any(isinstance(genre, str) for genre in genres):
        if len(genres) != len(GENRES) or not set(genres) <= {0, 1}:
            raise InputError(
                f"labels of the movie '{movie.id}' in '{movie.source}' must be {len(GENRES)} numbers, 0 or "
                f"1, in the order {', '.join(GENRES)}; got {len(genres)} numbers: {genres}"
            )
        return [int(value) for value in genres]
    unknown = [genre for genre in genres if genre not in GENRES and genre not in DROPPED_GENRES]
    if unknown:
        raise InputError(
            f"unknown genre '{unknown[0]}' of the movie '{movie.id}' in '{movie.source}'; rename or remove "
            f"it. Known genres: {', '.join(GENRES)}; ignored: {', '.join(DROPPED_GENRES)}"
        )
    return [int(genre in genres) for genre in GENRES]


def _poster_bytes(poster: Any) -> bytes:
    content = poster.get("bytes") if isinstance(poster, dict) else poster
    return content if isinstance(content, bytes) else b""


def _join(plot: str | None, extra: str | None) -> str:
    """The plot and what an overview adds to it."""
    plot = plot or ""
    extra = (extra or "").strip()
    return plot if extra in plot else f"{plot} {extra}".strip()


def _columns(file: Path) -> list[str]:
    try:
        return list(pq.read_schema(file).names)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{file}' as parquet: {error}; write or copy it anew") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"MMIMDB needs '{file}', which split.json asks for; complete the folder with "
            "`python scripts/prepare_mmimdb.py`"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{file}': {error}; complete the folder anew") from error
    if not isinstance(content, dict):
        raise InputError(f"'{file}' must hold a JSON object, got {type(content).__name__}")
    return content

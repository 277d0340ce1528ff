"""Scores of micro-benchmarks, kept over runs: what has been measured once is not measured again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from mmnas_lab.types import InputError

SCHEMA = 1
COLUMNS = (
    "key", "choice", "option", "candidate", "data", "sample", "budget", "seed", "metric", "score", "seconds",
    "training_seconds", "versions",
)  # fmt: skip
PLAIN = ("candidate", "budget", "versions")
"""Columns that hold JSON."""


class ScoreStore:
    """An SQLite file with a row for each micro-benchmark; several processes may read and write it at once.

    Args:
        path: of the file; made with its folder where it is missing.
        wait_seconds: how long a write waits for others.

    Raises:
        InputError: a file that is no store, or of another schema version.
    """

    def __init__(self, path: Path, wait_seconds: float = 60.0) -> None:
        self.path, self.wait_seconds = path, wait_seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):  # of several that find no store, one makes it
            self._open()

    def _open(self) -> None:
        """Check the file, and make its table where it is new."""
        path = self.path
        with self._connected() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA):
                raise InputError(
                    f"score store '{path}' has schema version {version}, this program reads {SCHEMA}; set "
                    "strategy.store to another file, or use the program that wrote it"
                )
            if version == 0:
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise InputError(
                        f"'{path}' is an SQLite file of something else; set strategy.store to another file"
                    )
                connection.execute("PRAGMA journal_mode=WAL")
                types = {"seed": "INTEGER", "score": "REAL", "seconds": "REAL", "training_seconds": "REAL"}
                columns = ", ".join(f"{name} {types.get(name, 'TEXT')}" for name in COLUMNS[1:])
                connection.execute(f"CREATE TABLE scores (key TEXT PRIMARY KEY, {columns})")
                connection.execute(f"PRAGMA user_version={SCHEMA}")

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """One transaction; SQLite's errors in the words of a user."""
        connection = sqlite3.connect(self.path, timeout=self.wait_seconds)
        try:
            with connection:
                yield connection
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise InputError(
                    f"score store '{self.path}' cannot be used ({error}); set strategy.store to a file "
                    "that can be written"
                ) from None
            raise InputError(
                f"score store '{self.path}' has been locked by another process for {self.wait_seconds:g} s; "
                "end that process and run this again: what is measured is kept"
            ) from None
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"'{self.path}' is no score store ({error}); move it away, or set strategy.store to another"
            ) from None
        finally:
            connection.close()

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of a key; None where it has not been measured."""
        with self._connected() as connection:
            row = connection.execute(
                f"SELECT {', '.join(COLUMNS)} FROM scores WHERE key=?", (key,)
            ).fetchone()
        return None if row is None else _row(row)

    def put(self, row: Mapping[str, Any]) -> None:
        """Add a row; the first one with a key stays."""
        values = [json.dumps(row[name], sort_keys=True) if name in PLAIN else row[name] for name in COLUMNS]
        marks = ", ".join("?" * len(COLUMNS))
        with self._connected() as connection:
            connection.execute(f"INSERT OR IGNORE INTO scores VALUES ({marks})", values)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order in which they were measured."""
        with self._connected() as connection:
            found = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM scores ORDER BY rowid").fetchall()
        return [_row(row) for row in found]


def _row(values: tuple[Any, ...]) -> dict[str, Any]:
    named = dict(zip(COLUMNS, values, strict=True))
    return {name: json.loads(value) if name in PLAIN else value for name, value in named.items()}

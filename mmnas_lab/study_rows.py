"""Rows of a study: JSON lines that are appended whole, and read as far as they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSON-lines file; a line that a killed process left unfinished is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, whole, also where several processes write."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with FileLock(path.with_name(f".{path.name}.lock")), path.open("a") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            line = "\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def same_run(identity: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row is of this run: overrides that change results count, also where there are none."""
    return identity.items() <= row.items() and row.get("overrides") == identity.get("overrides")

"""A stage: a computation whose result lies in a folder named after everything that it depends on.

`stage(name, settings, inputs, compute)` is the whole of it: a hash, a folder, a lock and a done mark that is
written last. What would compute the same is found again; what differs in anything never meets it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mmnas_lab import distributed
from mmnas_lab.types import Settings

log = logging.getLogger(__name__)

DONE = "done.json"


@dataclass(frozen=True)
class StageResult:
    """A finished stage.

    Attributes:
        name: of the stage.
        key: hash of settings, version and inputs; what later stages depend on.
        folder: where its files are.
        reused: True where nothing was computed.
        seconds: that the computation took when it was made.
    """

    name: str
    key: str
    folder: Path
    reused: bool
    seconds: float
    digests: dict[str, str] = field(default_factory=dict)


def digest(value: Any) -> str:
    """Hash of plain values, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def stage(
    root: Path,
    name: str,
    slug: str,
    version: int,
    settings: Settings,
    inputs: Mapping[str, str],
    compute: Callable[[Path], None],
) -> StageResult:
    """The result of a stage, computed if it is not there.

    All ranks call it together; rank 0 decides whether the result is there, and marks it as done. A killed
    computation finds its unfinished folder again, and goes on in it as `compute` sees fit.

    Args:
        root: the folder of all stages.
        name: of the stage, the subfolder of `root`.
        slug: a readable part of the folder's name.
        version: raised when the computation's result changes.
        settings: plain values that the computation reads.
        inputs: keys of the stages before it and fingerprints of data.
        compute: writes its files into the folder that it is given.
    """
    key = digest({"stage": name, "version": version, "settings": settings, "inputs": dict(inputs)})
    folder = root / name / f"{_slug(slug)}-{key[:8]}"
    with _locked(folder):
        done = distributed.broadcast(_read_done(folder, key) if distributed.rank() == 0 else None)
        if done is not None:
            log.info("%s: reused %s", name, folder.name)
            return StageResult(name, key, folder, True, done["seconds"], done["files"])
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            read = {"settings": settings, "inputs": dict(inputs), "version": version}
            write_json(folder / "settings.json", read)
        distributed.barrier()
        log.info("%s: computing %s", name, folder.name)
        spent = folder / "seconds.json"  # time of earlier, interrupted tries
        start = time.monotonic()
        before = json.loads(spent.read_text()) if spent.exists() else 0.0
        try:
            compute(folder)
        except BaseException:
            if distributed.rank() == 0:
                write_json(spent, before + time.monotonic() - start)
            raise
        distributed.barrier()
        seconds = before + time.monotonic() - start
        digests: dict[str, str] = {}
        if distributed.rank() == 0:
            spent.unlink(missing_ok=True)
            digests = {p.relative_to(folder).as_posix(): file_digest(p) for p in _files(folder)}
            write_json(folder / DONE, {"key": key, "seconds": seconds, "files": digests})
        digests = distributed.broadcast(digests)
        log.info("%s: done in %.1f s", name, seconds)
        return StageResult(name, key, folder, False, seconds, digests)


def _read_done(folder: Path, key: str) -> dict[str, Any] | None:
    """The done mark, if the folder is finished and whole; a damaged folder is emptied, and it is said."""
    mark = folder / DONE
    if not mark.exists():
        return None
    try:
        done = json.loads(mark.read_text())
        if done["key"] != key:
            raise ValueError("it belongs to other settings with the same short hash")
        for name, expected in done["files"].items():
            path = folder / name
            if not path.exists():
                raise ValueError(f"{name} is missing")
            if file_digest(path) != expected:
                raise ValueError(f"{name} is truncated or changed ({path.stat().st_size} bytes)")
    except (ValueError, KeyError, TypeError) as error:
        log.warning("cached stage %s is damaged (%s): it is computed again", folder, error)
        shutil.rmtree(folder)
        return None
    return done


def file_digest(path: Path) -> str:
    """Size and hash of a file's bytes."""
    with path.open("rb") as file:
        value = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    return f"{path.stat().st_size}:{value}"


def _files(folder: Path) -> list[Path]:
    """The result files of a folder, without marks, logs of other tools and unfinished writes."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tmp" and p.name != DONE)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Rank 0 holds the folder's lock, the other ranks follow it."""
    if distributed.rank() != 0:
        yield
        return
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s is being computed by another process; waiting for it", folder.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _slug(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_.]+", "_", text).strip("_")[:60] or "stage"


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is written whole, and on disk.

    Raises:
        OSError: a full disk, say; nothing is left under the name, and what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, atomically."""
    with atomically(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

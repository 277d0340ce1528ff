"""Reads back what an offline W&B run recorded; the format is private to wandb and may change with it."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

FILE_HEADER, CHUNK_HEADER, BLOCK = 7, 7, 32 * 1024
WHOLE, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Each record of a `run-<id>.wandb` file: LevelDB log blocks, over which one record may spread."""
    data, position, record = path.read_bytes(), FILE_HEADER, b""
    while position + CHUNK_HEADER <= len(data):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < CHUNK_HEADER:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += CHUNK_HEADER
        record += data[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def items(entries: Any) -> dict[str, Any]:
    """The values of a config, history or summary by name; the parts of a nested name are joined by dots."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in entries}


def only_run(folder: Path, timeout_seconds: float = 30.0) -> list[Any]:
    """All records of the one offline run below a folder, which a process of wandb's own writes.

    The last one, `exit`, is waited for: reading right after `finish` once found the end of the file missing.
    """
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + timeout_seconds
    while True:
        found = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"'{path}' has no exit record after {timeout_seconds} s")
        time.sleep(0.05)

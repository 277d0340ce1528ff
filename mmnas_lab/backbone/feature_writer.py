"""How features are computed: chunks of rows, encoded in threads, shared among ranks, resumed after a kill."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmnas_lab.backbone.base import Encoder, Progress
from mmnas_lab.backbone.moments import SMALLEST_STD
from mmnas_lab.dataset.base import SPLITS, LabelFree, training_samples
from mmnas_lab.types import Split, TrainingError

if TYPE_CHECKING:
    from mmnas_lab.backbone.frozen import Backbone
    from mmnas_lab.dataset.views import ViewFamily

log = logging.getLogger(__name__)

CHUNK_ROWS = 64
MARK_SECONDS = 5.0
FEATURES_FILE = "features.json"
STATISTICS_FILE = "statistics.safetensors"

Array = np.ndarray[Any, Any]
Mapped = np.memmap[Any, Any]


@dataclass(frozen=True)
class _Chunk:
    """Consecutive rows of a split in one modality, clean and in all views: what is computed at once."""

    number: int
    modality: str
    split: Split
    start: int
    stop: int


@dataclass(eq=False)
class FeatureWriter:
    """One rank's part of one call of `compute_features`, which tells what the fields are."""

    dataset: LabelFree
    backbone: Backbone
    views: dict[str, ViewFamily]
    num_views: int
    view_seed: int
    length: int
    folder: Path
    progress: Progress | None
    rank: int
    world_size: int
    barrier: Callable[[], None]
    workers: int

    def __post_init__(self) -> None:
        if not self.num_views:
            self.views = {}
        self.infos = self.backbone.infos(self.length)
        self.ids = {split: self.dataset.ids(split) for split in SPLITS}
        self.chunks = self._chunks()
        self.done: set[int] = set()
        self.overflown: set[str] = set()
        self.layout: dict[str, Any] = {}
        # A family may seed torch's global generator for its draws, which all threads share. The lock spans a
        # chunk, so that one thread makes views while the others encode.
        self.viewing = threading.Lock()

    def run(self) -> None:
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._begin()
        self.barrier()
        self.layout = read_json(self.folder / FEATURES_FILE)
        if (self.folder / STATISTICS_FILE).exists():
            return
        self._fit()
        while True:
            self._read_progress()
            self._compute()
            self.barrier()
            self._read_progress()
            self.barrier()
            if not self.overflown:
                break
            if self.rank == 0:
                self._widen()
            self.barrier()
            self.layout = read_json(self.folder / FEATURES_FILE)
        if self.rank == 0:
            write_statistics(self.folder, list(self.infos))
            for path in self.folder.glob("progress.*.json"):
                path.unlink()
        self.barrier()

    # The plan

    def _chunks(self) -> list[_Chunk]:
        spans = [
            (modality, split, start, min(start + CHUNK_ROWS, len(ids)))
            for modality in self.backbone.encoders
            for split, ids in self.ids.items()
            for start in range(0, len(ids), CHUNK_ROWS)
        ]
        return [_Chunk(number, *span) for number, span in enumerate(spans)]

    def _copies(self, split: Split) -> int:
        return 1 if split == "test" else self.num_views + 1

    def _plan(self) -> dict[str, Any]:
        return {
            "num_views": self.num_views,
            "view_seed": self.view_seed,
            "views": {name: family.settings() for name, family in sorted(self.views.items())},
            "length": self.length,
            "chunk_rows": CHUNK_ROWS,
            "rows": {split: len(ids) for split, ids in self.ids.items()},
            "ids": {split: _hash("\n".join(ids)) for split, ids in self.ids.items()},
            "dataset": self.dataset.fingerprint(),
            "backbone": self.backbone.fingerprint(),
            "features": {
                name: {"shape": list(info.shape), "modality": info.modality, "dtype": "float16"}
                for name, info in self.infos.items()
            },
        }

    def _begin(self) -> None:
        """Go on with what lies in the folder if it was made by the same plan, else start afresh."""
        plan, path = self._plan(), self.folder / FEATURES_FILE
        if path.exists():
            found = read_json(path)
            dtypes = {name: feature.pop("dtype") for name, feature in found["features"].items()}
            for feature in plan["features"].values():
                del feature["dtype"]
            same = found == json.loads(json.dumps(plan))
            for name, feature in plan["features"].items():
                feature["dtype"] = dtypes[name] if same else "float16"
            if same:
                self.layout = plan
                self._read_progress()
                if self.overflown:
                    self._widen()
                return
            path.unlink()
        for stale in (*self.folder.glob("progress.*.json"), *self.folder.glob("encoder.*")):
            stale.unlink()
        (self.folder / STATISTICS_FILE).unlink(missing_ok=True)
        self.layout = plan
        for name in self.infos:
            self._create(name)
        write_json(path, plan)

    def _create(self, name: str) -> None:
        feature = self.layout["features"][name]
        for split, ids in self.ids.items():
            shape = (self._copies(split), len(ids), *feature["shape"])
            path = array_path(self.folder, split, name)
            if np.prod(shape) == 0:
                np.save(path, np.zeros(shape, feature["dtype"]))
            else:
                np.lib.format.open_memmap(path, "w+", dtype=feature["dtype"], shape=shape).flush()

    def _widen(self) -> None:
        """Turn overflown features to float32; all chunks of their modalities are to be done again."""
        features = self.layout["features"]
        modalities = {features[name]["modality"] for name in self.overflown}
        kept = self.done - {chunk.number for chunk in self.chunks if chunk.modality in modalities}
        for path in self.folder.glob("progress.*.json"):
            if path.name != "progress.0.json":
                path.unlink()
        self._write_progress(kept)
        for name in sorted(self.overflown):
            log.warning("feature '%s' has values beyond float16; it is kept in float32", name)
            features[name]["dtype"] = "float32"
            self._create(name)
        write_json(self.folder / FEATURES_FILE, self.layout)
        self.overflown = set()
        self._write_progress(kept)

    # The marks of what is done

    def _read_progress(self) -> None:
        self.done, self.overflown = set(), set()
        for path in self.folder.glob("progress.*.json"):
            marks = read_json(path)
            self.done.update(marks["done"])
            self.overflown.update(marks["overflown"])

    def _write_progress(self, done: Iterable[int]) -> None:
        marks = {"done": sorted(done), "overflown": sorted(self.overflown)}
        write_json(self.folder / f"progress.{self.rank}.json", marks)

    # The work

    def _fit(self) -> None:
        """Fit, save and restore the encoders that learn from the training samples; load the others."""
        for modality, encoder in self.backbone.encoders.items():
            encoder.load()
            if not encoder.fitted:
                continue
            path = self.folder / f"encoder.{modality}"
            if self.rank == 0 and not path.exists():
                encoder.fit(training_samples(self.dataset, modality))
                new = path.with_name(f"new.{path.name}")
                encoder.save(new)
                os.replace(new, path)
            self.barrier()
            encoder.restore(path)

    def _compute(self) -> None:
        """This rank's chunks that are not done yet, several at a time, written in their order."""
        path = self.folder / f"progress.{self.rank}.json"
        done = set(read_json(path)["done"]) if path.exists() else set()
        own = self.chunks[self.rank :: self.world_size]
        mine = [chunk for chunk in own if chunk.number not in self.done]
        results: Iterable[tuple[_Chunk, dict[str, Array]]] = self._in_threads(mine)
        if self.progress is not None:
            results = self.progress(results, "features", len(mine))
        arrays: dict[Path, Mapped] = {}
        marked = time.monotonic()
        try:
            for chunk, features in results:
                for name, values in features.items():
                    self._write(chunk, name, values, arrays)
                done.add(chunk.number)
                if time.monotonic() - marked > MARK_SECONDS:
                    self._mark(done, arrays)
                    marked = time.monotonic()
        finally:
            self._mark(done, arrays)

    def _write(self, chunk: _Chunk, name: str, values: Array, arrays: dict[Path, Mapped]) -> None:
        finite = np.isfinite(values).all((0, 2, 3))
        if not finite.all():
            identity = self.ids[chunk.split][chunk.start + int(finite.argmin())]
            raise TrainingError(f"feature '{name}' of {chunk.split} sample '{identity}' is not finite")
        half = self.layout["features"][name]["dtype"] == "float16"
        if half and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            self.overflown.add(name)
            return
        path = array_path(self.folder, chunk.split, name)
        if path not in arrays:
            arrays[path] = np.lib.format.open_memmap(path, "r+")
        arrays[path][:, chunk.start : chunk.stop] = values

    def _mark(self, done: set[int], arrays: dict[Path, Mapped]) -> None:
        """Note what is done, after it is on the disk."""
        for array in arrays.values():
            array.flush()
        arrays.clear()
        self._write_progress(done)

    def _in_threads(self, chunks: list[_Chunk]) -> Iterator[tuple[_Chunk, dict[str, Array]]]:
        """Encode chunks in threads of one core each; at most two chunks a worker wait in memory.

        That is faster than one pass over all cores, and a result does not depend on their number.
        """
        if not chunks:
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # what a new thread takes over
        waiting: deque[tuple[_Chunk, Future[dict[str, Array]]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="features")
        try:
            rest = iter(chunks)
            while True:
                while len(waiting) < 2 * self.workers and (chunk := next(rest, None)) is not None:
                    # Once a feature has overflown its modality is done again, so the rest of it can wait.
                    if not self._to_be_widened(chunk.modality):
                        waiting.append((chunk, pool.submit(self._encode, chunk)))
                if not waiting:
                    return
                chunk, future = waiting.popleft()
                yield chunk, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)

    def _to_be_widened(self, modality: str) -> bool:
        return any(self.infos[name].modality == modality for name in self.overflown)

    def _encode(self, chunk: _Chunk) -> dict[str, Array]:
        """Features (V + 1, rows, C_i, L_i) float32 of a chunk."""
        encoder: Encoder = self.backbone.encoders[chunk.modality]
        samples = self.dataset.read(chunk.split, chunk.modality, range(chunk.start, chunk.stop))
        ids = self.ids[chunk.split][chunk.start : chunk.stop]
        encoded = [encoder.encode(samples, self.length)]
        for view in range(1, self._copies(chunk.split)):
            family = self.views[chunk.modality]
            generators = [view_generator(self.view_seed, chunk.modality, identity, view) for identity in ids]
            with self.viewing:
                viewed = [family(s, generator) for s, generator in zip(samples, generators, strict=True)]
            encoded.append(encoder.encode(viewed, self.length))
        names = [name for name, info in self.infos.items() if info.modality == chunk.modality]
        return {name: torch.stack([inputs[name] for inputs in encoded]).numpy() for name in names}


def view_generator(view_seed: int, modality: str, identity: str, view: int) -> torch.Generator:
    """The randomness of one view of one sample, whatever was drawn before."""
    digest = hashlib.sha256(json.dumps([view_seed, modality, identity, view]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def write_statistics(folder: Path, names: list[str]) -> None:
    """Mean and standard deviation of each channel over the clean training samples, in two passes."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name in names:
        values = np.load(array_path(folder, "train", name), mmap_mode="r")[0]  # (n, C, L)
        blocks = [partial(np.asarray, values[i : i + 1024], np.float64) for i in range(0, len(values), 1024)]
        count = max(len(values) * values.shape[2], 1)
        zero = np.zeros(values.shape[1])
        mean = sum((block().sum((0, 2)) for block in blocks), zero) / count
        square = sum((((block() - mean[:, None]) ** 2).sum((0, 2)) for block in blocks), zero) / count
        std = np.sqrt(square)
        tensors[f"{name}.mean"] = torch.from_numpy(mean).float()
        tensors[f"{name}.std"] = torch.from_numpy(np.where(std < SMALLEST_STD, 1.0, std)).float()
    new = folder / f"new.{STATISTICS_FILE}"
    save_file(tensors, new)
    os.replace(new, folder / STATISTICS_FILE)


def array_path(folder: Path, split: Split, name: str) -> Path:
    return folder / f"{split}.{name}.npy"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """Replace a file as a whole, so that an interruption leaves the old one or the new one."""
    new = path.with_name(f"new.{path.name}")
    new.write_text(json.dumps(content))
    os.replace(new, path)

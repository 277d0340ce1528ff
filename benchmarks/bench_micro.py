"""How fast micro-benchmarks are, as ratios within one run: `python -m benchmarks.bench_micro`.

    workers  the encoder stage of a search with one worker process against two, each from an empty store
    outside  time of a micro-benchmark outside its training steps: building, reading batches, Lightning,
             scoring on 1,000 held rows, the store's row; a share of the whole, which falls with the sample

Arrays have the shapes of AV-MNIST and MIMIC-III, networks those of `scale=cpu`; the arrays are drawn and tell
their class. Variants are interleaved, and the ratio is the median over pairs of runs. Scores of both must be
equal, number by number. The speed-up needs two free cores; `cpu_outside` counts CPU time, which other
programs disturb less.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmnas_lab.build import build_with_facts, check_config
from mmnas_lab.config import Config
from mmnas_lab.loader import draw_clean
from mmnas_lab.objective.multi_head import MultiHead
from mmnas_lab.strategy.base import Problem
from mmnas_lab.strategy.bench import Bench, Trial
from mmnas_lab.strategy.data_sample import draw_sample
from mmnas_lab.strategy.micro_benchmark import MicroBenchmark
from mmnas_lab.study import compose
from mmnas_lab.training import Runtime, TrainFit
from mmnas_lab.types import Batch, InputInfo, OutputInfo

SHAPES = {
    "avmnist": {
        "image": InputInfo((1, 28, 28), "image", "image"),
        "audio": InputInfo((1, 112, 112), "audio", "audio"),
    },
    "mimic3": {
        "series": InputInfo((24, 12), "series", "series"),
        "tabular": InputInfo((5,), "tabular", "tabular"),
    },
}
CLASSES = ("no", "yes")
HELD = 1000
TARGETS = {"workers": 1.6, "outside": 0.1}


class Drawn:
    """Samples in memory whose class shifts all their values: a `loader.Source`."""

    def __init__(self, infos: dict[str, InputInfo], count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.infos = infos
        self.labels: Tensor | None = torch.arange(count) % len(CLASSES)
        self.arrays = {
            name: torch.randn(count, *info.shape, generator=draw)
            + 0.3 * self.labels.view(-1, *[1] * len(info.shape))
            for name, info in infos.items()
        }

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def clean(self, index: Tensor) -> Batch:
        """The samples as they are."""
        assert self.labels is not None
        return Batch(({name: values[index] for name, values in self.arrays.items()},), self.labels[index])

    def of(self, names: tuple[str, ...]) -> Drawn:
        """The same samples with some of the arrays alone."""
        part = object.__new__(Drawn)
        part.infos = {name: self.infos[name] for name in names}
        part.labels, part.arrays = self.labels, {name: self.arrays[name] for name in names}
        return part

    def views(self, index: Tensor, generator: torch.Generator, count: int) -> Batch:
        """Micro-benchmarks read clean samples alone."""
        raise TypeError("micro-benchmarks with labels draw no views")

    def mixed(self, index: Tensor, generator: torch.Generator, clean_probability: float) -> Batch:
        """Micro-benchmarks read clean samples alone."""
        raise TypeError("micro-benchmarks with labels draw no views")


def problem(data: str, rows: int, epochs: int, root: Path) -> Problem:
    """A search of the experiment `mixmas_<data>` at `scale=cpu` on drawn arrays."""
    config: Config = check_config(
        compose([f"experiment=mixmas_{data}", "scale=cpu", f"search.epochs={epochs}"])
    )
    infos = SHAPES[data]
    weights, held = Drawn(infos, rows, 0), Drawn(infos, HELD, 1)

    def objective(info: OutputInfo) -> MultiHead:
        return MultiHead(info.embedding, "multiclass", CLASSES, torch.zeros(len(CLASSES)), info)

    return Problem(
        build_with_facts(config.search_space, "search_space", {}),
        infos,
        objective,
        MultiHead.needs,
        weights,
        held,
        draw_clean,
        config.search,
        0,
        Runtime(),
        root=root,
        data="drawn",
        objective_settings=config.objective,
        restricted=lambda names: (weights.of(names), held.of(names)),
    )


def encoder_trials(given: Problem, seeds: int) -> list[list[Trial]]:
    """The micro-benchmarks of every encoder choice, choice by choice."""
    return [
        [
            Trial(
                choice.name,
                option,
                given.space.candidate(choice.name, option, {}, given.inputs),
                seed,
                given.settings.epochs,
            )
            for seed in range(seeds)
            for option in choice.options
        ]
        for choice in given.space.choices(given.inputs)
        if choice.name.startswith("encoder.") and len(choice.options) > 1
    ]


def encoder_stage(given: Problem, workers: int, seeds: int) -> tuple[float, list[list[float]]]:
    """Seconds of the whole stage, processes and store included, and its scores."""
    with tempfile.TemporaryDirectory() as folder:
        strategy = MicroBenchmark(workers=workers, seeds=seeds, store=str(Path(folder) / "scores.sqlite"))
        rows = len(given.weights)
        bench = Bench(strategy, given, draw_sample(given.weights, rows, "random", 0, 0.05))
        stages = encoder_trials(given, seeds)
        start = time.perf_counter()
        with bench.processes() as measure:
            scores = [measure(trials) for trials in stages]
        return time.perf_counter() - start, scores


def bench_workers(given: Problem, runs: int, seeds: int) -> dict[str, Any]:
    """How much sooner two workers finish, over pairs of runs. Raises SystemExit where scores differ."""
    ratios, seconds = [], []
    for _ in range(runs):
        one, alone = encoder_stage(given, 1, seeds)
        two, together = encoder_stage(given, 2, seeds)
        if alone != together:
            raise SystemExit(f"scores of one and two workers differ: {alone} and {together}")
        ratios.append(one / two)
        seconds.append((one, two))
    return {
        "workers_ratio": statistics.median(ratios),
        "seconds": [[round(one, 2), round(two, 2)] for one, two in seconds],
        "equal_scores": sum(len(scores) for scores in alone),
        "cores": os.cpu_count(),
    }


class _Clock:
    """Wall-clock and CPU time within training steps: forward, backward and the optimizer."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.steps = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the steps of every fit in this block."""
        begin, end = TrainFit.on_train_batch_start, TrainFit.on_train_batch_end
        started = (0.0, 0.0)

        def before(fit: TrainFit, batch: Any, batch_idx: int) -> None:
            nonlocal started
            begin(fit, batch, batch_idx)
            started = time.perf_counter(), time.process_time()

        def after(fit: TrainFit, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.wall += time.perf_counter() - started[0]
            self.cpu += time.process_time() - started[1]
            self.steps += 1
            end(fit, outputs, batch, batch_idx)

        TrainFit.on_train_batch_start, TrainFit.on_train_batch_end = before, after  # type: ignore[method-assign]
        try:
            yield
        finally:
            TrainFit.on_train_batch_start, TrainFit.on_train_batch_end = begin, end  # type: ignore[method-assign]


def bench_outside(given: Problem) -> dict[str, Any]:
    """The share of time outside training steps, over one micro-benchmark of every encoder."""
    with tempfile.TemporaryDirectory() as folder:
        strategy = MicroBenchmark(store=str(Path(folder) / "scores.sqlite"))
        bench = Bench(strategy, given, draw_sample(given.weights, len(given.weights), "random", 0, 0.05))
        trials = [trial for stage in encoder_trials(given, 1) for trial in stage]
        bench.measure(trials[0])  # imports, allocations
        clock, shares = _Clock(), {}
        wall = cpu = 0.0
        for trial in trials:
            before, start, cpu_start = clock.wall, time.perf_counter(), time.process_time()
            with clock.running():
                bench.store.put(bench.measure(trial))
            seconds = time.perf_counter() - start
            wall, cpu = wall + seconds, cpu + time.process_time() - cpu_start
            shares[f"{trial.choice}.{trial.option}"] = round(1 - (clock.wall - before) / seconds, 3)
    return {
        "outside": 1 - clock.wall / wall,
        "cpu_outside": 1 - clock.cpu / cpu,
        "outside_each": shares,
        "step_ms": 1e3 * clock.wall / clock.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--data", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--rows", type=int, default=2000, help="of the sample, where time outside is measured"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--stage_rows", type=int, default=1000, help="of the sample, where workers compete")
    parser.add_argument("--stage_epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found: dict[str, Any] = {"targets": TARGETS}
    with tempfile.TemporaryDirectory() as root:
        for data in settings.data:
            own = bench_outside(problem(data, settings.rows, settings.epochs, Path(root)))
            print(data)
            print("\n".join(f"{name:>16}  {value}" for name, value in own.items()), flush=True)
            stage = problem(data, settings.stage_rows, settings.stage_epochs, Path(root))
            workers = bench_workers(stage, settings.runs, settings.seeds)
            print("\n".join(f"{name:>16}  {value}" for name, value in workers.items()), flush=True)
            own |= workers
            found[data] = own
    if settings.out is not None:
        settings.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Micro-benchmarks of a search: trials on one sample, measured once, over several processes."""

from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmnas_lab.config import FitSettings
from mmnas_lab.loader import Batches, FixedBatches, SubSource
from mmnas_lab.randomness import seed_of
from mmnas_lab.score_store import ScoreStore
from mmnas_lab.stage import digest
from mmnas_lab.strategy.base import Problem
from mmnas_lab.strategy.data_sample import DataSample
from mmnas_lab.training import train
from mmnas_lab.types import TrainingError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from mmnas_lab.strategy.micro_benchmark import MicroBenchmark

VERSION = 1
"""Raised when a micro-benchmark's score changes for the same settings; part of the store's keys."""


@dataclass(frozen=True)
class Trial:
    """One micro-benchmark: an option of a choice, in the network in which it is scored, under one seed."""

    choice: str
    option: str
    genotype: Any
    seed: int
    epochs: int


class Bench:
    """Measures trials on one sample, through the store."""

    def __init__(self, strategy: MicroBenchmark, problem: Problem, sample: DataSample) -> None:
        self.strategy, self.problem, self.sample = strategy, problem, sample
        self.source = SubSource(problem.weights, sample.rows)
        held = torch.arange(len(problem.architecture))
        if strategy.held_rows is not None and strategy.held_rows < len(held):
            order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
            held = order[: strategy.held_rows].sort().values
        self.held = SubSource(problem.architecture, held)
        path = Path(strategy.store) if strategy.store is not None else problem.root / "scores.sqlite"
        self.store = ScoreStore(path)
        info = problem.space.build(self._any(), problem.inputs).info
        self.metric, self.direction = problem.objective(info).selects
        self.measured = 0
        self._restricted: dict[tuple[str, ...], tuple[SubSource, SubSource]] = {}
        self._done, self._total = 0, 0

    def _any(self) -> Any:
        choice = self.problem.space.choices(self.problem.inputs)[0]
        return self.problem.space.candidate(choice.name, choice.options[0], {}, self.problem.inputs)

    def told(self) -> dict[str, Any]:
        """What a record says of the sample."""
        return {
            "rows": len(self.sample.rows),
            "of": len(self.problem.weights),
            "sampling": self.strategy.sampling,
            "distance": self.sample.distance,
            "redraws": self.sample.redraws,
            "held_rows": len(self.held),
        }

    def key(self, trial: Trial) -> tuple[str, dict[str, Any]]:
        """The store's key of a trial, and its row as far as it is known before it is measured."""
        strategy, settings = self.strategy, self.problem.settings
        budget = {
            **{
                name: value
                for name, value in settings.model_dump().items()
                if name in FitSettings.model_fields
            },
            "epochs": trial.epochs,
            "seconds": strategy.seconds,
            "precision": self.problem.runtime.precision,
            "view_probability": settings.view_probability,
            "views": settings.views.model_dump(),
            "pixel_views": settings.pixel_views.model_dump(),
        }
        rows = hashlib.sha256(
            self.sample.rows.numpy().tobytes() + self.held.rows.numpy().tobytes()
        ).hexdigest()
        row = {
            "choice": trial.choice,
            "option": trial.option,
            "candidate": self.problem.space.recipe(trial.genotype),
            "data": self.problem.data,
            "sample": rows[:16],
            "budget": {"objective": self.problem.objective_settings, **budget},
            "seed": trial.seed,
            "metric": self.metric,
            "versions": {"micro_benchmark": VERSION, "torch": torch.__version__.split("+")[0]},
        }
        # Which choice asks is no part of the key: an option is the same network whoever asks.
        return digest({k: v for k, v in row.items() if k not in ("choice", "option")}), row

    @contextmanager
    def processes(self) -> Iterator[Any]:
        """A function that gives the scores of trials, in their order, over as many processes as are set."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if self.strategy.workers == 1:
                yield lambda trials: self._all(trials, None)
                return
            # A forked process has everything at hand; it makes no thread pool of its own, see `_measured`.
            context = multiprocessing.get_context("fork")
            _Shared.bench = self
            with ProcessPoolExecutor(self.strategy.workers, mp_context=context) as pool:
                yield lambda trials: self._all(trials, pool)
        finally:
            _Shared.bench = None
            torch.set_num_threads(before)

    def _all(self, trials: Sequence[Trial], pool: ProcessPoolExecutor | None) -> list[float]:
        """Scores by trial; higher is better. What is in the store is not measured."""
        keys = [self.key(trial) for trial in trials]
        rows = [self.store.get(key) for key, _ in keys]
        missing = [k for k, row in enumerate(rows) if row is None]
        self._total += len(trials)
        self._progress(len(trials) - len(missing))
        if pool is None:
            for k in missing:
                self.store.put(self.measure(trials[k]))
                self._progress(1)
        else:
            self._over(pool, [trials[k] for k in missing])
        self.measured += len(missing)
        found = [
            row if row is not None else self.store.get(key) for row, (key, _) in zip(rows, keys, strict=True)
        ]
        sign = 1.0 if self.direction == "max" else -1.0
        return [sign * row["score"] for row in found if row is not None]

    def _over(self, pool: ProcessPoolExecutor, trials: Sequence[Trial]) -> None:
        """Measure trials in other processes; where one fails, those that run are still kept."""
        futures = [pool.submit(_measured, trial) for trial in trials]
        kept: set[Future[dict[str, Any]]] = set()

        def keep(done: Iterable[Future[dict[str, Any]]]) -> None:
            for future in done:
                if future not in kept and not future.cancelled() and future.exception() is None:
                    self.store.put(future.result())
                    kept.add(future)
                    self._progress(1)

        try:
            pending = set(futures)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                keep(done)
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            keep(future for future in futures if future.done())
            raise

    def _progress(self, steps: int) -> None:
        self._done += steps
        self.problem.runtime.progress("search", self._done, self._total)

    def measure(self, trial: Trial) -> dict[str, Any]:
        """Train and score one network, afresh; a row for the store.

        Raises:
            TrainingError: a score that is not finite.
        """
        problem, settings, started = self.problem, self.problem.settings, time.monotonic()
        source, held_source = self._sources(trial.genotype)
        key, row = self.key(trial)
        address = (trial.seed, "search", f"micro.{digest(row['candidate'])[:8]}")
        whole = problem.needs.views == 2
        torch.manual_seed(seed_of(*address, "init"))
        network = problem.space.build(trial.genotype, problem.inputs)
        fit = FitSettings(**{name: getattr(settings, name) for name in FitSettings.model_fields})
        runtime = problem.runtime.quiet()
        trained = train(
            network,
            problem.objective(network.info),
            Batches(source, problem.draw, settings.batch_size, address, whole),
            None,
            fit,
            label=f"search.{trial.choice}.{trial.option}",
            address=address,
            runtime=runtime,
            num_epochs=trial.epochs,
            max_seconds=self.strategy.seconds,
        )
        held = FixedBatches(held_source, problem.draw, settings.batch_size, (0, "search", "held"), whole)
        score = trained.scored.objective.evaluate(trained.scored.network, held)[self.metric]
        if not math.isfinite(score):
            raise TrainingError(
                f"micro-benchmark of {trial.choice}={trial.option}, seed {trial.seed}: {self.metric} is "
                f"{score}; lower search.optimizer.lr or set search.clip_norm; finished ones are kept"
            )
        seconds = time.monotonic() - started
        return {"key": key, **row, "score": score, "seconds": seconds, "training_seconds": trained.seconds}

    def _sources(self, genotype: Any) -> tuple[SubSource, SubSource]:
        """Sample and held rows with the inputs of a genotype alone, of which no view loses the last."""
        names = tuple(genotype.features)
        if self.problem.restricted is None or len(names) == len(self.problem.inputs):
            return self.source, self.held
        if names not in self._restricted:
            weights, architecture = self.problem.restricted(names)
            pair = SubSource(weights, self.source.rows), SubSource(architecture, self.held.rows)
            self._restricted[names] = pair
        return self._restricted[names]

    def flops(self, genotype: Any) -> int:
        """Floating-point operations of one sample through the network of a genotype."""
        from torch.utils.flop_counter import FlopCounterMode

        network = self.problem.space.build(genotype, self.problem.inputs).eval()
        inputs = {name: torch.zeros(1, *info.shape) for name, info in self.problem.inputs.items()}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(inputs)
        return int(counter.get_total_flops())


class _Shared:
    """What forked processes find in their memory."""

    bench: Bench | None = None


def _measured(trial: Trial) -> dict[str, Any]:
    """In a forked process: it uses threads only where the parent's pool, which is gone, is not needed."""
    assert _Shared.bench is not None
    torch.set_num_threads(1)
    return _Shared.bench.measure(trial)

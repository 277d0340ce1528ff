"""Greedy search by micro-benchmarks (MixMAS): choice after choice, each option trained on a sample."""

from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmnas_lab.config import FitSettings
from mmnas_lab.loader import Batches, FixedBatches, SubSource
from mmnas_lab.randomness import seed_of
from mmnas_lab.score_store import ScoreStore
from mmnas_lab.search_space.base import Choice
from mmnas_lab.stage import digest, write_json
from mmnas_lab.strategy.base import Problem, SearchResult
from mmnas_lab.strategy.data_sample import DataSample, Sampling, draw_sample, sample_size
from mmnas_lab.strategy.decision import Decision, decide, margin, told
from mmnas_lab.training import Point, train
from mmnas_lab.types import InputError, TrainingError

log = logging.getLogger(__name__)

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


class MicroBenchmark:
    """Greedy search without gradients (MixMAS, arXiv 2412.18437): each choice is made before the next.

    Every option is trained for the epochs of the search on a sample of the training data, by the objective
    and optimizer of the search, and scored on held rows: by the metric of an objective with labels, else by
    its loss, so that without labels all encoders are compared under one protocol (ours; the paper has
    labels). Each network is trained afresh, with a Trainer of its own, on one thread of a CPU, so that scores
    do not depend on the number of workers.

    A difference inside the noise is a tie, and the option that computes least is taken. Scores are kept in a
    store, under everything that they depend on; adding a candidate later measures that candidate alone.

    Args:
        sampling: how the sample is drawn: `random | stratified | uncertainty | diversity`.
        z: of the sample's size, see `data_sample.sample_size`.
        p: likewise.
        epsilon: likewise.
        fraction: share of the rows that is sampled, in place of the formula; the paper prints percentages
            that its formula does not give.
        distance: greatest difference of a class's share between a random sample and the whole.
        held_rows: at most so many rows score; null for all.
        seconds: end a training after that time, whatever the epochs; scores then depend on the machine.
        seeds: micro-benchmarks of each option.
        tie: standard errors of a paired difference up to which it counts as noise.
        halving: measure all options with a quarter of the epochs, the better half with half of them, and the
            better half of these with all (successive halving, arXiv 1502.07943); two at least remain.
        workers: processes that measure at once, a core each; CPU only.
        store: file of the scores; null for `scores.sqlite` beside the stages.

    Raises:
        InputError: a value outside its range.
    """

    name = "micro_benchmark"
    space_needs = ("candidate", "choices")
    needs_data, regularised, splits_train = True, False, False

    def __init__(
        self,
        sampling: Sampling = "random",
        z: float = 1.96,
        p: float = 0.5,
        epsilon: float = 0.01,
        fraction: float | None = None,
        distance: float = 0.05,
        held_rows: int | None = 1000,
        seconds: float | None = None,
        seeds: int = 3,
        tie: float = 2.0,
        halving: bool = False,
        workers: int = 1,
        store: str | None = None,
    ) -> None:
        for name, value in (("seeds", seeds), ("workers", workers)):
            if value < 1:
                raise InputError(f"strategy.{name} must be at least 1, got {value}")
        if z <= 0 or not 0 < p < 1 or not 0 < epsilon < 1:
            raise InputError(
                f"strategy.z must be positive, p and epsilon between 0 and 1, got {z:g}, {p:g}, {epsilon:g}"
            )
        if fraction is not None and not 0 < fraction <= 1:
            raise InputError(f"strategy.fraction must be in (0, 1], got {fraction:g}")
        if held_rows is not None and held_rows < 1:
            raise InputError(f"strategy.held_rows must be at least 1, or null for all, got {held_rows}")
        if tie < 0 or (seconds is not None and seconds <= 0):
            raise InputError("strategy.tie must not be negative, and strategy.seconds must be positive")
        self.sampling: Sampling = sampling
        self.z, self.p, self.epsilon, self.fraction, self.distance = z, p, epsilon, fraction, distance
        self.held_rows, self.seconds, self.seeds = held_rows, seconds, seeds
        self.tie, self.halving, self.workers, self.store = tie, halving, workers, store

    def settings(self) -> dict[str, Any]:
        """What the result depends on: neither the number of workers nor the place of the store."""
        kept = {name: value for name, value in vars(self).items() if name not in ("workers", "store")}
        return {"name": self.name, **kept}

    def search(self, problem: Problem, folder: Path) -> SearchResult:
        """The genotype of the options taken; `decisions.json` and `sample.json` tell how."""
        if problem.runtime.devices > 1 or (self.workers > 1 and problem.runtime.accelerator != "cpu"):
            raise InputError(
                "strategy=micro_benchmark runs on one device, with several workers on a CPU alone; set "
                "trainer.devices=1, and strategy.workers=1 on a GPU"
            )
        bench = Bench(self, problem, self._sample(problem))
        write_json(folder / "sample.json", bench.told())
        log.info("micro-benchmarks on %s", ", ".join(f"{k} {v}" for k, v in bench.told().items()))
        chosen: dict[str, str] = {}
        decisions: dict[str, Decision] = {}
        choices = problem.space.choices(problem.inputs)
        with bench.processes() as measure:
            for choice in choices:
                genotypes = {
                    option: problem.space.candidate(choice.name, option, chosen, problem.inputs)
                    for option in choice.options
                }
                decisions[choice.name] = decision = self._decide(choice, genotypes, bench, measure)
                chosen[choice.name] = decision.option
                write_json(folder / "decisions.json", {k: d.to_json() for k, d in decisions.items()})
        margins = {name: margin(decision) for name, decision in decisions.items()}
        history = [
            Point(number, k, f"search/{name}.{option}", score)
            for number, (name, decision) in enumerate(decisions.items())
            for option, scores in decision.scores.items()
            for k, score in enumerate(scores)
        ]
        told = {name: decision.to_json() for name, decision in decisions.items()}
        selection = {
            "name": bench.metric,
            "sample": bench.told(),
            "decisions": told,
            "new_scores": bench.measured,
        }
        return SearchResult(problem.space.genotype_of(chosen, problem.inputs), margins, selection, history)

    def _sample(self, problem: Problem) -> DataSample:
        rows = len(problem.weights)
        size = sample_size(rows, self.z, self.p, self.epsilon)
        if self.fraction is not None:
            size = max(1, round(self.fraction * rows))
        seed = seed_of(problem.seed, "search", "sample") % 2**32
        return draw_sample(problem.weights, size, self.sampling, seed, self.distance)

    def _decide(self, choice: Choice, genotypes: Mapping[str, Any], bench: Bench, measure: Any) -> Decision:
        """Measure the options, with halving the better ones longer, and take one."""
        options = list(choice.options)
        epochs = bench.problem.settings.epochs
        rungs = [max(1, epochs // 4), max(1, epochs // 2)] if self.halving else []
        for rung in rungs:
            if len(options) > 2:
                means = {
                    o: np.mean(s) for o, s in self._scores(choice, options, genotypes, rung, measure).items()
                }
                kept = sorted(options, key=lambda option: (-means[option], options.index(option)))
                better = kept[: max(2, math.ceil(len(options) / 2))]
                options = [option for option in options if option in better]
        scores = self._scores(choice, options, genotypes, epochs, measure) if len(choice.options) > 1 else {}
        if not scores:  # nothing to choose
            return Decision(options[0], {options[0]: []}, (options[0],), None, {options[0]: 0})
        flops = {option: bench.flops(genotypes[option]) for option in options}
        decision = decide(scores, flops, self.tie)
        log.info("%s: %s", choice.name, told(decision))
        return decision

    def _scores(
        self, choice: Choice, options: Sequence[str], genotypes: Mapping[str, Any], epochs: int, measure: Any
    ) -> dict[str, list[float]]:
        trials = [
            Trial(choice.name, option, genotypes[option], seed, epochs)
            for seed in range(self.seeds)
            for option in options
        ]
        found = dict(zip(((t.option, t.seed) for t in trials), measure(trials), strict=True))
        return {option: [found[option, seed] for seed in range(self.seeds)] for option in options}


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

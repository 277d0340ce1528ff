"""Greedy search by micro-benchmarks (MixMAS): choice after choice, each option trained on a sample."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmnas_lab.randomness import seed_of
from mmnas_lab.search_space.base import Choice
from mmnas_lab.stage import write_json
from mmnas_lab.strategy.base import Problem, SearchResult
from mmnas_lab.strategy.bench import Bench, Trial
from mmnas_lab.strategy.data_sample import DataSample, Sampling, draw_sample, sample_size
from mmnas_lab.strategy.decision import Decision, decide, margin, told
from mmnas_lab.training import Point
from mmnas_lab.types import InputError

log = logging.getLogger(__name__)

MOST_SEEDS = 1000


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
        seeds: micro-benchmarks of each option, at most 1,000; those of two searches share none.
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
        if seeds > MOST_SEEDS:
            raise InputError(f"strategy.seeds must be at most {MOST_SEEDS}, got {seeds}")
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
        bench = self.bench(problem)
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

    def bench(self, problem: Problem) -> Bench:
        """What measures micro-benchmarks on this search's sample, of whole networks too."""
        return Bench(self, problem, self._sample(problem))

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
        epochs, seeds = bench.problem.settings.epochs, self.trial_seeds(bench.problem.seed)
        rungs = [max(1, epochs // 4), max(1, epochs // 2)] if self.halving else []
        for rung in rungs:
            if len(options) > 2:
                rough = _scores(choice, options, genotypes, rung, seeds, measure)
                means = {option: np.mean(found) for option, found in rough.items()}
                kept = sorted(options, key=lambda option: (-means[option], options.index(option)))
                better = kept[: max(2, math.ceil(len(options) / 2))]
                options = [option for option in options if option in better]
        scores = {}
        if len(choice.options) > 1:
            scores = _scores(choice, options, genotypes, epochs, seeds, measure)
        if not scores:  # nothing to choose
            return Decision(options[0], {options[0]: []}, (options[0],), None, {options[0]: 0})
        flops = {option: bench.flops(genotypes[option]) for option in options}
        decision = decide(scores, flops, self.tie)
        log.info("%s: %s", choice.name, told(decision))
        return decision

    def trial_seeds(self, seed: int) -> range:
        """The seeds of a search's micro-benchmarks.

        Each search has its own: with a sample that is the whole data, nothing else would tell two of them
        apart.
        """
        return range(seed * MOST_SEEDS, seed * MOST_SEEDS + self.seeds)


def _scores(
    choice: Choice,
    options: Sequence[str],
    genotypes: Mapping[str, Any],
    epochs: int,
    seeds: Sequence[int],
    measure: Any,
) -> dict[str, list[float]]:
    """Scores by option, one a seed."""
    trials = [
        Trial(choice.name, option, genotypes[option], seed, epochs) for seed in seeds for option in options
    ]
    found = dict(zip(((t.option, t.seed) for t in trials), measure(trials), strict=True))
    return {option: [found[option, seed] for seed in seeds] for option in options}

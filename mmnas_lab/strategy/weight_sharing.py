"""Random search with weight sharing (Li and Talwalkar, arXiv 1902.07638)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmnas_lab import distributed
from mmnas_lab.loader import Batches, FixedBatches
from mmnas_lab.objective.base import Scored
from mmnas_lab.randomness import generator, seed_of
from mmnas_lab.search_space.base import Hypernet
from mmnas_lab.stage import write_json
from mmnas_lab.strategy.base import Problem, SearchResult
from mmnas_lab.training import Fit, Point, make_optimizer, make_schedule
from mmnas_lab.types import Batch, InputError, TrainingError

log = logging.getLogger(__name__)


class WeightSharingModule(Fit):
    """A hypernet of which every step trains another random genotype, and then a comparison of genotypes.

    The comparison is the last epoch's evaluation; its scores are written to `store` one by one, so that an
    interrupted one, after the same training, goes on where it was.
    """

    def __init__(
        self,
        *args: Any,
        problem: Problem,
        batches: Batches,
        held: FixedBatches,
        draws: int,
        store: Path,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.problem, self.batches, self.held, self.draws = problem, batches, held, draws
        self.store = store
        self.scores: list[dict[str, Any]] = []

    @property
    def network(self) -> Hypernet:
        """The hypernet."""
        return self.scored.network  # type: ignore[return-value]

    def steps_per_epoch(self, epoch: int) -> int:
        return len(self.batches)

    def epoch_batches(self, epoch: int, start: int) -> Iterator[Batch]:
        return self.batches.epoch(epoch, start)

    def drawn(self, kind: str, number: int) -> Any:
        """A genotype by its address, the same on all ranks."""
        draw_from = generator(*self.address, kind, number)
        return self.problem.space.sample(self.problem.inputs, draw_from)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with self.network.pinned(self.drawn("path", self._done)):
            losses = self.scored(batch)
        for name, value in losses.parts.items():
            self.add(f"search/weight_{name}", value)
        return losses.total

    def configure_optimizers(self) -> Any:
        arch = {id(parameter) for parameter in self.network.arch.values()}
        weights = [parameter for parameter in self.scored.parameters() if id(parameter) not in arch]
        optimizer = make_optimizer(weights, self.settings.optimizer, fused=False)
        schedule = make_schedule(optimizer, self.settings, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def after_epoch(self, epoch: int) -> dict[str, float]:
        if epoch < self.num_epochs - 1:
            return {}
        known = json.loads(self.store.read_text()) if self.store.exists() else []
        self.scores = distributed.broadcast(known)
        for number in range(len(self.scores), self.draws):
            genotype = self.drawn("draw", number)
            with self.network.pinned(genotype):
                loss = self.scored.objective.evaluate(self.network, self.held)["loss"]
            self.scores.append({"genotype": genotype.to_json(), "loss": loss})
            if distributed.rank() == 0:
                write_json(self.store, self.scores)
        finite = [score["loss"] for score in self.scores if math.isfinite(score["loss"])]
        if not finite:
            raise TrainingError(
                "no drawn genotype has a finite loss with the shared weights; lower search.optimizer.lr or "
                "set search.clip_norm"
            )
        return {"search/eval_loss": min(finite)}


class WeightSharing:
    """Random search with weight sharing: shared weights are trained on a new random genotype in every step.

    Then genotypes are drawn and scored with these weights, and the best on the held half is taken. Without
    training of their own many more can be compared than by `random`, on a proxy that may misjudge them.

    Args:
        draws: genotypes that are compared.

    Raises:
        InputError: fewer than one draw.
    """

    name = "weight_sharing"
    space_needs = ("hypernet", "sample", "pins")
    needs_data, regularised, splits_train = True, False, True

    def __init__(self, draws: int = 200) -> None:
        if draws < 1:
            raise InputError(f"strategy.draws must be at least 1, got {draws}")
        self.draws = draws

    def search(self, problem: Problem, folder: Path) -> SearchResult:
        """The draw with the lowest eval-mode loss on the architecture half, with the shared weights."""
        settings, address = problem.settings, (problem.seed, "search")
        whole = problem.needs.views == 2
        torch.manual_seed(seed_of(*address, "init"))
        network = problem.space.hypernet(problem.inputs)
        network.one_hot(problem.space.sample(problem.inputs, generator(*address, "draw", 0)))
        batches = Batches(problem.weights, problem.draw, settings.batch_size, (*address, "weights"), whole)
        module = WeightSharingModule(
            Scored(network, problem.objective(network.info)).to(problem.runtime.device),
            "search",
            settings,
            max(settings.epochs, -(-settings.min_steps // len(batches))),
            address,
            problem.runtime,
            folder / "search.ckpt",
            problem=problem,
            batches=batches,
            held=FixedBatches(
                problem.architecture, problem.draw, settings.batch_size, (*address, "held"), whole
            ),
            draws=self.draws,
            store=folder / "draws.json",
        )
        module.run(gradient_clip_val=settings.clip_norm, unused_parameters=True)
        log.info("search: %s", module.last_values())
        scores = module.scores
        best = min(
            (k for k, score in enumerate(scores) if math.isfinite(score["loss"])),
            key=lambda k: scores[k]["loss"],
        )
        history = module.history + [
            Point(k, k, "search/draw_loss", score["loss"]) for k, score in enumerate(scores)
        ]
        return SearchResult(
            problem.space.parse(scores[best]["genotype"], problem.inputs),
            {},
            {"name": "search/eval_loss", "value": scores[best]["loss"], "draw": best, "draws": len(scores)},
            history,
        )

"""Search by gradients: weights on one half of the data, architecture on the other, or both on all of it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mmnas_lab.loader import Batches, FixedBatches, JoinedSource, Source, draw_clean
from mmnas_lab.objective.base import Scored
from mmnas_lab.randomness import seed_of
from mmnas_lab.strategy.base import Problem, SearchResult
from mmnas_lab.strategy.curvature import CurvatureStop
from mmnas_lab.strategy.search_module import Alternation, Decide, HalfSteps, SearchModule, SingleLevelModule
from mmnas_lab.strategy.unrolled import Order
from mmnas_lab.types import InputError

log = logging.getLogger(__name__)


class Bilevel:
    """Bilevel search (DARTS, arXiv 1806.09055).

    Args:
        alternation: `batch` makes an architecture and a weight half-step in every step, as DARTS does;
            `epoch` passes once over the weight half, then once over the architecture half, as BM-NAS does.
        order: `first` holds the weights still; `second_released` and `second_exact` look one weight step
            ahead, by DARTS' finite difference or by differentiating twice (see `unrolled`).
        half_steps: which comes first where they alternate by batch.
        early_stop: measures the dominant eigenvalue of the Hessian, and stops when it grows.
        decide: how a genotype is found at the epoch with the lowest loss of the mixture. `weights` reads it
            off the mixing weights; `loss` compares single genotypes, each by its own eval-mode loss on the
            architecture half with the shared weights (see `discretisation`).

    Raises:
        InputError: a second-order step with epochs alternating, since it needs a batch of each half at once;
            `decide=loss` with an early stop, which has a rule of its own.
    """

    name: str = "bilevel"
    space_needs: tuple[str, ...] = ("hypernet",)
    needs_data, regularised, splits_train = True, True, True
    module: type[SearchModule] = SearchModule

    def __init__(
        self,
        alternation: Alternation = "batch",
        order: Order = "first",
        half_steps: HalfSteps = "arch_first",
        early_stop: CurvatureStop | None = None,
        decide: Decide = "weights",
    ) -> None:
        if order != "first" and alternation == "epoch":
            raise InputError(
                f"strategy.order={order} needs a batch of both halves in every step; set "
                "strategy.alternation=batch, or strategy.order=first"
            )
        self.alternation: Alternation = alternation
        self.order: Order = order
        self.half_steps: HalfSteps = half_steps
        self.early_stop = early_stop
        if decide not in ("weights", "loss"):
            raise InputError(f"strategy.decide must be weights or loss, got '{decide}'")
        if decide == "loss" and early_stop is not None:
            raise InputError(
                "strategy.early_stop takes the genotype of the epoch that it stops at; set "
                "strategy.decide=weights"
            )
        self.decide: Decide = decide
        if decide == "loss":
            self.name = "bilevel_by_loss"
            self.space_needs = ("hypernet", "pins", "revised")

    def sources(self, problem: Problem) -> tuple[Source, Source]:
        """What weights and architecture are trained on."""
        return problem.weights, problem.architecture

    def search(self, problem: Problem, folder: Path) -> SearchResult:
        """The genotype of the lowest eval-mode loss on the whole architecture half, as `decide` takes it."""
        settings, address = problem.settings, (problem.seed, "search")
        if settings.warmup_epochs >= settings.epochs:
            raise InputError(
                f"search.warmup_epochs={settings.warmup_epochs} leaves none of epochs={settings.epochs} "
                "to move the architecture; lower it"
            )
        whole = problem.needs.views == 2
        torch.manual_seed(seed_of(*address, "init"))
        network = problem.space.hypernet(problem.inputs)
        weight_source, arch_source = self.sources(problem)
        weights = Batches(weight_source, problem.draw, settings.batch_size, (*address, "weights"), whole)
        module = self.module(
            Scored(network, problem.objective(network.info), problem.regularisers).to(problem.runtime.device),
            "search",
            settings,
            max(settings.epochs, -(-settings.min_steps // len(weights))),
            address,
            problem.runtime,
            folder / "search.ckpt",
            weights=weights,
            architecture=Batches(arch_source, problem.draw, settings.batch_size, (*address, "arch"), whole),
            held=FixedBatches(
                problem.architecture,
                problem.draw if whole else draw_clean,
                settings.batch_size,
                (*address, "held"),
                whole,
            ),
            alternation=self.alternation,
            order=self.order,
            half_steps=self.half_steps,
            early_stop=self.early_stop,
            decide=self.decide,
        )
        module.run()
        log.info("search: %s", module.last_values())
        chosen, selection = module.best, {"name": "search/eval_loss", "value": module.best.get("loss")}
        if module.stopped:
            chosen = module.stopped
            selection = {"name": "search/eigenvalue", "growth": chosen["growth"]}
            selection["stopped_after"] = chosen["stopped_after"]
        elif module.decided:
            chosen = module.decided
            kept = ("loss_by_weights", "compared")
            selection = {"name": "search/single_loss", "value": chosen["loss"]}
            selection |= {name: chosen[name] for name in kept}
        trace = {"names": network.choice_names(), "records": module.trace}
        return SearchResult(
            problem.space.parse(chosen["genotype"], problem.inputs),
            chosen["margins"],
            {**selection, "epoch": chosen["epoch"]},
            module.history,
            trace,
            module.snapshots,
        )


class SingleLevel(Bilevel):
    """Weights and logits trained together on both halves, by one optimizer step each for the same batch.

    The genotype is still the one with the lowest loss on the architecture half, which is trained on here.
    """

    name = "single_level"
    module = SingleLevelModule

    def __init__(self) -> None:
        super().__init__()

    def sources(self, problem: Problem) -> tuple[Source, Source]:
        joined = JoinedSource(problem.weights, problem.architecture)
        return joined, joined

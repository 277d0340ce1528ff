"""Search by gradients: weights on one half of the data, architecture on the other, or both on all of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from mmnas_lab import distributed
from mmnas_lab.loader import Batches, FixedBatches, JoinedSource, Source, draw_clean
from mmnas_lab.objective.base import Scored
from mmnas_lab.randomness import seed_of
from mmnas_lab.search_space.base import Hypernet, held_weights
from mmnas_lab.strategy.base import Problem, SearchResult
from mmnas_lab.strategy.curvature import CurvatureStop, Stop, dominant_eigenvalue
from mmnas_lab.strategy.unrolled import Order, VirtualStep, unrolled_gradient
from mmnas_lab.training import Fit, make_optimizer, make_schedule
from mmnas_lab.types import Batch, InputError, Losses

log = logging.getLogger(__name__)

Alternation = Literal["batch", "epoch"]
HalfSteps = Literal["arch_first", "weights_first"]


SNAPSHOTS, SNAPSHOT_SAMPLES = 6, 6
"""Epochs of a search of which pictures are kept, and samples on each."""
KEPT = ("best", "trace", "eigenvalues", "measured", "stopped", "snapshots", "alarmed")
"""What a save point of a search holds besides the module."""


class SearchBatch(NamedTuple):
    """The half-steps of one step: either may be absent."""

    arch: Batch | None
    weights: Batch | None


class SearchModule(Fit):
    """A hypernet under alternating half-steps of alpha, beta, gamma and of w.

    The architecture half-step detaches the weights, and averages the gradient of the logits, a few numbers,
    over the ranks itself; the weight half-step detaches the logits. Under DDP the logits are therefore left
    out of its buckets, and stay bit-identical over ranks because every rank applies the same mean gradient.
    """

    def __init__(
        self,
        *args: Any,
        weights: Batches,
        architecture: Batches,
        held: FixedBatches,
        alternation: Alternation,
        order: Order = "first",
        half_steps: HalfSteps = "arch_first",
        early_stop: CurvatureStop | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.weight_batches, self.arch_batches, self.held = weights, architecture, held
        self.alternation, self.order, self.half_steps = alternation, order, half_steps
        self.early_stop = early_stop
        self.best: dict[str, Any] = {}
        self.trace: list[dict[str, Any]] = []
        self.eigenvalues: list[float] = []
        self.measured: dict[str, dict[str, Any]] = {}  # genotypes at the measured epochs
        self.stopped: dict[str, Any] = {}
        self.snapshots: dict[str, Tensor] = {}
        self.alarmed = False
        count = min(SNAPSHOTS, self.num_epochs)
        self.pictured = {round((k + 1) * self.num_epochs / count) - 1 for k in range(count)}
        names = [f"scored.network.arch.{name}" for name in self.network.arch]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    @property
    def network(self) -> Hypernet:
        """The hypernet."""
        return self.scored.network  # type: ignore[return-value]

    @property
    def arch_parameters(self) -> list[torch.nn.Parameter]:
        """alpha, beta, gamma."""
        return list(self.network.arch.values())

    @property
    def weight_parameters(self) -> list[torch.nn.Parameter]:
        """w: everything else, the objective's parameters included."""
        arch = {id(parameter) for parameter in self.arch_parameters}
        return [parameter for parameter in self.scored.parameters() if id(parameter) not in arch]

    # Which batches come when.

    def steps_per_epoch(self, epoch: int) -> int:
        if self.alternation == "batch":
            return len(self.weight_batches)
        return len(self.weight_batches) + (len(self.arch_batches) if self._moves(epoch) else 0)

    def epoch_batches(self, epoch: int, start: int) -> Iterator[SearchBatch]:
        if self.alternation == "batch":
            order, length = None, len(self.arch_batches)
            for step, weights in enumerate(self.weight_batches.epoch(epoch, start), start):
                arch = None
                if self._moves(epoch):
                    # The architecture half goes round as often as it takes, shuffled anew each time.
                    turn, inner = divmod(epoch * len(self.weight_batches) + step, length)
                    if order is None or order[0] != turn:
                        order = (turn, self.arch_batches.order(turn))
                    arch = self.arch_batches.batch(turn, inner, order[1])
                yield SearchBatch(arch, weights)
            return
        first = len(self.weight_batches)
        if start < first:
            for weights in self.weight_batches.epoch(epoch, start):
                yield SearchBatch(None, weights)
        if self._moves(epoch):
            for arch in self.arch_batches.epoch(epoch, max(start - first, 0)):
                yield SearchBatch(arch, None)

    def _moves(self, epoch: int) -> bool:
        """Whether the architecture is updated in this epoch."""
        return epoch >= self.settings.warmup_epochs  # type: ignore[attr-defined]

    # The two half-steps.

    def training_step(self, batch: SearchBatch, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        weight_optimizer, arch_optimizer = optimizers

        def arch_step() -> None:
            if batch.arch is not None:
                for name, value in self.arch_step(batch, arch_optimizer, weight_optimizer).items():
                    self.add(f"search/arch_{name}", value)

        def weight_step() -> None:
            if batch.weights is not None:
                for name, value in self.weight_step(batch.weights, weight_optimizer).items():
                    self.add(f"search/weight_{name}", value)

        both = (arch_step, weight_step)
        for step in both if self.half_steps == "arch_first" else reversed(both):
            step()

    def arch_step(self, batch: SearchBatch, optimizer: Any, weight_optimizer: Any) -> dict[str, Tensor]:
        """One step of alpha, beta and gamma; the parts of its loss."""
        assert batch.arch is not None
        if self.order == "first":
            losses: Losses = functional_call(
                self.scored, held_weights(self.scored, self.arch_parameters), (batch.arch, "arch")
            )
            gradients = list(torch.autograd.grad(losses.total, self.arch_parameters))
        else:
            assert batch.weights is not None
            named = {parameter: name for name, parameter in self.scored.named_parameters()}
            weights = {named[parameter]: parameter for parameter in self.weight_parameters}
            step = VirtualStep.of(weight_optimizer.optimizer, {w: name for name, w in weights.items()})
            gradients, losses = unrolled_gradient(
                self.scored, weights, self.arch_parameters, batch.arch, batch.weights, step, self.order
            )
        self._move(gradients, optimizer)
        return losses.parts

    def _move(self, gradients: list[Tensor], optimizer: Any) -> None:
        """Move the logits by the mean gradient over the ranks."""
        for parameter, gradient in zip(
            self.arch_parameters, distributed.mean_over_ranks(gradients), strict=True
        ):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    def weight_step(self, batch: Batch, optimizer: Any) -> dict[str, Tensor]:
        """One step of w with the mixing weights held; the parts of its loss."""
        optimizer.zero_grad()
        with self.network.weights_only():
            losses = self.scored(batch, "weights")
            self.manual_backward(losses.total)
        self._finish_weights(optimizer)
        return losses.parts

    def _finish_weights(self, optimizer: Any) -> None:
        """Clip the weights' gradients and step."""
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.weight_parameters, self.settings.clip_norm)
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        weights = make_optimizer(self.weight_parameters, self.settings.optimizer)
        arch = make_optimizer(self.arch_parameters, self.settings.arch_optimizer)  # type: ignore[attr-defined]
        steps = self.num_epochs * len(self.weight_batches)
        return [weights, arch], [make_schedule(weights, self.settings, steps)]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        distributed.broadcast_module(self.scored)

    # Selection.

    def after_epoch(self, epoch: int) -> dict[str, float]:
        mixing = {name: weights.flatten().tolist() for name, weights in self._mixing().items()}
        self.trace.append({"step": self._done, "epoch": epoch, "mixing": mixing})
        values = self.scored.objective.evaluate(self.network, self.held)
        loss = values["loss"]
        derived = self.network.derive()
        state = {"epoch": epoch, "genotype": derived.genotype.to_json(), "margins": derived.margins}
        if self._moves(epoch) and math.isfinite(loss) and (not self.best or loss < self.best["loss"]):
            self.best = {"loss": loss, **state}
        points = {f"search/eval_{name}": value for name, value in values.items()}
        points |= {f"search/{name}": value for name, value in self.network.monitors(derived.genotype).items()}
        if self._moves(epoch):
            self._sound_alarm(derived.genotype, epoch)
        if self.early_stop is not None and self.early_stop.measures(epoch):
            points["search/eigenvalue"] = self._measure(self.early_stop, state)
        if epoch in self.pictured and distributed.rank() == 0:
            self._take_snapshot(epoch)
        return points

    def _sound_alarm(self, genotype: Any, epoch: int) -> None:
        """Say once that the genotype degenerates."""
        alarm = self.network.alarm(genotype)
        if alarm and not self.alarmed:
            log.warning("after epoch %d %s", epoch, alarm)
            self.alarmed = True

    def _measure(self, early_stop: CurvatureStop, state: dict[str, Any]) -> float:
        """The dominant eigenvalue on the epoch's last architecture batch, in training mode; may end the fit.

        On ranks each takes its part of the batch.
        """
        epoch = state["epoch"]
        turn, step = divmod((epoch + 1) * len(self.weight_batches) - 1, len(self.arch_batches))
        if self.alternation == "epoch":
            turn, step = epoch, len(self.arch_batches) - 1
        self.scored.train()
        decay: float = self.settings.arch_optimizer.weight_decay  # type: ignore[attr-defined]
        value = dominant_eigenvalue(
            self.scored, self.arch_parameters, self.arch_batches.batch(turn, step), decay
        )
        self.scored.eval()
        self.eigenvalues.append(value)
        self.measured[str(epoch)] = state
        warmup: int = self.settings.warmup_epochs  # type: ignore[attr-defined]
        if stop := early_stop.decide(self.eigenvalues, warmup):
            self._stop(stop, epoch)
        return value

    def _stop(self, stop: Stop, epoch: int) -> None:
        log.warning(
            "search stopped after epoch %d: the dominant eigenvalue has grown by %.2f; the genotype is that "
            "of epoch %d",
            epoch,
            stop.growth,
            stop.epoch,
        )
        self.stopped = {**self.measured[str(stop.epoch)], "growth": stop.growth, "stopped_after": epoch}
        self.num_epochs = epoch + 1
        self.total_steps_cached = self.total_steps()
        self.trainer.should_stop = True

    def _take_snapshot(self, epoch: int) -> None:
        """Keep what the objective shows of a few held samples."""
        if not self.scored.objective.shows:
            return
        views, labels = next(iter(self.held))
        few = Batch(
            tuple({name: tensor[:SNAPSHOT_SAMPLES] for name, tensor in view.items()} for view in views),
            None if labels is None else labels[:SNAPSHOT_SAMPLES],
        )
        shown = self.scored.objective.snapshot(self.network, few)
        self.snapshots |= {f"{epoch}/{name}": tensor.cpu().contiguous() for name, tensor in shown.items()}

    @torch.no_grad()
    def _mixing(self) -> dict[str, Tensor]:
        return self.network.mixing()

    def extra_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in KEPT}

    def set_extra_state_from(self, state: dict[str, Any]) -> None:
        for name in KEPT:
            setattr(self, name, state[name])
        if self.stopped:
            self.num_epochs = self.stopped["stopped_after"] + 1


class SingleLevelModule(SearchModule):
    """A hypernet whose weights and logits move together, on the gradients of one loss."""

    def epoch_batches(self, epoch: int, start: int) -> Iterator[SearchBatch]:
        for batch in self.weight_batches.epoch(epoch, start):
            yield SearchBatch(batch if self._moves(epoch) else None, batch)

    def training_step(self, batch: SearchBatch, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        weight_optimizer, arch_optimizer = optimizers
        assert batch.weights is not None
        if batch.arch is None:
            parts = self.weight_step(batch.weights, weight_optimizer)
        else:
            weight_optimizer.zero_grad()
            losses = self.scored(batch.weights, "arch")
            self.manual_backward(losses.total)
            gradients = [parameter.grad for parameter in self.arch_parameters]
            self._finish_weights(weight_optimizer)
            self._move([gradient for gradient in gradients if gradient is not None], arch_optimizer)
            parts = losses.parts
        for name, value in parts.items():
            self.add(f"search/{name}", value)


class Bilevel:
    """Bilevel search (DARTS, arXiv 1806.09055).

    Args:
        alternation: `batch` makes an architecture and a weight half-step in every step, as DARTS does;
            `epoch` passes once over the weight half, then once over the architecture half, as BM-NAS does.
        order: `first` holds the weights still; `second_released` and `second_exact` look one weight step
            ahead, by DARTS' finite difference or by differentiating twice (see `unrolled`).
        half_steps: which comes first where they alternate by batch.
        early_stop: measures the dominant eigenvalue of the Hessian, and stops when it grows.

    Raises:
        InputError: a second-order step with epochs alternating, since it needs a batch of each half at once.
    """

    name = "bilevel"
    space_needs = ("hypernet",)
    needs_data, regularised, splits_train = True, True, True
    module: type[SearchModule] = SearchModule

    def __init__(
        self,
        alternation: Alternation = "batch",
        order: Order = "first",
        half_steps: HalfSteps = "arch_first",
        early_stop: CurvatureStop | None = None,
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

    def sources(self, problem: Problem) -> tuple[Source, Source]:
        """What weights and architecture are trained on."""
        return problem.weights, problem.architecture

    def search(self, problem: Problem, folder: Path) -> SearchResult:
        """The genotype with the lowest eval-mode loss on the whole architecture half, over the epochs."""
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
        )
        module.run()
        log.info("search: %s", module.last_values())
        chosen, selection = module.best, {"name": "search/eval_loss", "value": module.best.get("loss")}
        if module.stopped:
            chosen = module.stopped
            selection = {"name": "search/eigenvalue", "growth": chosen["growth"]}
            selection["stopped_after"] = chosen["stopped_after"]
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

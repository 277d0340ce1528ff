"""The fit of a gradient search: half-steps of architecture and weights, and what each epoch gives."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from mmnas_lab import distributed
from mmnas_lab.loader import Batches, FixedBatches
from mmnas_lab.search_space.base import Hypernet, held_weights
from mmnas_lab.strategy.curvature import CurvatureStop, Stop, dominant_eigenvalue
from mmnas_lab.strategy.discretisation import descend
from mmnas_lab.strategy.unrolled import Order, VirtualStep, unrolled_gradient
from mmnas_lab.training import Fit, make_optimizer, make_schedule
from mmnas_lab.types import Batch, Losses

log = logging.getLogger(__name__)

Alternation = Literal["batch", "epoch"]
HalfSteps = Literal["arch_first", "weights_first"]
Decide = Literal["weights", "loss"]


SNAPSHOTS, SNAPSHOT_SAMPLES = 6, 6
"""Epochs of a search of which pictures are kept, and samples on each."""
KEPT = (
    "best",
    "trace",
    "eigenvalues",
    "measured",
    "stopped",
    "snapshots",
    "alarmed",
    "best_state",
)
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
        decide: Decide = "weights",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.weight_batches, self.arch_batches, self.held = weights, architecture, held
        self.alternation, self.order, self.half_steps = alternation, order, half_steps
        self.early_stop, self.decide = early_stop, decide
        self.best_state: dict[str, Tensor] = {}  # of `scored`, where it is needed at the end
        self.decided: dict[str, Any] = {}
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
            if self.decide == "loss":
                state_now = self.scored.state_dict().items()
                self.best_state = {name: value.detach().cpu().clone() for name, value in state_now}
        points = {f"search/eval_{name}": value for name, value in values.items()}
        points |= {f"search/{name}": value for name, value in self.network.monitors(derived.genotype).items()}
        if self._moves(epoch):
            self._sound_alarm(derived.genotype, epoch)
        if self.early_stop is not None and self.early_stop.measures(epoch):
            points["search/eigenvalue"] = self._measure(self.early_stop, state)
        if epoch in self.pictured and distributed.rank() == 0:
            self._take_snapshot(epoch)
        if self.best_state and epoch == self.num_epochs - 1:
            self._compare()
        return points

    def _compare(self) -> None:
        """Decide by the losses of single genotypes, with the weights of the best epoch, which stay."""
        objective = self.scored.objective
        self.scored.load_state_dict(self.best_state)
        named = self.network.derive().genotype
        assert self.save_point is not None
        end = descend(
            self.network,
            named,
            lambda network: objective.evaluate(network, self.held)["loss"],
            self.save_point.with_name("compared.json"),
        )
        log.info(
            "%d single genotypes compared: loss %.3f, of the one that the weights name %.3f",
            end.compared,
            end.loss,
            end.start,
        )
        self.decided = {
            "genotype": end.genotype.to_json(),
            "margins": end.margins,
            "loss": end.loss,
            "epoch": self.best["epoch"],
            "loss_by_weights": end.start if math.isfinite(end.start) else None,
            "compared": end.compared,
        }

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
            setattr(self, name, state.get(name, getattr(self, name)))
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

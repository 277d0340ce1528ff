"""Train one network by one objective: pretraining, classifiers, retraining, one draw of a random search.

A fit is exact: batches, views and dropout are functions of (seed, stage, epoch, step), progress is counted in
the module, and a save point holds all that the rest depends on. So a killed fit goes on to the same result.
"""

from __future__ import annotations

import io
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mmnas_lab import distributed
from mmnas_lab.config import FitSettings, Optimizer
from mmnas_lab.loader import Batches, FixedBatches
from mmnas_lab.objective.base import Objective, Scored
from mmnas_lab.randomness import reseed, seed_of
from mmnas_lab.stage import atomically
from mmnas_lab.types import Batch, TrainingError

log = logging.getLogger(__name__)

Address = tuple[int | str, ...]


class Point(NamedTuple):
    """One logged value: counts of steps and epochs so far, and a name such as `train/loss`."""

    step: int
    epoch: int
    name: str
    value: float


@dataclass
class Runtime:
    """The hardware that a fit runs on, and who is told of its progress.

    Attributes:
        checkpoint_seconds: time between two save points.
        report: receives every logged point of the fit named by the first argument.
        progress: receives (label, steps done, steps in all) after every step.
    """

    accelerator: str = "cpu"
    devices: int = 1
    precision: str = "32-true"
    checkpoint_seconds: float = 30.0
    timeout_seconds: float = 600.0
    report: Callable[[str, Sequence[Point]], None] = lambda fit, points: None
    progress: Callable[[str, int, int], None] = lambda label, done, total: None

    def quiet(self) -> Runtime:
        """The same hardware, with nobody listening."""
        return replace(self, report=lambda fit, points: None, progress=lambda label, done, total: None)

    @property
    def device(self) -> torch.device:
        """Where tensors are kept."""
        return torch.device("cuda" if self.accelerator == "gpu" else "cpu")

    def trainer(self, unused_parameters: bool = False, **options: Any) -> pl.Trainer:
        """A Lightning Trainer for one fit; `unused_parameters` lets DDP meet ones that no loss depends on."""
        from lightning.pytorch.strategies import DDPStrategy

        strategy: Any = "auto"
        if self.devices > 1:
            backend = "nccl" if self.accelerator == "gpu" else "gloo"
            strategy = DDPStrategy(
                process_group_backend=backend,
                timeout=timedelta(seconds=self.timeout_seconds),
                find_unused_parameters=unused_parameters,
            )
        return pl.Trainer(
            accelerator=self.accelerator,
            devices=self.devices,
            strategy=strategy,
            precision=self.precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        )


class Fit(pl.LightningModule, ABC):
    """What every loop has: addressed randomness, exact save points, epoch means, evaluation after epochs.

    Args:
        scored: network and objective.
        label: of the fit, `<stage>.<name>`; the stage names the metrics.
        settings: length and rates.
        num_epochs: of the whole fit.
        address: that all draws derive from.
        runtime: hardware and listeners.
        save_point: file of the save point; None keeps none.
    """

    def __init__(
        self,
        scored: Scored,
        label: str,
        settings: FitSettings,
        num_epochs: int,
        address: Address,
        runtime: Runtime,
        save_point: Path | None,
    ) -> None:
        super().__init__()
        self.scored = scored
        self.label, self.stage = label, label.split(".")[0]
        self.settings, self.num_epochs, self.address = settings, num_epochs, address
        self.runtime, self.save_point = runtime, save_point
        self.sums: dict[str, Tensor] = {}  # of this epoch's losses, on the device
        self.history: list[Point] = []
        self._restored: dict[str, Any] | None = None
        self._saved_at = time.monotonic()

    # What a kind of fit decides.

    @abstractmethod
    def steps_per_epoch(self, epoch: int) -> int:
        """Number of steps of an epoch."""

    @abstractmethod
    def epoch_batches(self, epoch: int, start: int) -> Iterator[Any]:
        """The rest of an epoch's batches."""

    @abstractmethod
    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Evaluation after an epoch: values to log, named with the stage."""

    def extra_state(self) -> dict[str, Any]:
        """What else a save point must hold: tensors and plain values."""
        return {}

    def set_extra_state_from(self, state: dict[str, Any]) -> None:
        """Take over what `extra_state` gave."""

    # Where in the fit we are.

    def position(self) -> tuple[int, int]:
        """(epoch, step in the epoch) of the next step."""
        done, epoch = self._done, 0
        while epoch < self.num_epochs and done >= self.steps_per_epoch(epoch):
            done -= self.steps_per_epoch(epoch)
            epoch += 1
        return epoch, done

    def total_steps(self) -> int:
        """Number of steps of the whole fit."""
        return sum(self.steps_per_epoch(epoch) for epoch in range(self.num_epochs))

    _done = 0

    # Lightning's hooks.

    def train_dataloader(self) -> Any:
        epoch, start = self.position()
        return _Rest(self, epoch, start)

    def on_fit_start(self) -> None:
        if self._restored is not None:
            optimizers = self.trainer.optimizers
            for optimizer, state in zip(optimizers, self._restored["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            for config, state in zip(
                self.trainer.lr_scheduler_configs, self._restored["schedulers"], strict=True
            ):
                config.scheduler.load_state_dict(state)
            self._restored = None
        self.step_address = seed_of(*self.address, "step")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        reseed((self.step_address + self._done * 1_000_003 + distributed.rank() * 7919) % 2**63)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._done += 1
        self.runtime.progress(self.label, self._done, self.total_steps_cached)
        epoch_ended = batch_idx + 1 == self.steps_left
        if not epoch_ended and time.monotonic() - self._saved_at >= self.runtime.checkpoint_seconds:
            self.save()

    def on_train_epoch_start(self) -> None:
        epoch, start = self.position()
        self.epoch, self.steps_left = epoch, self.steps_per_epoch(epoch) - start
        network: Any = self.scored.network
        network.at_epoch(epoch, self.num_epochs)
        self.scored.objective.at_epoch(epoch, self.num_epochs)
        self.total_steps_cached = self.total_steps()

    def on_train_epoch_end(self) -> None:
        points = self.epoch_means()
        distributed.broadcast_buffers(self.scored)
        self.scored.eval()
        try:
            points |= self.after_epoch(self.epoch)
        finally:
            self.scored.train()
        for name, value in points.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} after epoch {self.epoch} of {self.label} (step {self._done}); lower "
                    f"{self.stage}.optimizer.lr or set {self.stage}.clip_norm; finished stages are kept"
                )
        logged = [Point(self._done, self.epoch, name, value) for name, value in points.items()]
        self.history += logged
        self.runtime.report(self.label, logged)
        self.sums = {}
        if self._done < self.total_steps_cached and (
            time.monotonic() - self._saved_at >= self.runtime.checkpoint_seconds
        ):
            self.save()

    def add(self, name: str, value: Tensor) -> None:
        """Add a () value to the mean over this epoch and all ranks, without leaving the device.

        The sums are equal on all ranks, so that a save point of rank 0 holds them all.
        """
        (mean,) = distributed.mean_over_ranks([value.detach().double()])
        pair = torch.stack([mean, torch.ones_like(mean)])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def epoch_means(self) -> dict[str, float]:
        """Means of what was added in this epoch."""
        return {name: float(total[0] / total[1]) for name, total in sorted(self.sums.items())}

    def last_values(self) -> str:
        """The last value of everything logged, as text: losses, scores, collapse monitors."""
        last = {point.name.split("/")[-1]: point.value for point in self.history}
        return ", ".join(f"{name} {value:.3f}" for name, value in last.items()) or "nothing logged"

    # Save points.

    def save(self) -> None:
        """Write a save point, on rank 0."""
        self._saved_at = time.monotonic()
        if self.save_point is None or distributed.rank() != 0:
            return
        state = {
            "scored": self.scored.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in self.trainer.lr_scheduler_configs],
            "done": self._done,
            "sums": self.sums,
            "history": [tuple(point) for point in self.history],
            "extra": self.extra_state(),
        }
        with atomically(self.save_point) as file:
            torch.save(state, file)

    def restore(self) -> None:
        """Go on from the save point, if there is a readable one."""
        if self.save_point is None or not self.save_point.exists():
            return
        try:
            data = self.save_point.read_bytes()
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            self.scored.load_state_dict(state["scored"])
        except Exception as error:  # torch raises three unrelated types for a damaged file
            log.warning(
                "save point %s cannot be read (%s): %s starts again", self.save_point, error, self.label
            )
            return
        self._restored = state
        self._done = state["done"]
        self.sums = {name: total.to(self.runtime.device) for name, total in state["sums"].items()}
        self.history = [Point(*point) for point in state["history"]]
        self.set_extra_state_from(state["extra"])
        self.runtime.report(self.label, self.history)
        log.info("%s goes on at step %d", self.label, self._done)

    def run(self, **trainer_options: Any) -> None:
        """The whole fit, from its save point on."""
        self.restore()
        epoch, _ = self.position()
        if epoch < self.num_epochs:
            trainer = self.runtime.trainer(
                max_epochs=self.num_epochs - epoch, reload_dataloaders_every_n_epochs=1, **trainer_options
            )
            trainer.fit(self)
        if self.save_point is not None and distributed.rank() == 0:
            self.save_point.unlink(missing_ok=True)


class _Rest:
    """The rest of an epoch as Lightning wants it: sized and iterable."""

    def __init__(self, fit: Fit, epoch: int, start: int) -> None:
        self.fit, self.epoch, self.start = fit, epoch, start

    def __len__(self) -> int:
        return self.fit.steps_per_epoch(self.epoch) - self.start

    def __iter__(self) -> Iterator[Any]:
        return self.fit.epoch_batches(self.epoch, self.start)


@dataclass
class Trained:
    """A trained network with its objective at the selected state.

    Attributes:
        history: everything logged.
        selection: epoch, name and value of what was selected by; epoch -1 where nothing was.
        states: the selected state of `scored`, already loaded.
    """

    scored: Scored
    history: list[Point]
    selection: dict[str, Any]
    seconds: float = 0.0
    others: dict[str, Any] = field(default_factory=dict)


class TrainFit(Fit):
    """A network trained by one optimizer; the best state on a validation source is kept."""

    def __init__(
        self, *args: Any, batches: Batches, evaluation: FixedBatches | None, evaluations: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batches, self.evaluation = batches, evaluation
        count = min(max(evaluations, 1), self.num_epochs)
        self.evaluated = {round((k + 1) * self.num_epochs / count) - 1 for k in range(count)}
        self.best: dict[str, Tensor] = {}
        self.selection: dict[str, Any] = {"epoch": -1, "name": None, "value": None}

    def steps_per_epoch(self, epoch: int) -> int:
        return len(self.batches)

    def epoch_batches(self, epoch: int, start: int) -> Iterator[Batch]:
        return self.batches.epoch(epoch, start)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.scored(batch)
        for name, value in losses.parts.items():
            self.add(f"{self.stage}/{name}", value)
        return losses.total

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(list(self.scored.parameters()), self.settings.optimizer)
        schedule = make_schedule(optimizer, self.settings, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def after_epoch(self, epoch: int) -> dict[str, float]:
        if self.evaluation is None or epoch not in self.evaluated:
            return {}
        objective: Objective = self.scored.objective
        values = objective.evaluate(self.scored.network, self.evaluation)
        name, direction = objective.selects
        value, best = values[name], self.selection["value"]
        if math.isfinite(value) and (best is None or (value > best if direction == "max" else value < best)):
            self.selection = {"epoch": epoch, "name": f"val_{name}", "value": value}
            self.best = {k: v.detach().cpu().clone() for k, v in self.scored.state_dict().items()}
        return {f"{self.stage}/val_{name}": value for name, value in values.items()}

    def extra_state(self) -> dict[str, Any]:
        return {"best": self.best, "selection": self.selection}

    def set_extra_state_from(self, state: dict[str, Any]) -> None:
        self.best, self.selection = state["best"], state["selection"]


def train(
    network: nn.Module,
    objective: Objective,
    batches: Batches,
    evaluation: FixedBatches | None,
    settings: FitSettings,
    *,
    label: str,
    address: Address,
    runtime: Runtime,
    num_epochs: int | None = None,
    evaluations: int = 1,
    save_point: Path | None = None,
    unused_parameters: bool = False,
    max_seconds: float | None = None,
) -> Trained:
    """Train a network and its objective, and load the state that is best on `evaluation`.

    Args:
        network: from inputs to an embedding.
        objective: head and loss; its parameters are trained too.
        batches: what each step reads.
        evaluation: what selects; None keeps the last state.
        settings: epochs, optimizer, schedule, clipping.
        label: `<stage>.<name>`.
        address: (seed, stage, ...) that dropout derives from.
        runtime: hardware.
        num_epochs: instead of `settings.epochs`.
        evaluations: number of evaluations, evenly spaced over the epochs.
        save_point: where the state is kept while it runs.
        unused_parameters: the network has parameters that the loss does not depend on.
        max_seconds: end after that time.

    Raises:
        TrainingError: a loss that is not finite.
    """
    start = time.monotonic()
    fit = TrainFit(
        Scored(network, objective).to(runtime.device),
        label,
        settings,
        settings.epochs if num_epochs is None else num_epochs,
        address,
        runtime,
        save_point,
        batches=batches,
        evaluation=evaluation,
        evaluations=evaluations,
    )
    limit = {} if max_seconds is None else {"max_time": timedelta(seconds=max_seconds)}
    unused = unused_parameters or bool(getattr(network, "unread", False))
    fit.run(gradient_clip_val=settings.clip_norm, unused_parameters=unused, **limit)
    if fit.best:
        fit.scored.load_state_dict(fit.best)
    distributed.broadcast_buffers(fit.scored)
    fit.scored.eval()
    log.info("%s: %s", label, fit.last_values())
    return Trained(fit.scored, fit.history, fit.selection, time.monotonic() - start)


def make_optimizer(
    parameters: list[nn.Parameter], settings: Optimizer, fused: bool = True
) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD over the parameters.

    `fused` is one pass over them, four times as fast on a CPU; torch's fused SGD wants every parameter to
    have a gradient from the first step on.
    """
    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=fused,
        )
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[settings.name](
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=fused
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: FitSettings, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's course over all steps of a fit."""
    schedulers = torch.optim.lr_scheduler
    if settings.schedule == "one_cycle" and total_steps > 3:
        return schedulers.OneCycleLR(optimizer, max_lr=settings.optimizer.lr, total_steps=total_steps + 1)
    if settings.schedule in ("cosine", "one_cycle"):
        return schedulers.CosineAnnealingLR(optimizer, T_max=max(total_steps, 1), eta_min=settings.final_lr)
    return schedulers.ConstantLR(optimizer, factor=1.0)

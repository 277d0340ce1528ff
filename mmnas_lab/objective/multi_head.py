"""A classifier on the fused embedding and one on each modality's, after M2-Mixer and MixMAS."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab.objective.base import Half, Run
from mmnas_lab.objective.classifier import Classifier
from mmnas_lab.objective.metrics import Select
from mmnas_lab.objective.supervised import Supervised
from mmnas_lab.types import Batch, InputError, Inputs, Losses, Output, OutputInfo, Task


class MultiHead(Classifier):
    """w l(z_f) + (1 - w) / M sum_m l(z_m): the loss of the fused logits and of each modality's.

    Each tap of the network that is a vector is a modality with a head. A sample that lacks a modality, as the
    input `present.<modality>` says, has no part in that modality's loss and average. A network without taps
    has the plain loss. Scores and the evaluated `loss` are those of z_f.

    Args:
        embedding: D of the network.
        task: of the dataset.
        classes: names of the Y classes.
        prior: (Y,) log-odds (multi-label) or log-probabilities of the classes among the training labels.
        output: shapes of the network's taps.
        fusion_weight: w in the first epoch; null for 1 / (M + 1), all losses alike.
        fusion_weight_growth: added to w after each epoch, until it is 1 (M2-Mixer-LC: 0.05).
        growth_from_epoch: the first epoch, counted from 0, after which w grows.
        scaled: multiply by M + 1, so that at w = 1 / (M + 1) the losses are summed.
        average_logits: z_f is the mean of the fused head's logits and all modalities' (MixMAS' released code;
            M2-Mixer predicts by the fused head alone).
        threshold: probability above which a label is predicted (multi-label).
        dropout: on every embedding.
        prior_bias: start every head's bias at `prior` instead of torch's default.
        weight_scale: factor on the initial weights.
        label_smoothing: share of the target that is spread over all classes (cross-entropy only).
        select: what states and candidates are chosen by, as in `Classifier`; scores of z_f.

    Raises:
        InputError: weights out of range, or what `Supervised` refuses.
    """

    def __init__(
        self,
        embedding: int,
        task: Task,
        classes: tuple[str, ...],
        prior: Tensor,
        output: OutputInfo | None = None,
        fusion_weight: float | None = None,
        fusion_weight_growth: float = 0.0,
        growth_from_epoch: int = 0,
        scaled: bool = True,
        average_logits: bool = False,
        threshold: float = 0.3,
        dropout: float = 0.0,
        prior_bias: bool = False,
        weight_scale: float = 1.0,
        label_smoothing: float = 0.0,
        select: Select = "auto",
    ) -> None:
        super().__init__(task, classes, threshold, label_smoothing, select)
        if fusion_weight is not None and not 0 <= fusion_weight <= 1:
            raise InputError(f"fusion_weight must be in [0, 1], got {fusion_weight:g}")
        if fusion_weight_growth < 0 or growth_from_epoch < 0:
            raise InputError(
                f"fusion_weight_growth and growth_from_epoch must not be negative, got "
                f"{fusion_weight_growth:g} and {growth_from_epoch}"
            )

        def head(width: int) -> Supervised:
            return Supervised(
                width,
                task,
                classes,
                prior,
                threshold=threshold,
                dropout=dropout,
                prior_bias=prior_bias,
                weight_scale=weight_scale,
                label_smoothing=label_smoothing,
            )

        taps = output.taps if output is not None else {}
        self.fused = head(embedding)
        self.heads = nn.ModuleDict({name: head(shape[0]) for name, shape in taps.items() if len(shape) == 1})
        count = len(self.heads)
        self.first_weight = 1 / (count + 1) if fusion_weight is None or not count else fusion_weight
        self.growth, self.growth_from_epoch = fusion_weight_growth, growth_from_epoch
        self.fusion_weight = self.first_weight
        self.factor = count + 1 if scaled else 1
        self.average_logits = average_logits

    def at_epoch(self, epoch: int, epochs: int) -> None:
        """The weight of the fused loss grows linearly up to 1."""
        grown = max(0, epoch - self.growth_from_epoch) * self.growth
        self.fusion_weight = min(1.0, self.first_weight + grown)

    def logits(self, output: Output, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, Y) logits z_f, and z_m by modality."""
        fused = self.fused.logits(output.embedding)
        own: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            assert isinstance(head, Supervised)
            own[name] = head.logits(output.taps[name])
        if not self.average_logits:
            return fused, own
        marks = [_present(inputs, name, z) for name, z in own.items()]
        total = sum((z * mark for z, mark in zip(own.values(), marks, strict=True)), fused)
        return total / sum(marks, 1), own

    def classify(self, run: Run, batch: Batch) -> Tensor:
        """(B, Y) logits z_f of a batch."""
        return self.logits(run(batch.views[0]), batch.views[0])[0]

    def forward(self, run: Run, batch: Batch, half: Half = "weights") -> Losses:
        assert batch.labels is not None
        inputs = batch.views[0]
        fused, own = self.logits(run(inputs), inputs)
        loss = self.loss(fused, batch.labels)
        losses = {name: self._own_loss(z, batch.labels, inputs, name) for name, z in own.items()}
        total = self.fusion_weight * loss
        for one in losses.values():
            total = total + (1 - self.fusion_weight) / len(losses) * one
        total = self.factor * total
        parts = {"loss": total, "fused_loss": loss, **{f"{name}_loss": one for name, one in losses.items()}}
        return Losses(total, {name: value.detach() for name, value in parts.items()})

    def _own_loss(self, logits: Tensor, labels: Tensor, inputs: Inputs, name: str) -> Tensor:
        """() mean over the samples that have a modality; 0 where none has."""
        if f"present.{name}" not in inputs:
            return self.loss(logits, labels)
        mark = _present(inputs, name, logits)[:, 0]
        if self.task == "multilabel":
            targets = labels.to(logits.dtype)
            each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        else:
            each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return (each * mark).sum() / mark.sum().clamp(min=1)


def _present(inputs: Inputs, name: str, logits: Tensor) -> Tensor:
    """(B, 1), 1 for samples that have a modality and 0 for others."""
    if f"present.{name}" not in inputs:
        return logits.new_ones(len(logits), 1)
    return inputs[f"present.{name}"].to(logits.dtype)[:, None]

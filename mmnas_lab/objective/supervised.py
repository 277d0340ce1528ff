"""A classifier on the embedding: binary cross-entropy per class, or cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmnas_lab.objective.base import Half, Run
from mmnas_lab.objective.classifier import Classifier
from mmnas_lab.objective.metrics import Select
from mmnas_lab.types import Batch, InputError, Losses, OutputInfo, Task


class Supervised(Classifier):
    """A linear classifier with the loss of its task: BCE for multi-label, cross-entropy for one class.

    Args:
        embedding: D of the network.
        task: of the dataset.
        classes: names of the Y classes.
        prior: (Y,) log-odds (multi-label) or log-probabilities of the classes among the training labels.
        threshold: probability above which a label is predicted (multi-label).
        dropout: on the embedding.
        prior_bias: start the bias at `prior` instead of torch's default.
        weight_scale: factor on the initial weights; a small one lets the prior speak first.
        label_smoothing: share of the target that is spread over all classes (cross-entropy only).
        auxiliary_weight: of the same loss by a second classifier on the tap `auxiliary`, in training (DARTS:
            0.4); the found network must have that tap.
        output: shapes of the network's taps.
        select: what states and candidates are chosen by, as in `Classifier`.
    """

    def __init__(
        self,
        embedding: int,
        task: Task,
        classes: tuple[str, ...],
        prior: Tensor,
        threshold: float = 0.3,
        dropout: float = 0.0,
        prior_bias: bool = False,
        weight_scale: float = 1.0,
        label_smoothing: float = 0.0,
        auxiliary_weight: float = 0.0,
        output: OutputInfo | None = None,
        select: Select = "auto",
    ) -> None:
        super().__init__(task, classes, threshold, label_smoothing, select)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(embedding, len(classes))
        self.auxiliary_weight = auxiliary_weight
        self.auxiliary: nn.Linear | None = None
        if auxiliary_weight:
            taps = output.taps if output is not None else {}
            if "auxiliary" not in taps:
                raise InputError(
                    f"auxiliary_weight={auxiliary_weight:g} needs a network with the tap 'auxiliary'; set "
                    "search_space.auxiliary=true (cnn_cells), or auxiliary_weight=0"
                )
            self.auxiliary = nn.Linear(taps["auxiliary"][0], len(classes))
        with torch.no_grad():
            self.linear.weight.mul_(weight_scale)
            if prior_bias:
                self.linear.bias.copy_(prior)

    def logits(self, embedding: Tensor) -> Tensor:
        """(B, Y) logits of an embedding (B, D)."""
        return self.linear(self.dropout(embedding))

    def classify(self, run: Run, batch: Batch) -> Tensor:
        """(B, Y) logits of a batch."""
        return self.logits(run(batch.views[0]).embedding)

    def forward(self, run: Run, batch: Batch, half: Half = "weights") -> Losses:
        assert batch.labels is not None
        output = run(batch.views[0])
        loss = self.loss(self.logits(output.embedding), batch.labels)
        total = loss
        if self.auxiliary is not None and "auxiliary" in output.taps:
            second = self.loss(self.auxiliary(output.taps["auxiliary"]), batch.labels)
            total = loss + self.auxiliary_weight * second
        return Losses(total, {"loss": loss.detach()})

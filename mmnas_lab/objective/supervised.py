"""A classifier on the embedding: binary cross-entropy per class, or cross-entropy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab import distributed
from mmnas_lab.objective.base import Half, Needs, Objective, Run
from mmnas_lab.objective.metrics import classification_metrics
from mmnas_lab.types import Batch, InputError, Losses, OutputInfo, Task


class Supervised(Objective):
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
    """

    needs = Needs(views=1, labels=True)

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
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if label_smoothing and task == "multilabel":
            raise InputError("label_smoothing is for one class a sample; set it to 0 for multi-label data")
        if not 0 < threshold < 1:
            raise InputError(f"threshold must be between 0 and 1, got {threshold}")
        self.task, self.classes, self.threshold = task, classes, threshold
        self.selects = ("f1_weighted", "max") if task == "multilabel" else ("accuracy", "max")
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(embedding, len(classes))
        self.label_smoothing, self.auxiliary_weight = label_smoothing, auxiliary_weight
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

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """() mean over samples (and classes for multi-label), in nats."""
        if self.task == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def forward(self, run: Run, batch: Batch, half: Half = "weights") -> Losses:
        assert batch.labels is not None
        output = run(batch.views[0])
        loss = self.loss(self.logits(output.embedding), batch.labels)
        total = loss
        if self.auxiliary is not None and "auxiliary" in output.taps:
            second = self.loss(self.auxiliary(output.taps["auxiliary"]), batch.labels)
            total = loss + self.auxiliary_weight * second
        return Losses(total, {"loss": loss.detach()})

    @torch.no_grad()
    def predict(self, run: Run, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Logits (n, Y) and labels of all batches of this rank."""
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in batches:
            assert batch.labels is not None
            logits.append(self.logits(run(batch.views[0]).embedding))
            labels.append(batch.labels)
        if not logits:
            return torch.zeros(0, len(self.classes)), torch.zeros(0)
        return torch.cat(logits), torch.cat(labels)

    def evaluate(self, run: Run, batches: Iterable[Batch]) -> dict[str, float]:
        logits, labels = self.predict(run, batches)
        if distributed.world_size() > 1:
            everything = distributed.gather_objects((logits.cpu(), labels.cpu()))
            logits = torch.cat([part for part, _ in everything])
            labels = torch.cat([part for _, part in everything if len(part)])
        metrics = classification_metrics(logits, labels, self.task, self.threshold)
        return {"loss": float(self.loss(logits, labels)), **metrics}

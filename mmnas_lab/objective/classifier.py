"""What objectives that classify have in common: the loss of a task, predictions and their scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmnas_lab import distributed
from mmnas_lab.objective.base import Needs, Objective, Run
from mmnas_lab.objective.metrics import Select, classification_metrics, selection
from mmnas_lab.types import Batch, InputError, Task


class Classifier(Objective):
    """Binary cross-entropy per class (multi-label), or cross-entropy, on logits.

    Args:
        task: of the dataset.
        classes: names of the Y classes.
        threshold: probability above which a label is predicted (multi-label).
        label_smoothing: share of the target that is spread over all classes (cross-entropy only).
        select: what states and candidates are chosen by: `loss`, a metric of the task, or `auto` for weighted
            F1 (multi-label) or accuracy.

    Raises:
        InputError: settings out of range, or a metric that the task has not.
    """

    needs = Needs(views=1, labels=True)

    def __init__(
        self,
        task: Task,
        classes: tuple[str, ...],
        threshold: float,
        label_smoothing: float,
        select: Select = "auto",
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if label_smoothing and task == "multilabel":
            raise InputError("label_smoothing is for one class a sample; set it to 0 for multi-label data")
        if not 0 < threshold < 1:
            raise InputError(f"threshold must be between 0 and 1, got {threshold}")
        self.task, self.classes, self.threshold = task, classes, threshold
        self.label_smoothing = label_smoothing
        self.selects = selection(select, task, len(classes))

    @abstractmethod
    def classify(self, run: Run, batch: Batch) -> Tensor:
        """(B, Y) logits of a batch, by which the network is scored."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """() mean over samples (and classes for multi-label), in nats."""
        if self.task == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    @torch.no_grad()
    def predict(self, run: Run, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Logits (n, Y) and labels of all batches of this rank."""
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in batches:
            assert batch.labels is not None
            logits.append(self.classify(run, batch))
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
        values = {"loss": float(self.loss(logits, labels)), **metrics}
        if self.selects[0] not in values:
            raise InputError(
                f"select={self.selects[0]} needs samples of several classes among the {len(labels)} that are "
                "scored, and they are all of one; choose by loss, or hold out more samples"
            )
        return values

"""Test a trained network, once, and score what its logits say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmnas_lab import distributed
from mmnas_lab.loader import FixedBatches, Source, draw_clean
from mmnas_lab.objective.base import Scored
from mmnas_lab.objective.classifier import Classifier
from mmnas_lab.objective.metrics import classification_metrics, per_class_f1
from mmnas_lab.types import Task


def predict(scored: Scored, source: Source, batch_size: int) -> Tensor:
    """Logits (n, Y) of all samples of a source, in its order, on every rank."""
    objective: Classifier = scored.objective  # type: ignore[assignment]
    batches = FixedBatches(source, draw_clean, batch_size, (0, "test"), whole=False)
    scored.eval()
    logits, _ = objective.predict(scored.network, batches)
    parts = [part.split(batch_size) if len(part) else () for part in distributed.gather_objects(logits.cpu())]
    world = len(parts)
    count = -(-len(source) // batch_size)
    return torch.cat([parts[i % world][i // world] for i in range(count)])


def score(
    logits: Tensor,
    labels: Tensor,
    task: Task,
    threshold: float,
    classes: tuple[str, ...],
    subsets: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """All metrics of logits, with `per_class` F1 by class name.

    Of each named subset of rows the main metric as well: `accuracy_<name>`, or `f1_weighted_<name>`.
    """
    metrics: dict[str, Any] = dict(classification_metrics(logits, labels, task, threshold))
    main = "accuracy" if task == "multiclass" else "f1_weighted"
    for name, rows in (subsets or {}).items():
        part = classification_metrics(logits[rows], labels[rows], task, threshold)
        metrics[f"{main}_{name}"] = part[main]
    metrics["per_class"] = per_class_f1(logits, labels, task, threshold, classes)
    return metrics


def log_prior(labels: Tensor, task: Task, num_classes: int) -> Tensor:
    """(Y,) log-odds of (n+ + 0.5) / (n + 1) among training labels; log-probabilities for one class."""
    if task == "multilabel":
        p = (labels.sum(0).double() + 0.5) / (len(labels) + 1)
        return torch.log(p / (1 - p)).float()
    counts = torch.bincount(labels, minlength=num_classes).double()
    return torch.log((counts + 0.5) / (counts + 0.5).sum()).float()


def late_fusion(logits: list[Tensor], prior: Tensor, task: Task) -> Tensor:
    """Combine unimodal classifiers that are independent given the class: log-odds added, prior counted once.

    For one class among many the log-probabilities take the log-odds' place.
    """
    if task == "multiclass":
        logits = [torch.log_softmax(one, -1) for one in logits]
    return torch.stack(logits).sum(0) - (len(logits) - 1) * prior

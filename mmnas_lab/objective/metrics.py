"""Scores of classifiers, by torchmetrics; all are fractions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mmnas_lab.types import InputError, Task

Select = Literal[
    "auto",
    "loss",
    "accuracy",
    "f1_weighted",
    "f1_macro",
    "f1_micro",
    "f1_samples",
    "auroc",
    "auprc",
    "auroc_macro",
    "auprc_macro",
]
"""The metric that a state, or a candidate, is chosen by; `auto` is the usual one of the task."""


def metric_names(task: Task, num_classes: int) -> tuple[str, ...]:
    """What `classification_metrics` gives for a task, where every class has a curve."""
    if task == "multilabel":
        return "f1_weighted", "f1_micro", "f1_macro", "f1_samples"
    areas = ("auroc", "auprc") if num_classes == 2 else ("auroc_macro", "auprc_macro")
    return "accuracy", "f1_macro", "f1_weighted", *areas


def selection(
    select: str, task: Task, num_classes: int, key: str = "select"
) -> tuple[str, Literal["min", "max"]]:
    """The quantity to choose by, and whether it is to be small or large.

    Args:
        select: `auto` for weighted F1 (multi-label) or accuracy, `loss`, or a metric of the task.
        task: of the dataset.
        num_classes: Y.
        key: what a message calls it.

    Raises:
        InputError: a metric that the task has not, with those that it has.
    """
    if select == "auto":
        return ("f1_weighted" if task == "multilabel" else "accuracy"), "max"
    if select == "loss":
        return "loss", "min"
    valid = metric_names(task, num_classes)
    if select not in valid:
        raise InputError(
            f"{key}={select}: {task} data of {num_classes} classes has no such metric; valid are: auto, "
            f"loss, {', '.join(valid)}"
        )
    return select, "max"


def classification_metrics(logits: Tensor, labels: Tensor, task: Task, threshold: float) -> dict[str, float]:
    """Scores of logits (n, Y) against labels.

    Multi-label: F1 with averages weighted, micro, macro (over classes) and samples, a label being predicted
    where sigmoid(logit) > threshold; zero where a class or sample has neither labels nor predictions.
    One class: accuracy, F1 macro and weighted, and the areas under the curves of `_areas`.
    """
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_f1_score,
        multilabel_f1_score,
    )

    classes = logits.shape[1]
    if task == "multiclass":
        return {
            "accuracy": float(multiclass_accuracy(logits, labels, classes, average="micro")),
            "f1_macro": float(multiclass_f1_score(logits, labels, classes, average="macro")),
            "f1_weighted": float(multiclass_f1_score(logits, labels, classes, average="weighted")),
            **_areas(logits, labels),
        }
    # Sigmoid first: torchmetrics takes logits that happen to lie in [0, 1] for probabilities.
    probabilities, truth = torch.sigmoid(logits), labels.int()
    scores = {
        f"f1_{average}": float(multilabel_f1_score(probabilities, truth, classes, threshold, average))
        for average in ("weighted", "micro", "macro")
    }
    samples = multilabel_f1_score(
        probabilities.unsqueeze(-1), truth.unsqueeze(-1), classes, threshold, "micro", "samplewise"
    )
    return {**scores, "f1_samples": float(samples.mean())}


def _areas(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Areas under the ROC curve and under precision over recall (average precision), exact.

    Of two classes those of the second, `auroc` and `auprc`; of more each class against the others, averaged
    over the classes, `auroc_macro` and `auprc_macro`. Classes that all samples have, or none, have no curve
    and are left out; without any curve there are no areas.
    """
    from torchmetrics.functional.classification import binary_auroc, binary_average_precision

    probabilities, classes = torch.softmax(logits.float(), 1), logits.shape[1]
    columns: Iterable[int] = [1] if classes == 2 else range(classes)
    suffix = "" if classes == 2 else "_macro"
    curves = [
        (probabilities[:, column], truth)
        for column in columns
        if 0 < int((truth := (labels == column).long()).sum()) < len(labels)
    ]
    if not curves:
        return {}
    return {
        f"auroc{suffix}": sum(float(binary_auroc(*curve)) for curve in curves) / len(curves),
        f"auprc{suffix}": sum(float(binary_average_precision(*curve)) for curve in curves) / len(curves),
    }


def per_class_f1(
    logits: Tensor, labels: Tensor, task: Task, threshold: float, classes: Sequence[str]
) -> dict[str, float]:
    """F1 of each class by its name."""
    from torchmetrics.functional.classification import multiclass_f1_score, multilabel_f1_score

    if task == "multiclass":
        scores = multiclass_f1_score(logits, labels, len(classes), average="none")
    else:
        scores = multilabel_f1_score(torch.sigmoid(logits), labels.int(), len(classes), threshold, "none")
    return dict(zip(classes, scores.tolist(), strict=True))

"""The sample of the training data on which micro-benchmarks are made (MixMAS, arXiv 2412.18437)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmnas_lab.dataset.split import stratified_order
from mmnas_lab.loader import Source
from mmnas_lab.types import InputError

Sampling = Literal["random", "stratified", "uncertainty", "diversity"]
COMPONENTS = 32
"""Principal components in which rows are compared by `uncertainty` and `diversity`."""


def sample_size(population: int, z: float = 1.96, p: float = 0.5, epsilon: float = 0.01) -> int:
    """Rows that estimate a proportion to a margin of error (Cochran's formula, MixMAS eq. 1), rounded down.

    n = z^2 p (1 - p) / epsilon^2, and with the correction for a finite population n / (1 + n / N).

    Args:
        population: N, rows at hand.
        z: score of the confidence level; 1.96 for 95 %.
        p: the proportion; 0.5 needs the most rows.
        epsilon: margin of error.
    """
    n = z**2 * p * (1 - p) / epsilon**2
    return max(1, int(n / (1 + n / population)))


def class_distance(whole: Tensor, sample: Tensor) -> float:
    """The largest difference of a class's share between a sample and the whole.

    Args:
        whole: (n,) class indices or (n, Y) multi-hot labels of all rows; of multi-hot labels the shares are
            of rows that have the class.
        sample: labels of the sample, likewise.
    """

    def shares(labels: Tensor, num_classes: int) -> Tensor:
        if labels.ndim == 1:
            return torch.bincount(labels.long(), minlength=num_classes).double() / len(labels)
        return labels.double().mean(0)

    count = int(whole.max()) + 1 if whole.ndim == 1 else whole.shape[1]
    return float((shares(whole, count) - shares(sample, count)).abs().max())


@dataclass(frozen=True)
class DataSample:
    """The rows of a sample, and what is known of it.

    Attributes:
        rows: (k,) sorted positions within the source.
        distance: of its class proportions; None without labels.
        redraws: random samples that were thrown away before it.
    """

    rows: Tensor
    distance: float | None
    redraws: int = 0


def draw_sample(
    source: Source, size: int, how: Sampling, seed: int, distance: float = 0.05, redraws: int = 100
) -> DataSample:
    """A sample of a source's rows.

    `random` is drawn again while its class proportions are off; `stratified` keeps them. The other two are
    open questions of the paper, and ours: `diversity` picks rows far from each other (k-means++ on principal
    components of the inputs), `uncertainty` takes half of the rows at random, fits a logistic regression on
    their components, and adds those of the other rows whose prediction has the highest entropy.

    Args:
        source: the rows; labels are read where it has them.
        size: k; all rows where it is not less than their number.
        how: of the four.
        seed: of all draws.
        distance: greatest difference of a class's share that is accepted of a random sample.
        redraws: how often a random sample may be drawn again.

    Raises:
        InputError: no random sample comes close enough; `stratified` or `uncertainty` without labels; a class
            with fewer rows than a stratified sample must have of it.
    """
    labels, count = source.labels, len(source)
    labels = None if labels is None else labels.cpu()
    if size >= count:
        return DataSample(torch.arange(count), None if labels is None else 0.0)
    draw = np.random.default_rng(seed)
    if how == "random":
        return _random(labels, count, size, draw, distance, redraws)
    if how == "diversity":
        rows = _diverse(_components(source), size, seed)
    elif labels is None:
        raise InputError(
            f"strategy.sampling={how} needs labels, and the objective of this search reads none; choose "
            "random or diversity"
        )
    elif how == "stratified":
        _refuse_empty_classes(labels, count, size)
        rows = stratified_order(labels, seed)[:size].numpy()
    else:
        rows = _uncertain(_components(source), labels, size, draw)
    chosen = torch.from_numpy(np.sort(rows))
    return DataSample(chosen, None if labels is None else class_distance(labels, labels[chosen]))


def _random(
    labels: Tensor | None, count: int, size: int, draw: np.random.Generator, distance: float, redraws: int
) -> DataSample:
    found = np.inf
    for redraw in range(redraws + 1):
        rows = torch.from_numpy(np.sort(draw.choice(count, size, replace=False)))
        if labels is None:
            return DataSample(rows, None)
        found = min(found, own := class_distance(labels, labels[rows]))
        if own < distance:
            return DataSample(rows, own, redraw)
    raise InputError(
        f"no random sample of {size} rows has class proportions within {distance:g} of all; the nearest "
        f"of {redraws + 1} is {found:.3f} off; set strategy.sampling=stratified, or take a larger fraction"
    )


def _refuse_empty_classes(labels: Tensor, count: int, size: int) -> None:
    totals = torch.bincount(labels.long()) if labels.ndim == 1 else labels.sum(0).long()
    for number, total in enumerate(totals.tolist()):
        if total > 0 and total * size < count:
            raise InputError(
                f"class {number} has {total} of {count} rows, so a stratified sample of {size} has none of "
                "it; set a larger strategy.fraction, or strategy.sampling=random"
            )


def _components(source: Source) -> NDArray[np.float64]:
    """(n, k) principal components of all inputs, each modality scaled to unit variance in all."""
    from sklearn.decomposition import PCA

    parts: list[list[NDArray[np.float64]]] = []
    for index in torch.arange(len(source)).split(1024):
        (view,) = source.clean(index).views
        parts.append([view[name].flatten(1).double().cpu().numpy() for name in source.infos if name in view])
    blocks = [np.concatenate(block) for block in zip(*parts, strict=True)]
    scaled = np.concatenate([block / (block.std() * np.sqrt(block.shape[1]) + 1e-12) for block in blocks], 1)
    if not scaled.std(0).any():  # all rows are one
        return scaled[:, :1]
    dimensions = min(COMPONENTS, *scaled.shape)
    found: NDArray[np.float64] = PCA(dimensions, svd_solver="randomized", random_state=0).fit_transform(
        scaled
    )
    return found


def _diverse(points: NDArray[np.float64], size: int, seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import kmeans_plusplus

    _, rows = kmeans_plusplus(points, size, random_state=seed, n_local_trials=1)
    rows = np.unique(rows)
    if len(rows) < size:  # points that coincide are picked twice
        left = np.setdiff1d(np.arange(len(points)), rows)
        rows = np.concatenate(
            [rows, np.random.default_rng(seed).choice(left, size - len(rows), replace=False)]
        )
    return rows


def _uncertain(
    points: NDArray[np.float64], labels: Tensor, size: int, draw: np.random.Generator
) -> NDArray[np.int64]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    first = draw.choice(len(points), max(2, size // 2), replace=False)
    others = np.setdiff1d(np.arange(len(points)), first)
    known = labels[torch.from_numpy(first)].numpy()
    varied = len(np.unique(known)) > 1 if labels.ndim == 1 else True
    if not varied:
        return np.concatenate([first, draw.choice(others, size - len(first), replace=False)])
    probe = LogisticRegression(max_iter=200)
    if labels.ndim > 1:
        kept = (known.sum(0) > 0) & (known.sum(0) < len(known))
        probabilities = (
            OneVsRestClassifier(probe).fit(points[first], known[:, kept]).predict_proba(points[others])
        )
        terms = [probabilities, 1 - probabilities]
    else:
        terms = [probe.fit(points[first], known).predict_proba(points[others])]
    entropy = sum((-q * np.log(np.maximum(q, 1e-12))).sum(1) for q in terms)
    order = np.argsort(-entropy, kind="stable")[: size - len(first)]
    return np.concatenate([first, others[order]])

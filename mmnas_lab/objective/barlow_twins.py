"""Redundancy reduction between two views (Barlow Twins, arXiv 2103.03230), on embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab import distributed
from mmnas_lab.objective.base import Half, Needs, Objective, Run, evaluation_means
from mmnas_lab.objective.collapse import MONITORS, monitors
from mmnas_lab.objective.synced_norm import SyncedBatchNorm, standardise
from mmnas_lab.types import Batch, InputError, Losses

EPS = 1e-5  # of the released code's BatchNorm without affine


def cross_correlation(z_a: Tensor, z_b: Tensor, over_ranks: bool = True) -> Tensor:
    """Correlation of each dimension of one view with each of the other, over the batch (eq. 2).

    Args:
        z_a: (B, D) projections of the first view.
        z_b: (B, D) projections of the second view, row by row of the same samples.
        over_ranks: over the batch of all ranks, with B rows on each; else over this rank's rows alone.

    Returns:
        (D, D), equal on all ranks where it is over them; entries in [-1, 1].

    Raises:
        ValueError: if the views differ in shape.
        InputError: a batch of one sample, over which nothing varies.
    """
    if z_a.shape != z_b.shape:
        raise ValueError(
            f"barlow_twins needs two views of one shape, got {tuple(z_a.shape)} and {tuple(z_b.shape)}"
        )
    _refuse_one_sample(len(z_a) * (distributed.world_size() if over_ranks else 1))
    a, _, _, count = standardise(z_a, EPS, over_ranks)
    b, *_ = standardise(z_b, EPS, over_ranks)
    with torch.autocast(a.device.type, enabled=False):  # half precision leaves two digits of a correlation
        product = a.T @ b
    return (distributed.sum_with_grad(product) if over_ranks else product) / count


def barlow_twins(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the loss, eq. 1: loss = invariance + lambda * redundancy.

    Args:
        correlation: (D, D) as `cross_correlation` gives it.

    Returns:
        invariance, () sum of (1 - C_ii)^2, and redundancy, () sum of C_ij^2 over i != j.
    """
    diagonal = correlation.diagonal()
    return (1 - diagonal).square().sum(), (correlation - diagonal.diag()).square().sum()


def _refuse_one_sample(samples: int) -> None:
    if samples < 2:
        raise InputError(
            f"barlow_twins correlates over the batch and needs at least 2 samples, got {samples}; "
            "raise batch_size"
        )


class BarlowTwins(Objective):
    """Barlow Twins through a projector of three linear layers, thrown away afterwards.

    As released: no biases, BatchNorm and ReLU after the first two layers, one forward of the network a view,
    so that its BatchNorm sees one view at a time. Given the embeddings, loss and gradient on W ranks are
    those of one process with the whole batch, through the projector's BatchNorm too.

    Args:
        embedding: D of the network.
        redundancy_weight: lambda.
        hidden: width of the two hidden layers.
        projection: width of the projection, whose square is the size of the correlation.
    """

    needs = Needs(views=2, labels=False)
    selects = ("loss", "min")

    def __init__(
        self, embedding: int, redundancy_weight: float = 0.0051, hidden: int = 512, projection: int = 512
    ) -> None:
        super().__init__()
        if redundancy_weight <= 0:
            raise InputError(f"objective.redundancy_weight must be positive, got {redundancy_weight}")
        for name, width in (("hidden", hidden), ("projection", projection)):
            if width < 1:
                raise InputError(f"objective.{name} must be at least 1, got {width}")
        self.redundancy_weight = redundancy_weight
        self.projector = nn.Sequential(
            nn.Linear(embedding, hidden, bias=False),
            SyncedBatchNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False),
            SyncedBatchNorm(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, projection, bias=False),
        )

    def project(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Projections (B, projection) of the two views."""
        first, second = batch.views
        embeddings = run(first).embedding, run(second).embedding
        if self.training:
            _refuse_one_sample(len(embeddings[0]) * distributed.world_size())
        return self.projector(embeddings[0]), self.projector(embeddings[1])

    def forward(self, run: Run, batch: Batch, half: Half = "weights") -> Losses:
        invariance, redundancy = barlow_twins(cross_correlation(*self.project(run, batch)))
        loss = invariance + self.redundancy_weight * redundancy
        parts = {"loss": loss, "invariance": invariance, "redundancy": redundancy}
        return Losses(loss, {name: value.detach() for name, value in parts.items()})

    @torch.no_grad()
    def evaluate(self, run: Run, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss of each batch by itself and its two terms, and the monitors of `objective.collapse`."""

        def values() -> Iterator[tuple[tuple[Tensor, ...], int]]:
            for batch in batches:
                z_a, z_b = self.project(run, batch)
                # In evaluation the ranks hold different batches.
                invariance, redundancy = barlow_twins(cross_correlation(z_a, z_b, over_ranks=False))
                loss = invariance + self.redundancy_weight * redundancy
                collapse = monitors(F.normalize(z_a, dim=-1), F.normalize(z_b, dim=-1))
                yield (loss, invariance, redundancy, *collapse), 1

        names = ("loss", "invariance", "redundancy", *MONITORS)
        return evaluation_means(names, values(), next(self.projector.parameters()).device)

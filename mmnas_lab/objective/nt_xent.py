"""Contrast of two views (SimCLR, arXiv 2002.05709), on fused embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab import distributed
from mmnas_lab.objective.base import Half, Needs, Objective, Run, evaluation_means
from mmnas_lab.objective.collapse import MONITORS, monitors
from mmnas_lab.types import Batch, InputError, Losses


def nt_xent(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """Contrast two views of a batch, each view against every other view of every rank.

    SimCLR eq. 1, averaged over anchors. The mean over ranks does not depend on their number.

    Args:
        z_a: (B, D) projections of the first view; normalised here.
        z_b: (B, D) projections of the second view; row i is the positive of row i of `z_a`.
        temperature: divides the cosine similarities; > 0.

    Returns:
        () loss in nats.

    Raises:
        ValueError: if the views differ in shape, or `temperature` is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"nt_xent needs temperature > 0, got {temperature}")
    if z_a.shape != z_b.shape:
        raise ValueError(
            f"nt_xent needs two views of one shape, got {tuple(z_a.shape)} and {tuple(z_b.shape)}"
        )
    batch = z_a.shape[0]
    anchors = torch.cat([F.normalize(z_a, dim=-1), F.normalize(z_b, dim=-1)])  # (2B, D)
    others = distributed.gather_with_grad(anchors)  # (W 2B, D), rank by rank
    similarity = anchors @ others.T / temperature

    own = torch.arange(2 * batch, device=z_a.device) + 2 * batch * distributed.rank()
    positive = own.roll(batch)
    rows = torch.arange(2 * batch, device=z_a.device)
    similarity = similarity.index_put((rows, own), similarity.new_tensor(float("-inf")))
    return F.cross_entropy(similarity, positive)


class NTXent(Objective):
    """NT-Xent through a projection head of one hidden layer, thrown away afterwards.

    Both views go through the network as one batch, so BatchNorm sees them together.

    Args:
        embedding: D of the network.
        temperature: of the similarities.
        hidden: width of the hidden layer.
        projection: width of the projection.
    """

    needs = Needs(views=2, labels=False)
    selects = ("loss", "min")

    def __init__(
        self, embedding: int, temperature: float = 0.1, hidden: int = 512, projection: int = 128
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise InputError(f"objective.temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.projector = nn.Sequential(
            nn.Linear(embedding, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, projection)
        )

    def project(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Projections (B, projection) of the two views."""
        first, second = batch.views
        both = {name: torch.cat([first[name], second[name]]) for name in first}
        z_a, z_b = self.projector(run(both).embedding).chunk(2)
        return z_a, z_b

    def forward(self, run: Run, batch: Batch, half: Half = "weights") -> Losses:
        loss = nt_xent(*self.project(run, batch), self.temperature)
        return Losses(loss, {"loss": loss.detach()})

    @torch.no_grad()
    def evaluate(self, run: Run, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss, and the collapse monitors of `objective.collapse`."""

        def values() -> Iterator[tuple[tuple[Tensor, ...], int]]:
            for batch in batches:
                z_a, z_b = (F.normalize(z, dim=-1) for z in self.project(run, batch))
                yield (_local_nt_xent(z_a, z_b, self.temperature), *monitors(z_a, z_b)), 1

        return evaluation_means(("loss", *MONITORS), values(), next(self.projector.parameters()).device)


def _local_nt_xent(z_a: Tensor, z_b: Tensor, temperature: float) -> Tensor:
    """NT-Xent of one rank's batch by itself: in evaluation the ranks hold different batches."""
    z = torch.cat([z_a, z_b])
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    positive = torch.arange(len(z), device=z.device).roll(len(z_a))
    return F.cross_entropy(similarity, positive)

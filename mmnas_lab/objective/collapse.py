"""Whether two views' projections collapse to a point: what objectives of two views report in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

MONITORS = ("alignment", "uniformity", "embedding_std")


def monitors(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three `MONITORS` of normalised projections (B, D) of two views, each ().

    The last is the std of the projection times sqrt(D): 1 for projections spread over the sphere, 0 for
    collapsed ones.
    """
    spread = z_a.std(0).mean() * z_a.shape[1] ** 0.5 if len(z_a) > 1 else z_a.new_zeros(())
    return alignment(z_a, z_b), uniformity(z_a), spread


def alignment(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Mean squared distance of normalised positives, () in [0, 4]; small is aligned (Wang & Isola 2020)."""
    return (z_a - z_b).square().sum(-1).mean()


def uniformity(z: Tensor) -> Tensor:
    """Log of the mean Gaussian potential of normalised embeddings (t = 2), () <= 0; near 0 is collapsed."""
    return (-2 * torch.pdist(z).square()).exp().mean().log() if len(z) > 1 else z.new_zeros(())

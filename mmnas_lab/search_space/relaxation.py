"""From architecture logits to mixing weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Relaxation = Literal["softmax", "sigmoid", "gumbel"]


def relax(
    logits: Tensor, relaxation: Relaxation, noise: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """The weights of the options in the last dimension.

    `softmax` as in DARTS (arXiv 1806.09055, eq. 2), `sigmoid` as in FairDARTS (arXiv 1911.12126): each option
    for itself. `gumbel` is the Gumbel-softmax sample softmax((logits + noise) / temperature), soft; without
    noise it is the plain softmax, its mode in evaluation and in plots.

    Args:
        logits: (..., K).
        relaxation: which of the three.
        noise: (..., K) standard Gumbel noise, see `gumbel_noise`; read by `gumbel` alone.
        temperature: > 0; divides in the sample alone.
    """
    if relaxation == "sigmoid":
        return torch.sigmoid(logits)
    if relaxation == "gumbel" and noise is not None:
        return torch.softmax((logits + noise) / temperature, -1)
    return torch.softmax(logits, -1)


def gumbel_noise(logits: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of the logits, from torch's own generator."""
    return -torch.empty_like(logits).exponential_().log()

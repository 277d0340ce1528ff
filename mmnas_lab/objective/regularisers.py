"""Penalties of the mixing weights, for the loss of the architecture half-step (`search.regularisers`)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmnas_lab.types import InputError


def zero_one(weights: Tensor, form: Literal["l1", "l2"]) -> Tensor:
    """How far independent weights are from 0 and 1: minimising it drives each to one of them.

    FairDARTS (arXiv 1911.12126): L2 is -mean((m - 1/2)^2), the default of its released code; L1 is
    -mean(|m - 1/2|), the one that SSF-NAS prints. At m = 1/2 the gradient of both is 0: the penalty sharpens
    a decision, it never starts one.

    Args:
        weights: mixing weights in [0, 1], of any shape.
        form: of the distance to 1/2.

    Returns:
        () in [-1/2, 0] for L1, [-1/4, 0] for L2.
    """
    distance = weights - 0.5
    return -(distance.abs() if form == "l1" else distance.square()).mean()


class ZeroOne:
    """`zero_one` over all entries of the mixing weights together.

    Made for sigmoid weights; softmax weights compete, so under it several ops of an edge stay equal.

    Args:
        form: `l1` or `l2`.
        names: of the mixing weights that are meant; null for all of them.
    """

    def __init__(self, form: Literal["l1", "l2"] = "l2", names: list[str] | None = None) -> None:
        if names is not None and not names:
            raise InputError("zero_one.names is empty; name mixing weights, or give null for all of them")
        self.form: Literal["l1", "l2"] = form
        self.names = names

    def __call__(self, mixing: dict[str, Tensor]) -> Tensor:
        """() penalty of the mixing weights by name.

        Raises:
            InputError: `names` holds one that the hypernet has not.
        """
        names = list(mixing) if self.names is None else self.names
        if missing := [name for name in names if name not in mixing]:
            raise InputError(
                f"zero_one.names: the hypernet has no mixing weights '{missing[0]}', only {', '.join(mixing)}"
            )
        return zero_one(torch.cat([mixing[name].flatten() for name in names]), self.form)

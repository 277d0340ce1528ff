"""Which rows a stage is given: the labelled share, and the halves for weights and architecture."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmnas_lab.types import InputError

CANDIDATES = 64
"""Rows that compete for a place: more follow the proportions closer, fewer differ more between seeds."""


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A permutation of the rows of which every prefix has nearly the class proportions of the whole.

    Greedy, one row at a time. Of the classes that are behind their proportion, the one comes first whose next
    row is due first (earliest deadline first within the windows of proportionate scheduling, Baruah et al.
    1996); of some rows of this class, the one that leaves all classes closest to their proportions.

    For class indices, the count of a class in a prefix of k rows is less than one row from k times its
    proportion, and above it rather than below where the class is rare. For multi-hot labels it stays within a
    few rows.

    Args:
        labels: (n, Y) multi-hot, or (n,) class indices >= 0.
        seed: of the rows that compete.

    Returns:
        (n,) int64 row indices.
    """
    generator = np.random.default_rng(seed)
    members = _membership(labels)
    num_rows = members.shape[1]
    totals = members.sum(axis=1)
    members, totals = members[totals > 0], totals[totals > 0]
    share = totals / max(num_rows, 1)
    values = members.T.astype(np.float64)
    # Distance to the proportions: the sum over classes of (count - due)^2 / share, as in a chi-square test.
    own_distance = values @ (1 / share)

    order = np.empty(num_rows, dtype=np.int64)
    left = np.ones(num_rows, dtype=bool)
    count = np.zeros(len(totals), dtype=np.int64)
    for place in range(num_rows):
        behind = (place + 1) * totals - count * num_rows  # in units of 1 / num_rows, exact
        deadline = np.where(behind > 0, (count + 1) / totals, np.inf)
        rows = np.flatnonzero(left & members[np.argmin(deadline)] if (behind > 0).any() else left)
        rows = rows[generator.integers(len(rows), size=CANDIDATES)]
        row = rows[np.argmin(own_distance[rows] - 2 * values[rows] @ (behind / totals))]
        order[place] = row
        left[row] = False
        count += members[:, row]
    if labels.ndim == 1:
        # Deadlines put rare classes late in their windows; backwards the order is as good, with them early.
        order = order[::-1].copy()
    return torch.from_numpy(order)


def labelled_share(labels: Tensor, share: float, seed: int) -> Tensor:
    """The rows that keep their labels when only a share of them is labelled, stratified by class.

    With one seed, the rows of a smaller share are among those of a larger one.

    Args:
        labels: (n, Y) multi-hot, or (n,) class indices >= 0.
        share: in (0, 1]; the number of rows is rounded and at least 1.
        seed: of the choice.

    Returns:
        (round(share * n),) sorted int64 row indices.

    Raises:
        InputError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(
            f"labelled_share must be in (0, 1], got {share:g}; "
            "use 1 for all labels, or the smallest share that is wanted, such as 0.01"
        )
    if share == 1:
        return torch.arange(len(labels))
    return stratified_order(labels, seed)[: max(1, round(share * len(labels)))].sort().values


def halves(labels: Tensor | None, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Split rows into the half that trains weights and the half that trains the architecture.

    Args:
        labels: labels of the whole split, `(n, Y)` or `(n,)`, of which `labels[rows]` is read; the halves
            have the same class proportions. None: a random split.
        rows: (k,) int64 row indices, k >= 2.
        seed: of the choice.

    Returns:
        Sorted row indices of the weight half, which is one larger where k is odd, and of the architecture
        half.

    Raises:
        InputError: fewer than two rows.
    """
    if len(rows) < 2:
        raise InputError(
            f"two halves need at least 2 rows, got {len(rows)}; raise labelled_share or use a larger dataset"
        )
    if labels is None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    else:
        order = stratified_order(labels[rows], seed)
    middle = (len(rows) + 1) // 2
    return rows[order[:middle]].sort().values, rows[order[middle:]].sort().values


def _membership(labels: Tensor) -> NDArray[np.bool_]:
    """(Y + 1, n): which rows belong to each class; the last line is for rows of no class."""
    if labels.ndim == 1:
        values = labels.cpu().numpy()
        belongs = values[None, :] == np.arange(int(values.max(initial=-1)) + 1)[:, None]
    else:
        belongs = np.ascontiguousarray(labels.cpu().numpy().T != 0)
    return np.concatenate([belongs, ~belongs.any(axis=0, keepdims=True)])

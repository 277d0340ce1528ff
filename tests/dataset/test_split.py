from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from mmnas_lab.dataset.split import halves, labelled_share, stratified_order
from mmnas_lab.types import InputError


def multiclass(n: int, proportions, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).choice(len(proportions), size=n, p=proportions))


def multilabel(n: int, seed: int = 0) -> torch.Tensor:
    """23 classes as frequent as those of MM-IMDB, from one in two rows to one in two hundred."""
    share = torch.logspace(-0.3, -2.3, 23)
    return (torch.rand(n, 23, generator=torch.Generator().manual_seed(seed)) < share).to(torch.uint8)


def departures(labels: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """(n, Y): of every prefix, how many rows too many or too few of each class."""
    one_hot = torch.nn.functional.one_hot(labels) if labels.ndim == 1 else labels
    lengths = torch.arange(1, len(order) + 1, dtype=torch.float64)[:, None]
    return (one_hot[order].double().cumsum(0) - lengths * one_hot.double().mean(0)).abs()


LONG_TAIL = np.array([0.5, 0.25, 0.12, 0.06, 0.04, 0.02, 0.01])


@pytest.mark.parametrize(
    "labels",
    [
        multiclass(211, LONG_TAIL),
        multiclass(1000, np.full(10, 0.1)),
        multiclass(90, np.random.default_rng(1).dirichlet(np.full(29, 0.3))),
        torch.zeros(7, dtype=torch.int64),
        torch.arange(13),
    ],
    ids=["long_tail", "balanced", "many_classes", "one_class", "all_different"],
)
def test_every_prefix_has_the_class_proportions_within_one_row(labels):
    for seed in range(3):
        order = stratified_order(labels, seed)
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == list(range(len(labels)))
        assert departures(labels, order).max() < 1


def test_rare_classes_come_early():
    alone = torch.tensor([0] * 99 + [1])
    assert stratified_order(alone, 0)[0] == 99
    tail = multiclass(1000, LONG_TAIL)
    for seed in range(5):  # half a row of the rarest class is due
        assert len(tail[stratified_order(tail, seed)[:50]].unique()) == len(LONG_TAIL)


def test_multilabel_prefixes_have_the_class_proportions():
    labels = multilabel(1200)
    worst = departures(labels, stratified_order(labels, 0)).max(dim=1).values
    shuffled = departures(labels, torch.randperm(1200, generator=torch.Generator().manual_seed(0)))
    assert worst[: 1200 // 2].max() < 2.5
    assert worst.max() < 5
    assert worst.mean() < shuffled.max(dim=1).values.mean() / 5


def test_multilabel_classes_are_present_once_a_row_of_them_is_due():
    labels = multilabel(1200)
    order = stratified_order(labels, 0)
    for length in (12, 60, 240):
        due = labels.double().mean(0) * length
        count = labels[order[:length]].sum(0)
        assert (count[due >= 2] > 0).all()


def test_rows_without_any_class_are_spread_too():
    labels = torch.zeros(200, 2, dtype=torch.uint8)
    labels[:50, 0] = 1
    labels[50:100, 1] = 1
    empty = (labels[stratified_order(labels, 0)] == 0).all(dim=1).double()
    assert (empty.cumsum(0) - 0.5 * torch.arange(1, 201)).abs().max() <= 1


@pytest.mark.parametrize("labels", [multiclass(300, LONG_TAIL), multilabel(300)], ids=["class", "label"])
def test_the_seed_decides_the_rows(labels):
    assert torch.equal(stratified_order(labels, 3), stratified_order(labels, 3))
    tenths = [set(labelled_share(labels, 0.1, seed).tolist()) for seed in range(4)]
    overlaps = [len(a & b) for i, a in enumerate(tenths) for b in tenths[:i]]
    assert max(overlaps) < 15  # of 30; independent draws share 3


@pytest.mark.parametrize("labels", [multiclass(333, LONG_TAIL), multilabel(333)], ids=["class", "label"])
def test_labelled_shares_are_nested_sorted_and_of_the_right_size(labels):
    previous: set[int] = set()
    for share in (1e-6, 0.01, 0.05, 0.1, 0.3, 0.5, 0.999, 1.0):
        rows = labelled_share(labels, share, seed=5)
        assert len(rows) == max(1, round(share * 333))
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert previous <= set(rows.tolist())
        previous = set(rows.tolist())
    assert rows.tolist() == list(range(333))


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(
        InputError, match=rf"labelled_share must be in \(0, 1\], got {share:g}; use 1 for all"
    ):
        labelled_share(torch.zeros(5, dtype=torch.int64), share, seed=0)


@pytest.mark.parametrize("size", [2, 3, 80, 81])
@pytest.mark.parametrize("labels", [None, multiclass(120, LONG_TAIL), multilabel(120)])
def test_halves_divide_the_rows(labels, size):
    rows = torch.arange(120)[torch.randperm(120, generator=torch.Generator().manual_seed(1))[:size]]
    first, second = halves(labels, rows, seed=2)
    assert len(first) - len(second) == size % 2
    assert sorted(first.tolist() + second.tolist()) == sorted(rows.tolist())
    assert all(torch.equal(a, b) for a, b in zip(halves(labels, rows, seed=2), (first, second), strict=True))
    if size >= 80:
        assert not torch.equal(halves(labels, rows, seed=3)[0], first)


def test_halves_have_the_same_classes():
    labels = multiclass(400, LONG_TAIL)
    rows = torch.arange(0, 400, 2)
    counts = [torch.bincount(labels[half], minlength=7) for half in halves(labels, rows, seed=0)]
    assert (counts[0] - counts[1]).abs().max() <= 1


def test_one_row_has_no_halves():
    with pytest.raises(InputError, match="at least 2 rows, got 1; raise labelled_share"):
        halves(None, torch.tensor([4]), seed=0)


def test_the_size_of_mmimdb_takes_seconds():
    start = time.perf_counter()
    order = stratified_order(multilabel(15552), 0)
    assert time.perf_counter() - start < 10
    assert len(order.unique()) == 15552

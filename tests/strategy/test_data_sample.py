"""Samples for micro-benchmarks: their size, how near their classes are to the whole, how they are drawn."""

import pytest
import torch

from mmnas_lab.strategy.data_sample import class_distance, draw_sample, sample_size
from mmnas_lab.types import Batch, InputError, InputInfo


class Points:
    """Rows of one tabular input."""

    def __init__(self, values, labels=None):
        self.values, self.labels = values, labels
        self.infos = {"age": InputInfo(tuple(values.shape[1:]), "age", "tabular")}

    def __len__(self):
        return len(self.values)

    def clean(self, index):
        return Batch(({"age": self.values[index]},), None if self.labels is None else self.labels[index])


def points(count=200, labels=None):
    return Points(torch.randn(count, 4, generator=torch.Generator().manual_seed(0)), labels)


@pytest.mark.parametrize(("population", "size"), [(15_552, 5_937), (55_000, 8_176), (26_093, 7_020)])
def test_the_formula_gives_the_sizes_of_the_three_datasets(population, size):
    assert sample_size(population) == size


def test_the_size_never_exceeds_the_rows_and_falls_with_the_margin():
    assert sample_size(10) <= 10
    assert sample_size(1_000_000, epsilon=0.05) == 384
    assert sample_size(1) == 1


def test_the_distance_is_the_largest_difference_of_a_share():
    whole = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    assert class_distance(whole, whole) == 0
    assert class_distance(whole, torch.tensor([0] * 6 + [1] * 4)) == pytest.approx(0.2)
    hot = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1]])
    assert class_distance(hot, hot[:2]) == pytest.approx(0.5)


@pytest.mark.parametrize("how", ["random", "stratified", "uncertainty", "diversity"])
def test_samples_have_their_size_and_repeat(how):
    labels = torch.arange(200) % 4
    first = draw_sample(points(labels=labels), 60, how, seed=3, distance=0.2)
    again = draw_sample(points(labels=labels), 60, how, seed=3, distance=0.2)
    assert torch.equal(first.rows, again.rows)
    assert len(first.rows.unique()) == 60
    assert first.distance == pytest.approx(class_distance(labels, labels[first.rows]))
    assert draw_sample(points(labels=labels), 500, how, seed=3).rows.tolist() == list(range(200))


def test_skewed_samples_are_drawn_again_and_at_last_refused():
    labels = torch.arange(200) % 2
    loose = draw_sample(points(labels=labels), 20, "random", seed=0, distance=0.06)
    assert loose.distance < 0.06
    counts = [
        draw_sample(points(labels=labels), 20, "random", seed=s, distance=0.06).redraws for s in range(20)
    ]
    assert max(counts) > 0
    with pytest.raises(InputError, match="stratified"):
        draw_sample(points(labels=labels), 21, "random", seed=0, distance=0.001)
    assert draw_sample(points(labels=labels), 20, "stratified", seed=0).distance == 0


def test_what_needs_labels_says_so():
    assert draw_sample(points(), 20, "random", seed=0).distance is None
    assert len(draw_sample(points(), 20, "diversity", seed=0).rows) == 20
    for how in ("stratified", "uncertainty"):
        with pytest.raises(InputError, match="labels"):
            draw_sample(points(), 20, how, seed=0)


def test_a_class_too_small_for_a_stratified_sample_is_named():
    labels = torch.tensor([0] * 197 + [1] * 3)
    with pytest.raises(InputError, match="class 1 has 3 of 200"):
        draw_sample(points(labels=labels), 20, "stratified", seed=0)


def test_diverse_rows_are_farther_apart_and_coinciding_ones_do_no_harm():
    values = torch.cat([torch.zeros(150, 4), torch.randn(50, 4, generator=torch.Generator().manual_seed(1))])
    rows = draw_sample(Points(values), 40, "diversity", seed=0).rows
    assert int((rows >= 150).sum()) > 30
    assert len(draw_sample(Points(torch.zeros(50, 4)), 10, "diversity", seed=0).rows.unique()) == 10


def test_uncertain_rows_lie_at_the_border():
    values = torch.linspace(-3, 3, 300)[:, None].repeat(1, 2)
    labels = (values[:, 0] > 0).long()
    sample = draw_sample(Points(values, labels), 100, "uncertainty", seed=0)
    inner = int((values[sample.rows, 0].abs() < 1).sum())
    assert inner > 50  # of 100; a random sample has 33


def test_multi_label_rows_are_sampled_too():
    labels = (torch.rand(200, 3, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    for how in ("random", "stratified", "uncertainty", "diversity"):
        assert len(draw_sample(points(labels=labels), 50, how, seed=0, distance=0.3).rows) == 50

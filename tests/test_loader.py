"""Batches are functions of their address, and ranks share them without gap or overlap."""

import pytest
import torch
from conftest import TinySource

from mmnas_lab import distributed
from mmnas_lab.loader import Batches, DrawMixed, FixedBatches, JoinedSource, draw_clean, draw_pairs
from mmnas_lab.types import InputError

ADDRESS = (0, "train", "batches")


@pytest.fixture
def as_rank(monkeypatch):
    def become(rank, world):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)

    return become


def same(first, second):
    return all(
        torch.equal(one[name], other[name])
        for one, other in zip(first.views, second.views, strict=True)
        for name in one
    )


def test_an_epoch_is_a_permutation_cut_into_batches():
    source = TinySource(11)
    batches = Batches(source, draw_clean, 3, ADDRESS, whole=False)
    assert len(batches) == 3
    assert len(list(batches.epoch(0))) == 3
    assert source.seen == batches.order(0)[:9].view(3, 3).tolist()
    assert sorted(batches.order(0).tolist()) == list(range(11))
    assert not torch.equal(batches.order(0), batches.order(1))
    assert not torch.equal(
        batches.order(0), Batches(source, draw_clean, 3, (1, "train"), whole=False).order(0)
    )


def test_a_batch_does_not_depend_on_what_came_before():
    first, second = (Batches(TinySource(11), draw_pairs, 3, ADDRESS, whole=True) for _ in range(2))
    whole = list(first.epoch(2))
    assert same(second.batch(2, 1), whole[1])
    rest = list(second.epoch(2, 1))
    assert len(rest) == 2
    assert all(same(a, b) for a, b in zip(rest, whole[1:], strict=True))
    assert not same(whole[0], first.batch(3, 0))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_parts_are_the_whole_batch(world, as_rank):
    as_rank(0, 1)
    whole = Batches(TinySource(20), draw_clean, 6, ADDRESS, whole=True)
    parts = []
    for rank in range(world):
        as_rank(rank, world)
        source = TinySource(20)
        batches = Batches(source, draw_clean, 6, ADDRESS, whole=True)
        assert len(batches) == len(whole)
        list(batches.epoch(1))
        assert all(len(rows) == 6 // world for rows in source.seen)
        parts.append(source.seen)
    for step, rows in enumerate(whole.order(1)[:18].view(3, 6).tolist()):
        assert sorted(row for part in parts for row in part[step]) == sorted(rows)


def test_ranks_draw_different_views(as_rank):
    noise = []
    for rank in range(2):
        as_rank(rank, 2)
        source = TinySource(4)
        source.features["text.0"].zero_()
        noise.append(Batches(source, draw_pairs, 4, ADDRESS, whole=True).batch(0, 0).views[0]["text.0"])
    assert not torch.equal(*noise)


def test_a_contrastive_batch_larger_than_the_data_is_refused():
    with pytest.raises(
        InputError,
        match=r"search: batch_size=8 is larger than the 5 samples .* set search\.batch_size to 5 or less",
    ):
        Batches(TinySource(5), draw_pairs, 8, (0, "search", "weights"), whole=True)


def test_a_supervised_batch_larger_than_the_data_is_all_of_it():
    batches = Batches(TinySource(5), draw_clean, 8, ADDRESS, whole=False)
    assert len(batches) == 1
    assert len(batches.batch(0, 0).labels) == 5


def test_the_largest_batch_that_splits_over_the_ranks(as_rank):
    as_rank(0, 2)
    assert Batches(TinySource(5), draw_clean, 8, ADDRESS, whole=False).batch_size == 4


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (8, 3)])
def test_a_batch_that_does_not_split_over_the_ranks(count, batch_size, as_rank):
    as_rank(0, 2)
    message = (
        f"batch_size={batch_size} over {count} samples does not split over 2 devices; choose a multiple of 2"
    )
    with pytest.raises(InputError, match=message):
        Batches(TinySource(count), draw_clean, batch_size, ADDRESS, whole=False)


def test_no_sample_at_all():
    with pytest.raises(
        InputError, match="no sample to draw from in train; use more data or a larger labelled_share"
    ):
        Batches(TinySource(0), draw_clean, 2, ADDRESS, whole=False)


def test_fixed_batches_are_the_same_at_every_call():
    held = FixedBatches(TinySource(11), draw_pairs, 4, (0, "search", "held"), whole=True)
    first, second = list(held), list(held)
    assert len(first) == 2
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    source = TinySource(11)
    list(FixedBatches(source, draw_clean, 4, (0, "test"), whole=False))
    assert source.seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_fixed_batches_go_round_the_ranks(as_rank):
    as_rank(0, 1)
    expected = list(FixedBatches(TinySource(11), draw_pairs, 4, ADDRESS, whole=False))
    found = []
    for rank in range(2):
        as_rank(rank, 2)
        found.append(list(FixedBatches(TinySource(11), draw_pairs, 4, ADDRESS, whole=False)))
    assert [len(part) for part in found] == [2, 1]
    for i, batch in enumerate(expected):
        assert same(found[i % 2][i // 2], batch)


def test_two_sources_after_one_another_keep_the_order_of_the_index(generator):
    first, second = TinySource(5), TinySource(4, seed=1)
    joined = JoinedSource(first, second)
    assert len(joined) == 9
    assert joined.infos is first.infos
    everything = {name: torch.cat([first.features[name], second.features[name]]) for name in first.features}
    for index in (torch.tensor([7, 0, 8, 3, 5]), torch.tensor([1, 4]), torch.tensor([6])):
        batch = joined.clean(index)
        assert torch.equal(batch.labels, joined.labels[index])
        for name, values in everything.items():
            assert torch.equal(batch.views[0][name], values[index])
            near = joined.views(index, generator, 2).views[1][name] - values[index]
            assert 0 < near.abs().max() < 1
    first.labels = None
    assert JoinedSource(first, second).labels is None


def test_mixed_draws_the_share_of_views(generator):
    source = TinySource(400)
    index = torch.arange(400)
    clean = DrawMixed(0.0)(source, index, generator).views[0]["text.0"]
    assert torch.equal(clean, source.features["text.0"])
    mixed = DrawMixed(0.25)(source, index, generator).views[0]["text.0"]
    changed = (mixed != source.features["text.0"]).any(-1).any(-1).float().mean()
    assert float(changed) == pytest.approx(0.25, abs=0.08)

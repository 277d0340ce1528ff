"""Long tails: class counts, the rule for several labels, val and the test sets."""

from collections import Counter

import pytest
import torch

from mmnas_lab.dataset.long_tail import LongTail, class_counts
from mmnas_lab.types import InputError


class Labelled:
    """A dataset of nothing but ids and labels."""

    name = "toy"

    def __init__(self, labels, classes, task="multiclass"):
        self._labels, self.task, self.modalities = labels, task, {"image": "image"}
        self.classes = tuple(f"class {k}" for k in range(classes))

    def open(self):
        pass

    def ids(self, split):
        return [f"{split} {k}" for k in range(len(self._labels[split]))]

    def labels(self, split):
        return self._labels[split]

    def read(self, split, modality, rows):
        return [f"{split} {row}" for row in rows]

    def fingerprint(self):
        return "toy"


def balanced(classes=10, train=5000, test=1000):
    split = {"train": train, "val": 0, "test": test}
    return Labelled({s: torch.arange(classes).repeat_interleave(n) for s, n in split.items()}, classes)


# papers.md, table derived-1, computed from LDAM's recipe
PUBLISHED = {
    ("exponential", 0.1): [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    ("exponential", 0.01): [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    ("step", 0.1): [5000] * 5 + [500] * 5,
    ("step", 0.01): [5000] * 5 + [50] * 5,
}


@pytest.mark.parametrize(("profile", "mu"), PUBLISHED)
def test_cifar10_lt_has_the_published_class_counts(profile, mu):
    dataset = LongTail(balanced(), profile, mu, val_share=0.0)
    counts = torch.bincount(dataset.labels("train"), minlength=10).tolist()
    assert counts == PUBLISHED[profile, mu]
    assert len(dataset.ids("val")) == 0


@pytest.mark.parametrize("mu", [0.1, 0.01])
def test_cifar100_lt_follows_the_same_formula(mu):
    dataset = LongTail(balanced(100, 500, 100), "exponential", mu, val_share=0.0)
    counts = torch.bincount(dataset.labels("train"), minlength=100).tolist()
    assert counts == class_counts(500, 100, "exponential", mu)
    assert (counts[0], counts[-1]) == (500, round(500 * mu))
    for c, count in enumerate(counts):  # floor of the exact value
        assert count <= 500 * mu ** (c / 99) + 1e-6 < count + 1 + 1e-6


def test_val_is_a_share_of_the_long_tail_and_disjoint():
    dataset = LongTail(balanced(train=500), "exponential", 0.1, val_share=0.2)
    train, val = set(dataset.ids("train")), set(dataset.ids("val"))
    assert not train & val
    assert len(val) == round(0.2 * len(train | val))
    whole = torch.cat([dataset.labels("train"), dataset.labels("val")])
    assert torch.bincount(whole).tolist() == class_counts(500, 10, "exponential", 0.1)


def test_seeds_differ_and_repeat():
    first, same, other = (LongTail(balanced(train=100), seed=s, mu=0.1).ids("train") for s in (0, 0, 1))
    assert first == same != other


def test_shuffled_order_has_the_same_counts_at_other_classes():
    plain = LongTail(balanced(train=500), mu=0.1, val_share=0.0)
    shuffled = LongTail(balanced(train=500), mu=0.1, val_share=0.0, class_order="shuffled")
    counts = [torch.bincount(d.labels("train"), minlength=10).tolist() for d in (plain, shuffled)]
    assert sorted(counts[0]) == sorted(counts[1])
    assert counts[0] != counts[1]


def test_several_labels_never_exceed_a_class_count_and_fill_the_tail():
    draw = torch.Generator().manual_seed(0)
    labels = (torch.rand(4000, 5, generator=draw) < torch.tensor([0.5, 0.4, 0.3, 0.2, 0.2])).to(torch.uint8)
    data = Labelled({"train": labels, "val": labels[:0], "test": labels[:500]}, 5, "multilabel")
    dataset = LongTail(data, "exponential", 0.05, val_share=0.0)
    allowed = class_counts(int(labels.sum(0).max()), 5, "exponential", 0.05)
    kept = dataset.labels("train")
    assert all(int(n) <= most for n, most in zip(kept.sum(0), allowed, strict=True))
    assert int(kept[:, -1].sum()) == allowed[-1]
    assert int((kept.sum(1) == 0).sum()) == int((labels.sum(1) == 0).sum())  # rows without a label stay


def test_the_test_split_stays_and_its_subsets_are_named():
    dataset = LongTail(balanced(train=300, test=100), "exponential", 0.01)
    assert len(dataset.ids("test")) == 1000
    subsets, labels = dataset.subsets("test"), dataset.labels("test")
    long_tailed = torch.bincount(labels[subsets["long_tailed"]], minlength=10).tolist()
    assert long_tailed == class_counts(100, 10, "exponential", 0.01)
    counts = torch.bincount(torch.cat([dataset.labels("train"), dataset.labels("val")])).tolist()
    groups = {
        "many_shot": lambda n: n > 100,
        "medium_shot": lambda n: 20 <= n <= 100,
        "few_shot": lambda n: n < 20,
    }
    for name, belongs in groups.items():
        expected = {c for c, n in enumerate(counts) if belongs(n)}
        assert set(labels[subsets[name]].tolist()) == expected
    assert sum(len(subsets[name]) for name in groups) == 1000
    assert dataset.subsets("val") == {}


def test_samples_keep_their_identity():
    dataset = LongTail(balanced(train=50), mu=0.1)
    for split in ("train", "val", "test"):
        rows = list(range(len(dataset.ids(split))))[::-1]
        assert dataset.read(split, "image", rows) == dataset.ids(split)[::-1]
    assert Counter(dataset.ids("train")).most_common(1)[0][1] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mu": 0.0}, r"mu must be in \(0, 1\], got 0"),
        ({"mu": 1.5}, "mu must be in"),
        ({"val_share": 1.0}, "val_share"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        LongTail(balanced(train=10), **settings)


def test_a_class_that_would_vanish_is_named():
    with pytest.raises(InputError, match=r"leaves no sample of class 'class 5'; raise mu"):
        LongTail(balanced(train=10), mu=0.01).ids("train")

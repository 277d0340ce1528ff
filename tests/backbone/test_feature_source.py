import numpy as np
import pytest
import torch

from mmnas_lab.backbone.feature_source import FeatureSource
from mmnas_lab.dataset.views import FeatureViews
from mmnas_lab.types import InputError, InputInfo

INFOS = {"image.0": InputInfo((3, 4), "image"), "text.0": InputInfo((5, 1), "text")}
ROWS = {"train": 13, "val": 6, "test": 7}


class Cache:
    """Random features in the form of a `FeatureCache`."""

    def __init__(self, num_views):
        rng = np.random.default_rng(0)
        self.infos, self.num_views = INFOS, num_views
        self.arrays = {
            (split, name): (10 * rng.standard_normal((self.views_of(split) + 1, n, *info.shape))).astype("f2")
            for split, n in ROWS.items()
            for name, info in INFOS.items()
        }
        self.statistics = {
            n: (torch.randn(i.shape[0]), torch.rand(i.shape[0]) + 0.5) for n, i in INFOS.items()
        }

    def rows(self, split):
        return ROWS[split]

    def views_of(self, split):
        return 0 if split == "test" else self.num_views

    def gather(self, split, name, views, rows):
        return torch.from_numpy(self.arrays[split, name][views.numpy(), rows.numpy()])

    def standardised(self, split, name, views, rows):
        mean, std = (value[:, None] for value in self.statistics[name])
        return (self.gather(split, name, views, rows).float() - mean) / std

    def expected(self, split, name, view, row):
        mean, std = (x.double().numpy()[:, None] for x in self.statistics[name])
        return (self.arrays[split, name][view, row] - mean) / std

    def view_numbers(self, split, inputs, rows):
        """Which cached view each sample of a batch is."""
        found = []
        for position, row in enumerate(rows):
            views = range(self.views_of(split) + 1)
            near = [
                np.allclose(inputs["text.0"][position], self.expected(split, "text.0", v, row), atol=1e-3)
                for v in views
            ]
            assert sum(near) == 1
            found.append(near.index(True))
            expected = self.expected(split, "image.0", found[-1], row)  # all features of one view
            np.testing.assert_allclose(inputs["image.0"][position], expected, rtol=1e-4, atol=1e-4)
        return torch.tensor(found)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_clean_samples_are_standardised(memory):
    cache = Cache(3)
    rows = torch.tensor([8, 2, 5, 11])
    source = FeatureSource(cache, "train", rows, in_memory_bytes=memory)
    batch = source.clean(torch.tensor([3, 0]))
    assert cache.view_numbers("train", batch.views[0], [11, 8]).tolist() == [0, 0]
    assert batch.labels is None
    assert len(source) == 4
    assert batch.views[0]["image.0"].dtype == torch.float32


def test_memory_and_file_give_the_same_bits():
    cache = Cache(3)
    rows = torch.tensor([1, 12, 3, 4, 7])
    settings = {"rows": rows, "feature_views": FeatureViews(dropout=0.3, noise=0.1, drop_modality=0.3)}
    held, read = (FeatureSource(cache, "train", **settings, in_memory_bytes=b) for b in (1 << 30, 0))
    assert held._memory is not None
    assert read._memory is None
    index = torch.tensor([4, 0, 0, 2])
    for call in (
        lambda s: s.clean(index),
        lambda s: s.views(index, generator(), 2),
        lambda s: s.views(index, generator(), 1),
        lambda s: s.mixed(index, generator(), 0.5),
    ):
        for a, b in zip(call(held).views, call(read).views, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in INFOS)


@pytest.mark.parametrize("num_views", [2, 3, 4])
def test_a_pair_is_two_different_views_each_pair_as_likely(num_views):
    cache = Cache(num_views)
    source = FeatureSource(cache, "train")
    index = torch.arange(13).repeat(60)
    first, second = source.views(index, generator(), 2).views
    a, b = cache.view_numbers("train", first, index), cache.view_numbers("train", second, index)
    assert (a != b).all()
    assert a.min() == b.min() == 1
    pairs = torch.zeros(num_views + 1, num_views + 1).index_put((a, b), torch.ones(len(a)), accumulate=True)
    share = pairs[1:, 1:] / len(a) * num_views * (num_views - 1)
    assert share[~torch.eye(num_views, dtype=torch.bool)].sub(1).abs().max() < 0.5


def test_pairs_where_views_are_few():
    index = torch.arange(6)
    one = Cache(1)
    first, second = FeatureSource(one, "val").views(index, generator(), 2).views
    assert one.view_numbers("val", first, index).eq(1).all()
    assert one.view_numbers("val", second, index).eq(0).all()
    for cache, split in ((Cache(0), "val"), (Cache(3), "test")):
        source = FeatureSource(cache, split)
        assert source.num_views == 0
        for inputs in source.views(index, generator(), 2).views:
            assert cache.view_numbers(split, inputs, index).eq(0).all()
        source = FeatureSource(cache, split, feature_views=FeatureViews(noise=1.0))
        first, second = source.views(index, generator(), 2).views
        assert not torch.equal(first["text.0"], second["text.0"])


def test_single_and_mixed_views():
    cache = Cache(3)
    source = FeatureSource(cache, "train")
    index = torch.arange(13).repeat(40)
    (inputs,) = source.views(index, generator(), 1).views
    assert cache.view_numbers("train", inputs, index).unique().tolist() == [1, 2, 3]
    for probability in (0.0, 0.5, 1.0):
        (inputs,) = source.mixed(index, generator(), probability).views
        clean = cache.view_numbers("train", inputs, index).eq(0).float().mean().item()
        assert clean == pytest.approx(probability, abs=0.1 if probability == 0.5 else 0)
    with pytest.raises(ValueError, match="1 or 2 views, got count=3"):
        source.views(index, generator(), 3)


def test_the_generator_decides_everything():
    source = FeatureSource(Cache(3), "train", feature_views=FeatureViews(dropout=0.5))
    index = torch.arange(13)
    torch.manual_seed(1)
    a = source.views(index, generator(5), 2)
    torch.manual_seed(2)
    b = source.views(index, generator(5), 2)
    c = source.views(index, generator(6), 2)
    assert all(torch.equal(x[name], y[name]) for x, y in zip(a.views, b.views, strict=True) for name in INFOS)
    assert not torch.equal(a.views[0]["image.0"], c.views[0]["image.0"])


def test_labels_follow_the_rows():
    cache = Cache(0)
    hot = (torch.arange(13)[:, None] % torch.tensor([2, 3]) == 0).to(torch.uint8)
    rows = torch.tensor([9, 4, 6])
    source = FeatureSource(cache, "train", rows, labels=hot)
    assert torch.equal(source.labels, hot[rows].float())
    assert torch.equal(source.clean(torch.tensor([2])).labels, hot[6:7].float())
    classes = FeatureSource(cache, "train", rows, labels=torch.arange(13))
    assert classes.clean(torch.tensor([1, 1])).labels.tolist() == [4, 4]
    assert classes.labels.dtype == torch.long


def test_chosen_features_and_messages():
    cache = Cache(1)
    source = FeatureSource(cache, "train", features=["text.0"])
    assert list(source.infos) == list(source.clean(torch.tensor([0])).views[0]) == ["text.0"]
    with pytest.raises(InputError, match=r"no feature 'text.7' was computed; there are image.0, text.0"):
        FeatureSource(cache, "train", features=["text.7"])
    with pytest.raises(InputError, match=r"rows of 'val' must lie in \[0, 6\), got 0 to 6"):
        FeatureSource(cache, "val", torch.tensor([0, 6]))
    with pytest.raises(InputError, match="'val' has 6 samples, got labels of 13"):
        FeatureSource(cache, "val", labels=torch.zeros(13))

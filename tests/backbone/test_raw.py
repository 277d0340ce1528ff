"""Samples of every kind as arrays: stored once, standardised by training statistics, viewed live."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmnas_lab.backbone import raw
from mmnas_lab.backbone.base import LiveViews
from mmnas_lab.backbone.raw import Raw, RawCache
from mmnas_lab.backbone.raw_source import RawSource
from mmnas_lab.dataset.base import LabelFree
from mmnas_lab.dataset.pixel_views import PixelViews
from mmnas_lab.dataset.views import FeatureViews, TextViews, TokenViews
from mmnas_lab.loader import JoinedSource
from mmnas_lab.types import InputError, InputInfo

SIZES = {"train": 11, "val": 5, "test": 4}
KINDS = {
    "photo": "image",
    "digit": "image",
    "plot": "text",
    "sound": "audio",
    "motion": "series",
    "body": "skeleton",
    "facts": "tabular",
    "clip": "video",
}
SHAPES = {
    "photo": (3, 6, 5),
    "digit": (1, 4, 7),
    "plot": (6, 3),
    "sound": (1, 5, 9),
    "motion": (8, 4),
    "body": (7, 5, 3),
    "facts": (10,),
    "clip": (4, 6, 5),
}


class Everything:
    """A dataset with a modality of each kind; training samples differ from the others in scale."""

    name = "everything"
    modalities = KINDS
    classes = ("a", "b")

    def __init__(self, spoil=None):
        self.spoil = spoil

    def ids(self, split):
        return [f"{split}-{row}" for row in range(SIZES[split])]

    def read(self, split, modality, rows):
        return [self.sample(split, modality, row) for row in rows]

    def sample(self, split, modality, row):
        rng = np.random.default_rng([list(SIZES).index(split), list(KINDS).index(modality), row])
        shape = SHAPES[modality]
        if modality == "plot":
            return " ".join("abcdefgh"[k] for k in rng.integers(0, 8, 1 + row % 8))
        if KINDS[modality] == "image":
            pixels = rng.integers(0, 256, (*shape[1:], shape[0]), dtype=np.uint8)
            return Image.fromarray(pixels[..., 0] if shape[0] == 1 else pixels)
        if modality == "sound":
            return rng.random(shape, np.float32)
        values = (50 + 3 * rng.standard_normal(shape) * (1 if split == "train" else 9)).astype(np.float32)
        if modality == "facts":
            values[0] = 7
        if self.spoil is not None and (split, modality, row) == self.spoil[:3]:
            values = self.spoil[3](values)
        return values

    def fingerprint(self):
        return "everything"

    def labels(self, split):
        return torch.arange(SIZES[split]) % 2


class Letters:
    """Tokens are letters, their features powers of the letter's number. Fails after so many calls."""

    label_free, max_tokens, width = True, 8, 3

    def __init__(self, fail_after=None):
        self.fail_after, self.calls = fail_after, 0

    def fingerprint(self):
        return "letters"

    def sequences(self, samples, positions):
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise KeyboardInterrupt
        states = torch.zeros(len(samples), positions, 3)
        words = [text.split()[:positions] for text in samples]
        for row, text in enumerate(words):
            for t, letter in enumerate(text):
                states[row, t] = torch.tensor([(1.0 + "abcdefgh".index(letter)) ** k for k in (1, 2, 0)])
        return states, torch.tensor([len(text) for text in words])


class Noise:
    """A family: the sample and one draw, constant over it."""

    def __call__(self, sample, generator):
        return sample + torch.rand(1, generator=generator).numpy()

    def settings(self):
        return {"family": "noise"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(raw, "CHUNK_ROWS", 3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    Raw(text=Letters(), tokens=6).write(LabelFree(Everything()), folder)
    return RawCache(folder)


def reference(split, name):
    """(n, ...) float64 raw values, and a mask of those that exist."""
    data, shape = Everything(), SHAPES[name]
    samples = data.read(split, name, range(SIZES[split]))
    mask = np.ones((SIZES[split], *shape), bool)
    if KINDS[name] == "image":
        pixels = [np.asarray(s, np.float64).reshape(*shape[1:], shape[0]) for s in samples]
        return np.stack(pixels).transpose(0, 3, 1, 2) / 255, mask
    if name == "plot":
        states, lengths = Letters().sequences(samples, shape[0])
        for row, length in enumerate(lengths.tolist()):
            mask[row, length:] = False
        return states.double().numpy(), mask
    return np.stack(samples).astype(np.float64), mask


def standardised(split, name):
    """Channel by channel, with the mean and deviation of the training samples alone."""
    train, train_mask = reference("train", name)
    values, mask = reference(split, name)
    axis = {"image": 1, "audio": 1}.get(KINDS[name], values.ndim - 1)
    expected = np.zeros_like(values)
    for c in range(1 if name == "clip" else values.shape[axis]):
        at = ... if name == "clip" else (slice(None),) * axis + (c,)
        known = train[at][train_mask[at]]
        deviation = known.std()
        expected[at] = (values[at] - known.mean()) / (deviation if deviation > 1e-6 else 1)
    return expected * mask


@pytest.mark.parametrize("memory", [1 << 30, 0])
@pytest.mark.parametrize("name", KINDS)
def test_clean_batches_are_the_standardised_samples(cache, name, memory):
    assert cache.infos[name] == InputInfo(SHAPES[name], name, KINDS[name])
    # Half precision has a step of 0.0005 just below 1, and spectrograms here a deviation of 0.3.
    tolerance = 1e-3 if name == "sound" else 1e-4
    for split in SIZES:
        source = RawSource(cache, split, in_memory_bytes=memory)
        (view,) = source.clean(torch.arange(len(source)).flip(0)).views
        assert list(view) == list(KINDS)
        assert view[name].dtype == torch.float32
        expected = torch.from_numpy(standardised(split, name)).flip(0)
        torch.testing.assert_close(view[name].double(), expected, atol=tolerance, rtol=1e-5)


def test_arrays_are_kept_as_exactly_as_their_kind_needs(cache):
    for name, kind in KINDS.items():
        array = cache.array("val", name)
        values, _ = reference("val", name)
        if kind == "image":
            assert array.dtype == np.uint8
            assert np.array_equal(array / 255, values)
        elif kind == "audio":
            assert array.dtype == np.float16
            assert np.abs(array - values).max() <= 2**-12
        elif kind == "text":
            assert array.dtype == np.float16
            assert np.array_equal(array, values)
            assert cache.lengths("val", name).tolist() == [1, 2, 3, 4, 5]
        else:
            assert array.dtype == np.float32
            assert np.array_equal(array, values)


def test_rows_labels_and_names_go_together(cache):
    labels, rows = torch.arange(11), torch.tensor([5, 2, 9])
    source = RawSource(cache, "train", rows, labels, names=("motion", "plot"))
    batch = source.clean(torch.tensor([2, 0]))
    assert batch.labels.tolist() == [9, 5]
    assert list(source.infos) == list(batch.views[0]) == ["motion", "plot"]
    whole = RawSource(cache, "train").clean(torch.tensor([9, 5]))
    assert all(torch.equal(value, whole.views[0][name]) for name, value in batch.views[0].items())
    assert whole.labels is None


LIVE = LiveViews(
    PixelViews(crop_padding=1, flip=True, jitter=0.3),
    {"plot": TokenViews(2.0), "sound": Noise(), "motion": Noise(), "facts": Noise()},
    FeatureViews(),
)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_views_are_functions_of_the_generator(cache, memory):
    source = RawSource(cache, "train", views=LIVE, in_memory_bytes=memory)
    index = torch.arange(11)
    first, again, other = (source.views(index, seeded(seed), 2) for seed in (3, 3, 4))
    clean = source.clean(index).views[0]
    for name in KINDS:
        assert torch.equal(first.views[0][name], again.views[0][name])
        assert torch.equal(first.views[1][name], again.views[1][name])
        changed = name in ("photo", "digit", *LIVE.families)
        for different in (first.views[1], other.views[0], clean):
            assert torch.equal(first.views[0][name], different[name]) != changed
    fewer = RawSource(cache, "train", names=("sound",), views=LIVE).views(index, seeded(), 1)
    assert torch.equal(fewer.views[0]["sound"], first.views[0]["sound"])


def test_each_sample_has_draws_of_its_own(cache):
    source = RawSource(cache, "train", views=LIVE)
    same = torch.zeros(8, dtype=torch.long)
    (view,) = source.views(same, seeded(), 1).views
    for name in ("motion", "sound", "facts"):
        assert len({tuple(sample.flatten().tolist()) for sample in view[name]}) == 8
    # A family's draws for a sample do not depend on the samples beside it.
    (mixed,) = source.views(torch.tensor([0, 1, 2, 0, 4, 5, 6, 7]), seeded(), 1).views
    for name in ("motion", "sound", "facts", "plot"):
        assert torch.equal(view[name][[0, 3]], mixed[name][[0, 3]])


def test_views_of_arrays_are_views_of_the_raw_samples(cache):
    source = RawSource(cache, "train", views=LIVE)
    (view,), (clean,) = (
        source.views(torch.arange(11), seeded(), 1).views,
        source.clean(torch.arange(11)).views,
    )
    _, std = cache.statistics["motion"]
    moved = (view["motion"] - clean["motion"]) * std
    assert ((moved > -1e-4) & (moved < 1)).all()
    torch.testing.assert_close(moved, moved[:, :1, :1].expand_as(moved), atol=1e-4, rtol=0)


def test_left_out_tokens_move_the_others_up_and_end_in_zeros(cache):
    source = RawSource(cache, "train", names=["plot"], views=LIVE)
    index = torch.arange(11).repeat(20)
    (view,), (clean,) = source.views(index, seeded(), 1).views, source.clean(index).views
    lengths = torch.from_numpy(cache.lengths("train", "plot").astype(int))[index]
    shortened = 0
    for viewed, whole, length in zip(view["plot"], clean["plot"], lengths.tolist(), strict=True):
        tokens, rest = [tuple(t) for t in viewed.tolist()], iter(tuple(t) for t in whole[:length].tolist())
        kept = int((viewed != 0).any(1).sum())
        assert kept >= 1
        assert not any(any(t) for t in tokens[kept:])
        assert all(token in rest for token in tokens[:kept])  # a subsequence, in order
        shortened += kept < length
    assert 60 < shortened < 200


def test_a_lost_modality_is_zero_and_marked(cache):
    views = LiveViews(LIVE.pixels, LIVE.families, FeatureViews(drop_modality=0.1))
    source = RawSource(cache, "train", views=views)
    index = torch.arange(11).repeat(100)
    (view,) = source.views(index, seeded(), 1).views
    assert set(view) == {*KINDS, *(f"present.{name}" for name in KINDS)}
    absent = torch.stack([~view[f"present.{name}"] for name in KINDS])
    assert absent.sum(0).max() == 1
    assert absent.float().mean(1) == pytest.approx([0.1] * len(KINDS), abs=0.03)
    for name, lost in zip(KINDS, absent, strict=True):
        assert torch.equal((view[name] == 0).flatten(1).all(1), lost)
    (clean,) = source.clean(index).views
    assert all(clean[f"present.{name}"].all() for name in KINDS)
    mixed = source.mixed(index, seeded(), 0.5).views[0]
    assert (~mixed["present.facts"]).float().mean() == pytest.approx(0.05, abs=0.02)
    assert torch.equal((mixed["facts"] == 0).all(1), ~mixed["present.facts"])
    (alone,) = RawSource(cache, "train", names=["clip"], views=views).views(index, seeded(), 1).views
    assert set(alone) == {"clip", "present.clip"}
    assert alone["present.clip"].all()
    assert set(RawSource(cache, "train").clean(index).views[0]) == set(KINDS)
    often = RawSource(cache, "train", views=LiveViews(features=FeatureViews(drop_modality=0.3)))
    with pytest.raises(InputError, match="use at most 0.125"):
        often.views(index, seeded(), 1)


def test_noise_stays_out_of_what_follows_a_text(cache):
    source = RawSource(cache, "train", views=LiveViews(features=FeatureViews(noise=1.0)))
    (view,) = source.views(torch.arange(11), seeded(), 1).views
    for sample, length in zip(view["plot"], cache.lengths("train", "plot"), strict=True):
        assert (sample[length:] == 0).all()
        assert (sample[:length] != 0).any(1).all()


def test_mixed_batches_hold_clean_samples_at_their_share(cache):
    source = RawSource(cache, "train", views=LIVE)
    index = torch.arange(11).repeat(40)
    clean = source.clean(index).views[0]
    for probability in (0.0, 0.5, 1.0):
        mixed = source.mixed(index, seeded(0), probability).views[0]
        same = torch.stack([(mixed[n] == clean[n]).flatten(1).all(1) for n in ("sound", "motion", "facts")])
        assert (same.all(0) == same.any(0)).all()
        assert float(same[0].float().mean()) == pytest.approx(probability, abs=0.06)


def test_joined_sources_give_both_parts(cache):
    views = LiveViews(features=FeatureViews(drop_modality=0.1))
    parts = [RawSource(cache, split, views=views) for split in ("train", "val")]
    (view,) = JoinedSource(*parts).clean(torch.tensor([12, 3])).views
    for name in KINDS:
        assert torch.equal(view[name][0], parts[1].clean(torch.tensor([1])).views[0][name][0])
        assert torch.equal(view[name][1], parts[0].clean(torch.tensor([3])).views[0][name][0])


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_an_interrupted_call_goes_on_to_the_same_bits(cache, tmp_path, calls):
    with pytest.raises(KeyboardInterrupt):
        Raw(text=Letters(calls), tokens=6).write(LabelFree(Everything()), tmp_path)
    with pytest.raises(InputError, match="holds no complete arrays"):
        RawCache(tmp_path)
    rest = Letters()
    Raw(text=rest, tokens=6).write(LabelFree(Everything()), tmp_path)
    assert rest.calls == 1 + 8 - (calls - 1)  # chunks left, and the first sample's shape
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {path.name: path.read_bytes() for path in cache.folder.iterdir()}
    done = Letters(0)
    Raw(text=done, tokens=6).write(LabelFree(Everything()), tmp_path)


def test_another_plan_starts_afresh(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Raw(text=Letters(3), tokens=4).write(LabelFree(Everything()), tmp_path)
    rest = Letters()
    Raw(text=rest, tokens=6).write(LabelFree(Everything()), tmp_path)
    assert rest.calls == 9
    assert RawCache(tmp_path).infos["plot"].shape == (6, 3)


def test_progress_counts_the_chunks(tmp_path):
    told = []

    def progress(items, label, total):
        told.append((label, total))
        return items

    Raw(text=Letters()).write(LabelFree(Everything()), tmp_path, progress)
    assert told == [("features", 8 * (4 + 2 + 2))]


@pytest.mark.parametrize(
    ("settings", "photo", "digit"),
    [
        ({"size": 4}, (3, 4, 4), (1, 4, 4)),
        ({"size": [3, 9]}, (3, 3, 9), (1, 3, 9)),
        ({"size": 4, "channels": 3}, (3, 4, 4), (3, 4, 4)),
        ({"size": 4, "channels": 1}, (1, 4, 4), (1, 4, 4)),
    ],
)
def test_pictures_are_brought_to_a_size_and_colours(tmp_path, settings, photo, digit):
    Raw(**settings, text=Letters()).write(LabelFree(Everything()), tmp_path)
    cache = RawCache(tmp_path)
    assert (cache.infos["photo"].shape, cache.infos["digit"].shape) == (photo, digit)


def put(value):
    def spoil(values):
        values.flat[1] = value
        return values

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            ("val", "motion", 3, lambda v: v[1:]),
            r"val sample 'val-3' of modality 'motion' has the shape \(7, 4\)",
        ),
        (("test", "facts", 1, put(np.nan)), r"'test-1' of modality 'facts' has values that are not finite"),
    ],
)
def test_samples_that_cannot_be_kept_are_named(tmp_path, spoil, message):
    with pytest.raises(InputError, match=message):
        Raw(text=Letters()).write(LabelFree(Everything(spoil)), tmp_path)


def test_refusals(cache, tmp_path):
    with pytest.raises(InputError, match=r"size must be a positive number or \[height, width\]"):
        Raw(size=[3])
    with pytest.raises(InputError, match="tokens must be at least 1"):
        Raw(tokens=0)
    with pytest.raises(InputError, match="needs an encoder of tokens for the text modality 'plot'"):
        Raw().check(KINDS)
    with pytest.raises(InputError, match="modality 'x' is of kind 'smell'"):
        Raw().check({"x": "smell"})
    with pytest.raises(InputError, match="features stage"):
        RawCache(tmp_path)
    with pytest.raises(InputError, match="no modality 'x' was written; there are photo"):
        RawSource(cache, "train", names=["x"])
    with pytest.raises(InputError, match="got labels of 2"):
        RawSource(cache, "train", labels=torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match=r"must lie in \[0, 11\)"):
        RawSource(cache, "train", rows=torch.tensor([11]))
    with pytest.raises(ValueError, match="count=3"):
        RawSource(cache, "train").views(torch.arange(2), seeded(), 3)


def test_settings_tell_everything_that_decides_the_arrays():
    told = [
        Raw().settings(),
        Raw(size=3).settings(),
        Raw(size=[3, 4]).settings(),
        Raw(channels=1).settings(),
        Raw(text=Letters()).settings(),
        Raw(text=Letters(), tokens=5).settings(),
    ]
    assert len({str(settings) for settings in told}) == len(told)
    assert told[-1]["text"] == "letters"


def test_texts_have_views_of_tokens_and_pictures_none_of_their_own():
    noise = Noise()
    families = {"plot": TextViews(0.5), "motion": noise, "photo": noise}
    live = Raw(text=Letters()).views(families, KINDS)
    assert live.keys() == {"plot", "motion"}
    assert isinstance(live["plot"], TokenViews)
    assert live["plot"].strength == 0.5
    assert live["motion"] is noise

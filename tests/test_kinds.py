"""Data of every kind through the stages: small encoders for fusion, arrays for networks that read samples."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmnas_lab.backbone.raw import RawCache
from mmnas_lab.dataset.base import LabelFree
from mmnas_lab.dataset.families import SIGNALS, view_families
from mmnas_lab.dataset.views import ImageViews, TextViews
from mmnas_lab.study import compose, open_experiment
from mmnas_lab.types import InputError

SIZES = {"train": 40, "val": 20, "test": 12}
SHAPES = {"sound": (1, 12, 10), "motion": (11, 3), "body": (7, 4, 3), "facts": (5,), "clip": (4, 9, 8)}
KINDS = dict(zip(SHAPES, SIGNALS, strict=True))


class Arrays:
    """A dataset of arrays of every kind, whose means tell the class."""

    name, task, classes, modalities = "arrays", "multiclass", ("low", "high"), KINDS
    seen: list[str] = []  # noqa: RUF012

    def open(self):
        pass

    def ids(self, split):
        return [f"{split}-{row}" for row in range(SIZES[split])]

    def read(self, split, modality, rows):
        rows = list(rows)
        self.seen.append(split)
        draws = [np.random.default_rng([len(split), list(KINDS).index(modality), row]) for row in rows]
        shape = SHAPES[modality]
        return [
            (rng.random(shape) + row % 2).astype(np.float32) for rng, row in zip(draws, rows, strict=True)
        ]

    def fingerprint(self):
        return "arrays"

    def labels(self, split):
        return torch.arange(SIZES[split]) % 2

    def label_fingerprint(self):
        return "labels"


class Pictures(Arrays):
    """A dataset of pictures alone."""

    name, modalities = "pictures", {"photo": "image"}

    def read(self, split, modality, rows):
        draws = [np.random.default_rng([len(split), row]) for row in rows]
        return [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for rng in draws]


class Shift:
    """A view: one number added to a sample."""

    def __init__(self, strength):
        self.strength = strength

    def __call__(self, sample, generator):
        return sample + np.float32(self.strength * torch.rand((), generator=generator).item())

    def settings(self):
        return {"family": "shift", "strength": self.strength}


@pytest.fixture(autouse=True)
def signal_views(monkeypatch):
    for kind in SIGNALS:
        monkeypatch.setitem(SIGNALS, kind, type(f"{kind.title()}Shift", (Shift,), {}))


def opened(output, dataset, *overrides):
    values = compose(["scale=smoke", f"output={output}", "trainer.threads=1", "baselines=[]", *overrides])
    values["dataset"] = {"_target_": f"{__name__}.{dataset.__name__}"}
    return open_experiment(values)


FUSION = ("experiment=ssl_nas_movies", "backbone=small", "search.epochs=1", "search.views.drop_modality=0.1")
CELLS = ("experiment=darts_cifar10", "backbone=raw", "backbone.text=null", "backbone.size=8")


def test_fusion_searches_on_features_of_any_kind(tmp_path):
    experiment = opened(tmp_path, Arrays, *FUSION)
    length = experiment.space.length
    infos = experiment.data.cache.infos
    assert {info.modality for info in infos.values()} == set(KINDS)
    assert infos["sound.2"].shape == (64, length)
    assert infos["motion.3"].shape == (128, 1)
    assert infos["facts.1"].shape == (128, 1)
    stages = [path.name for path in (tmp_path / "stages/backbone").iterdir() if path.is_dir()]
    assert sorted(name.split("-")[0] for name in stages) == sorted(f"arrays_{name}" for name in KINDS)
    genotype = json.loads((experiment.search().folder / "genotype.json").read_text())
    assert genotype["space"] == "fusion"

    Arrays.seen.clear()
    again = opened(tmp_path, Arrays, *FUSION)
    assert not Arrays.seen  # encoders and features are found again
    assert again.data.stages["features"].key == experiment.data.stages["features"].key
    for name in infos:
        assert np.array_equal(again.data.cache.array("val", name), experiment.data.cache.array("val", name))
    assert opened(tmp_path, Arrays, *FUSION, "features.num_views=0").data.cache.num_views == 0
    weaker = opened(tmp_path, Arrays, *FUSION, "features.signal_strength=0.5", "features.num_views=0")
    key = weaker.data.stages["features"].key
    strong = opened(tmp_path, Arrays, *FUSION, "features.num_views=0").data.stages["features"].key
    assert key != strong


def test_live_views_change_later_stages_but_not_the_arrays(tmp_path):
    experiment, same, other = (
        opened(tmp_path, Pictures, *CELLS, *more)
        for more in ((), ("features.signal_strength=2",), ("backbone.channels=1",))
    )
    keys = [one.data.stages["features"].key for one in (experiment, same, other)]
    assert keys[0] == keys[1] != keys[2]  # pictures have views of their own
    data = experiment.data
    data.dataset = Arrays()
    del data.cache, data.families
    data.stages.clear()
    first = data.cache
    assert isinstance(first, RawCache)
    (batch,) = (
        data.source("train", settings=experiment.config.search)
        .views(torch.arange(4), torch.Generator().manual_seed(0), 1)
        .views
    )
    (clean,) = data.source("train", settings=experiment.config.search).clean(torch.arange(4)).views
    _, std = first.statistics["motion"]
    shifted = ((batch["motion"] - clean["motion"]) * std).flatten(1)
    assert (shifted.std(1) < 1e-5).all()
    assert len(set(shifted[:, 0].tolist())) == 4
    key = data.stages["features"].key
    folder = data.stages["features"].folder
    data.config = data.config.model_copy(
        update={"features": data.config.features.model_copy(update={"signal_strength": 0.5})}
    )
    del data.cache, data.families
    data.cache  # noqa: B018
    assert data.stages["features"].folder == folder
    assert data.stages["features"].key != key


def test_cells_search_on_raw_pictures_as_on_pixels(tmp_path):
    """One network reads the same pictures from either backbone."""
    sources = [
        opened(tmp_path, Pictures, *CELLS).data.source("train"),
        opened(tmp_path, Pictures, "experiment=darts_cifar10", "backbone.size=8").data.source("train"),
    ]
    raw, pixels = (source.clean(torch.arange(9)).views[0]["photo"] for source in sources)
    torch.testing.assert_close(raw, pixels, atol=1e-5, rtol=0)


def test_backbones_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match="FusionSpace fuses features"):
        opened(tmp_path, Arrays, "experiment=ssl_nas_movies", "backbone=raw")
    with pytest.raises(InputError, match="reads the samples themselves; choose backbone=pixels"):
        opened(tmp_path, Pictures, "experiment=darts_cifar10", "backbone=small", "~backbone.size")
    with pytest.raises(InputError, match="pictures alone"):
        opened(tmp_path, Arrays, "experiment=darts_cifar10")
    with pytest.raises(InputError, match="no encoder of kind 'video'"):
        opened(tmp_path, Arrays, *FUSION, "backbone.video=null")
    with pytest.raises(InputError, match="no such option; did you mean series"):
        opened(tmp_path, Arrays, *FUSION, "backbone.series.kind=serie")


class Mixed:
    """Facts of a dataset with every kind of modality and two tables."""

    modalities = {"photo": "image", "plot": "text", **KINDS, "more": "tabular"}  # noqa: RUF012
    name = "mixed"

    ids = Arrays.ids
    fingerprint = Arrays.fingerprint

    def read(self, split, modality, rows):
        assert split == "train"
        return [np.full(3, len(modality) + row, np.float32) for row in rows]


def test_every_modality_has_a_family_of_its_kind_and_strength(monkeypatch):
    class Replaced(Shift):
        def fit(self, samples):
            self.fitted = np.stack(list(samples))

    monkeypatch.setitem(SIGNALS, "tabular", Replaced)
    families = view_families(LabelFree(Mixed()), image=0.1, text=0.2, signal=0.3)
    assert list(families) == list(Mixed.modalities)
    assert isinstance(families["photo"], ImageViews)
    assert isinstance(families["plot"], TextViews)
    assert [family.strength for family in families.values()] == [0.1, 0.2, *[0.3] * 6]
    for name, kind in KINDS.items():
        assert isinstance(families[name], SIGNALS[kind])
    for name in ("facts", "more"):  # each is fitted on its own modality
        assert families[name].fitted[:, 0].tolist() == [len(name) + row for row in range(SIZES["train"])]
    monkeypatch.setattr(Mixed, "modalities", {"nose": "smell"})
    with pytest.raises(InputError, match="no family of views for kind 'smell' of modality 'nose'; the kinds"):
        view_families(LabelFree(Mixed()))

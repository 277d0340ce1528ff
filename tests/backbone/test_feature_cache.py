import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmnas_lab.backbone import feature_writer
from mmnas_lab.backbone.feature_cache import FeatureCache, compute_features
from mmnas_lab.backbone.feature_writer import FEATURES_FILE, STATISTICS_FILE, array_path
from mmnas_lab.backbone.frozen import Backbone
from mmnas_lab.backbone.tfidf import TfidfSvd
from mmnas_lab.dataset.base import LabelFree
from mmnas_lab.types import InputError, InputInfo, TrainingError

SIZES = {"train": 11, "val": 5, "test": 4}


class Numbers:
    """A dataset of two modalities whose samples are numbers and words."""

    name = "numbers"
    modalities = {"image": "image", "text": "text"}  # noqa: RUF012

    def ids(self, split):
        return [f"{split}-{row}" for row in range(SIZES[split])]

    def read(self, split, modality, rows):
        if modality == "text":
            return [f"word{row % 3} {split} word{row % 4}" for row in rows]
        return [float(row + 100 * list(SIZES).index(split)) for row in rows]

    def fingerprint(self):
        return "numbers"


class Times:
    """An encoder of numbers: (3, L) and (2, 1) multiples. Fails after so many calls if asked to."""

    fitted = untrained = False
    label_free = True

    def __init__(self, modality="image", scale=1.0, fail_after=None):
        self.modality, self.scale, self.fail_after, self.calls = modality, scale, fail_after, 0

    def fingerprint(self):
        return f"times {self.scale}"

    def load(self):
        pass

    def infos(self, length):
        return {
            f"{self.modality}.{i}": InputInfo(s, self.modality) for i, s in enumerate([(3, length), (2, 1)])
        }

    def encode(self, samples, length):
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise KeyboardInterrupt
        x = torch.tensor(samples).view(-1, 1, 1)
        wide = x * torch.arange(1.0, 4).view(3, 1) + torch.linspace(0, 0.1, length)
        return {f"{self.modality}.0": wide, f"{self.modality}.1": self.scale * x.expand(-1, 2, 1)}


class Shift:
    """A view: a number moved, or a word left out."""

    def __call__(self, sample, generator):
        draw = torch.rand((), generator=generator).item()
        return sample + draw if isinstance(sample, float) else sample.split()[int(3 * draw)]

    def settings(self):
        return {"family": "shift"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(feature_writer, "CHUNK_ROWS", 2)


def compute(folder, image=None, num_views=2, **settings):
    backbone = Backbone(image=image or Times(), text=TfidfSvd(3))
    shift = {"image": Shift(), "text": Shift()}
    settings = {"views": shift, "num_views": num_views, "view_seed": 7, "length": 4, "workers": 2, **settings}
    compute_features(dataset=LabelFree(Numbers()), backbone=backbone, folder=folder, **settings)
    return FeatureCache(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shapes_values_and_facts(tmp_path):
    cache = compute(tmp_path)
    assert cache.num_views == 2
    assert list(cache.infos) == ["image.0", "image.1", "text.0"]
    assert cache.infos["image.0"] == InputInfo((3, 4), "image")
    assert cache.array("train", "image.0").shape == (3, 11, 3, 4)
    assert cache.array("test", "image.0").shape == (1, 4, 3, 4)
    assert cache.array("val", "text.0").dtype == np.float16
    assert [cache.rows(split) for split in SIZES] == [11, 5, 4]
    encoder = Times()
    for split in SIZES:
        clean = encoder.encode(Numbers().read(split, "image", range(SIZES[split])), 4)["image.0"]
        assert np.array_equal(cache.array(split, "image.0")[0], clean.half().numpy())
    views = cache.array("train", "image.1")[:, :, 0, 0].astype(float)
    assert ((views[1:] >= views[0]) & (views[1:] <= views[0] + 1.01)).all()
    assert len(np.unique(views[1:] - views[0])) > 15  # each sample and view has draws of its own


def test_a_view_depends_on_seed_sample_and_number_only(tmp_path, monkeypatch):
    few = compute(tmp_path / "few", num_views=1)
    monkeypatch.setattr(feature_writer, "CHUNK_ROWS", 5)
    more = compute(tmp_path / "more", num_views=3, workers=1)
    assert np.array_equal(few.array("train", "image.0"), more.array("train", "image.0")[:2])
    other = compute(tmp_path / "other", num_views=1, view_seed=8)
    assert not np.array_equal(few.array("train", "image.0")[1], other.array("train", "image.0")[1])


@pytest.mark.parametrize("calls", [0, 1, 7, 20])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, calls):
    compute(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "killed", Times(fail_after=calls), workers=1)
    with pytest.raises(InputError, match="holds no complete features"):
        FeatureCache(tmp_path / "killed")
    rest = Times()
    compute(tmp_path / "killed", rest)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
    whole = Times()
    compute(tmp_path / "again", whole)
    assert rest.calls <= whole.calls - 3 * (calls // 3) + 3
    done = Times()
    compute(tmp_path / "killed", done)
    assert done.calls == 0


def test_another_plan_starts_afresh(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "a", Times(fail_after=9), workers=1)
    compute(tmp_path / "a", view_seed=9)
    compute(tmp_path / "b", view_seed=9)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def on_two_ranks(folder, encoder):
    barrier = threading.Barrier(2, timeout=30)
    failures = []

    def rank(number):
        try:
            compute(folder, encoder(), rank=number, world_size=2, barrier=barrier.wait)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_two_ranks_write_what_one_writes(tmp_path, scale):
    compute(tmp_path / "one", Times(scale=scale))
    on_two_ranks(tmp_path / "two", lambda: Times(scale=scale))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_overflows_is_kept_in_float32_and_said_so(tmp_path, caplog):
    # Only the test split, 200 and up, passes 65504: the features of train are done by then.
    cache = compute(tmp_path / "a", Times(scale=400.0))
    assert cache.array("train", "image.1").dtype == np.float32
    assert cache.array("train", "image.0").dtype == cache.array("train", "text.0").dtype == np.float16
    assert cache.array("test", "image.1")[0, 3, 0, 0] == 203 * 400
    assert cache.array("train", "image.1")[0, 3, 0, 0] == 3 * 400
    assert "feature 'image.1' has values beyond float16; it is kept in float32" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "b", Times(scale=400.0, fail_after=50), workers=1)
    compute(tmp_path / "b", Times(scale=400.0))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_statistics_are_those_of_the_clean_training_samples(tmp_path):
    cache = compute(tmp_path)
    for name, (mean, std) in cache.statistics.items():
        clean = np.asarray(cache.array("train", name)[0], np.float64)
        np.testing.assert_allclose(mean, clean.mean((0, 2)), rtol=1e-6, atol=1e-7)
        expected = clean.std((0, 2))
        np.testing.assert_allclose(std, np.where(expected < 1e-6, 1, expected), rtol=1e-6)


def test_a_constant_channel_has_a_deviation_of_one(tmp_path):
    constant = Times(scale=0.0)
    assert compute(tmp_path, constant).statistics["image.1"][1].tolist() == [1, 1]


def test_gather_picks_views_and_rows(tmp_path):
    cache = compute(tmp_path)
    views, rows = torch.tensor([2, 0, 1, 1]), torch.tensor([10, 3, 3, 0])
    got = cache.gather("train", "image.0", views, rows)
    array = cache.array("train", "image.0")
    assert got.dtype == torch.float16
    assert np.array_equal(got, [array[v, r] for v, r in zip(views, rows, strict=True)])
    with pytest.raises(IndexError, match="must lie within"):
        cache.gather("test", "image.0", torch.tensor([1]), torch.tensor([0]))


def test_every_half_precision_number_is_read_exactly(tmp_path):
    every = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(1, 256, 16, 16)
    np.save(array_path(tmp_path, "train", "x"), every)
    mean, std = torch.linspace(-3, 3, 16), torch.linspace(0.1, 9, 16)
    save_file({"x.mean": mean, "x.std": std}, tmp_path / STATISTICS_FILE)
    feature = {"shape": [16, 16], "modality": "image"}
    layout = {"num_views": 0, "rows": {"train": 256, "val": 0, "test": 0}, "features": {"x": feature}}
    (tmp_path / FEATURES_FILE).write_text(json.dumps(layout))
    rows = torch.randperm(256)
    cache = FeatureCache(tmp_path)
    values = cache.standardised("train", "x", torch.zeros(256, dtype=torch.long), rows)
    expected = (torch.from_numpy(every[0].astype(np.float32))[rows] - mean[:, None]) / std[:, None]
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    for outside in (torch.tensor([256]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="must lie within"):
            cache.standardised("train", "x", torch.zeros(1, dtype=torch.long), outside)


def test_messages(tmp_path):
    with pytest.raises(InputError, match="no family of views for modality 'text'"):
        compute(tmp_path, views={"image": Shift()})
    with pytest.raises(TrainingError, match=r"feature 'image.1' of train sample 'train-0' is not finite"):
        compute(tmp_path, Times(scale=float("nan")))
    with pytest.raises(InputError, match=r"the backbone reads 'image', the dataset has 'image', 'text'"):
        compute_features(LabelFree(Numbers()), Backbone(image=Times()), {}, 0, 0, 4, tmp_path)


def test_progress_sees_every_chunk(tmp_path):
    seen = SimpleNamespace(total=0, count=0)

    def progress(results, description, total):
        seen.total = total
        for result in results:
            seen.count += 1
            yield result

    compute(tmp_path, progress=progress)
    assert seen.count == seen.total == 2 * (6 + 3 + 2)

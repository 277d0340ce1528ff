"""Encoders of arrays: fitted on training samples, pretrained, frozen; and one encoder a kind."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmnas_lab.backbone.feature_cache import FeatureCache, compute_features
from mmnas_lab.backbone.frozen import Backbone, by_kind
from mmnas_lab.backbone.signal import SignalEncoder
from mmnas_lab.backbone.tfidf import TfidfSvd
from mmnas_lab.dataset.base import LabelFree
from mmnas_lab.types import InputError

SHAPES = {
    "audio": (1, 21, 18),
    "series": (13, 3),
    "skeleton": (9, 4, 3),
    "tabular": (5,),
    "video": (6, 17, 20),
}


def samples(kind, count=7, seed=0):
    rng = np.random.default_rng(seed)
    return list(rng.normal(40, 3, (count, *SHAPES[kind])).astype(np.float32))


def fitted(kind, **settings):
    encoder = SignalEncoder(kind, width=4, levels=2, **settings)
    encoder.fit(iter(samples(kind)))
    return encoder


@pytest.mark.parametrize("length", [1, 4, 9])
@pytest.mark.parametrize("kind", SHAPES)
def test_features_have_the_shapes_that_are_told_before(kind, length):
    told = SignalEncoder(kind, "sensor", width=4, levels=2).infos(length)
    encoder = fitted(kind, modality="sensor", batch_size=3)
    features = encoder.encode(samples(kind, seed=1), length)
    assert {name: tuple(value.shape[1:]) for name, value in features.items()} == {
        name: info.shape for name, info in told.items()
    }
    assert list(told) == [f"sensor.{i}" for i in range(2 if kind == "tabular" else 3)]
    assert all(info.modality == "sensor" for info in told.values())
    for value in features.values():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert len(value) == 7
    assert encoder.infos(length) == told


@pytest.mark.parametrize("kind", SHAPES)
def test_the_network_gives_what_is_encoded(kind):
    encoder = fitted(kind)
    network = encoder.network()
    output = network(encoder.tensors(samples(kind)))
    features = encoder.encode(samples(kind), 1)
    assert output.embedding.shape == (7, network.info.embedding)
    assert {name: tuple(tap.shape[1:]) for name, tap in output.taps.items()} == network.info.taps
    for name, tap in output.taps.items():
        torch.testing.assert_close(
            features[name], tap.flatten(2).amax(2, keepdim=True) if tap.ndim > 2 else tap[..., None]
        )
    if kind != "tabular":
        torch.testing.assert_close(features[f"{kind}.2"][..., 0], output.embedding)
    output.embedding.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("kind", SHAPES)
def test_positions_of_sequences_are_times(kind):
    if kind in ("tabular", "audio"):
        return
    encoder = fitted(kind)
    early = np.stack(samples(kind, 1))
    late = early.copy()
    late[:, -1] += 30  # the last frame only
    before, after = (encoder.encode(list(x), 3)[f"{kind}.0"] for x in (early, late))
    changed = (before != after).any(1)[0]
    assert not changed[0]
    assert changed[2]


@pytest.mark.parametrize("kind", SHAPES)
def test_samples_are_standardised_by_the_training_samples(kind):
    """Training samples in other units give the same features."""
    encoder, other = fitted(kind), SignalEncoder(kind, width=4, levels=2)
    other.fit(1000 * sample - 7 for sample in samples(kind))
    fresh = samples(kind, seed=1)
    features = encoder.encode(fresh, 4)
    converted = other.encode([1000 * sample - 7 for sample in fresh], 4)
    for name, value in features.items():
        torch.testing.assert_close(converted[name], value, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_saved_is_restored(kind, tmp_path):
    encoder = fitted(kind)
    with torch.no_grad():
        for parameter in encoder.network().parameters():
            parameter += 0.1
    encoder.save(tmp_path / "a.safetensors")
    restored = SignalEncoder(kind, width=4, levels=2)
    assert restored.fitted
    assert restored.untrained
    restored.restore(tmp_path / "a.safetensors")
    read = SignalEncoder(kind, width=4, levels=2, checkpoint_path=str(tmp_path / "a.safetensors"))
    for one in (restored, read):
        assert not one.fitted
    assert not read.untrained
    read.load()
    for one in (restored, read):
        for name, value in encoder.encode(samples(kind, seed=1), 4).items():
            assert torch.equal(one.encode(samples(kind, seed=1), 4)[name], value)
    for wrong, message in (({"width": 8, "levels": 2}, "does not fit"), ({"width": 4}, "does not fit")):
        with pytest.raises(InputError, match=message):
            SignalEncoder(kind, **wrong).restore(tmp_path / "a.safetensors")


def test_weights_are_functions_of_the_seed_and_fingerprints_follow():
    first, same, other = (fitted("series", seed=seed) for seed in (0, 0, 1))
    encoded = [encoder.encode(samples("series"), 4)["series.1"] for encoder in (first, same, other)]
    assert torch.equal(encoded[0], encoded[1])
    assert not torch.equal(encoded[0], encoded[2])
    encoders = [
        SignalEncoder("series"),
        SignalEncoder("series", seed=1),
        SignalEncoder("series", width=8),
        SignalEncoder("series", levels=2),
        SignalEncoder("skeleton"),
    ]
    assert len({encoder.fingerprint() for encoder in encoders}) == 5
    assert SignalEncoder("series", "motion", batch_size=3).fingerprint() == encoders[0].fingerprint()


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="reads audio, series, .*, not kind 'image'"):
        SignalEncoder("image")
    with pytest.raises(InputError, match="width, levels and batch_size of at least 1"):
        SignalEncoder("series", levels=0)
    unfitted = SignalEncoder("series", "motion")
    unfitted.load()
    for call in (
        lambda: unfitted.encode(samples("series"), 4),
        lambda: unfitted.save(tmp_path / "x"),
        unfitted.network,
    ):
        with pytest.raises(InputError, match="'motion' reads samples only after fit"):
            call()
    with pytest.raises(InputError, match="needs training samples, got none"):
        unfitted.fit([])
    with pytest.raises(
        InputError, match=r"kind series has samples \(T, F\), those of 'motion' have the shape \(5,\)"
    ):
        unfitted.fit(samples("tabular"))
    with pytest.raises(InputError, match=r"must have one shape, got \(12, 3\) beside \(13, 3\)"):
        unfitted.fit([*samples("series"), samples("series")[0][1:]])
    with pytest.raises(InputError, match="not finite"):
        unfitted.fit([np.full((13, 3), np.nan, np.float32)])
    with pytest.raises(InputError, match=r"got \(12, 3\) beside \(13, 3\)"):
        fitted("series").encode([samples("series")[0][1:]], 4)
    with pytest.raises(InputError, match="length must be a square"):
        SignalEncoder("audio").infos(8)
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds no encoder of arrays"):
        unfitted.restore(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no weights at all")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        unfitted.restore(tmp_path / "text")


class Sensors:
    """A dataset of a series and a table."""

    name = "sensors"
    modalities = {"motion": "series", "facts": "tabular"}  # noqa: RUF012

    def ids(self, split):
        return [f"{split}-{row}" for row in range(9)]

    def read(self, split, modality, rows):
        seed = ["train", "val", "test"].index(split)
        drawn = samples(self.modalities[modality], 9, seed)
        return [drawn[row] for row in rows]

    def fingerprint(self):
        return "sensors"


def test_features_are_computed_with_statistics_of_train(tmp_path):
    """The features stage fits encoders that no pretraining has fitted, on the training samples."""
    backbone = by_kind(Sensors.modalities, series=maker("series"), tabular=maker("tabular"))
    compute_features(LabelFree(Sensors()), backbone, {}, 0, 0, 4, tmp_path, workers=1)
    cache = FeatureCache(tmp_path)
    alone = SignalEncoder("series", width=4, levels=2)
    alone.fit(Sensors().read("train", "motion", range(9)))
    expected = alone.encode(Sensors().read("test", "motion", range(9)), 4)
    assert list(cache.infos) == ["motion.0", "motion.1", "motion.2", "facts.0", "facts.1"]
    np.testing.assert_allclose(cache.array("test", "motion.1")[0], expected["series.1"], atol=2e-3)


def maker(kind):
    return lambda modality: SignalEncoder(kind, modality, width=4, levels=2)


def test_each_modality_gets_an_encoder_of_its_kind():
    modalities = {"a": "series", "b": "text", "c": "series"}
    backbone = by_kind(
        modalities, series=maker("series"), text=lambda modality: TfidfSvd(3, modality=modality)
    )
    assert isinstance(backbone, Backbone)
    backbone.check(modalities)
    assert {name: (type(e), e.modality) for name, e in backbone.encoders.items()} == {
        "a": (SignalEncoder, "a"),
        "b": (TfidfSvd, "b"),
        "c": (SignalEncoder, "c"),
    }
    with pytest.raises(
        InputError, match="no encoder of kind 'video', which the dataset's modality 'clip' is of"
    ):
        by_kind({"clip": "video"}, series=maker("series"))

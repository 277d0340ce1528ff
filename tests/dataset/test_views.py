from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmnas_lab.dataset.views import FeatureViews, ImageViews, TextViews, TokenViews
from mmnas_lab.types import InputError

TEXT = "One two three four. Five six seven! Eight nine ten eleven twelve? Thirteen fourteen fifteen sixteen."


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(width: int = 34, height: int = 50) -> Image.Image:
    ramp = np.linspace(0, 255, width * height).reshape(height, width)
    return Image.fromarray(np.stack([ramp, ramp[::-1], np.full_like(ramp, 90)], axis=-1).astype(np.uint8))


def content(sample) -> bytes:
    return sample.tobytes() if isinstance(sample, Image.Image) else sample.encode()


RAW = [(ImageViews, picture()), (TextViews, TEXT)]


@pytest.mark.parametrize(("family", "sample"), RAW)
def test_views_come_from_the_generator_alone(family, sample):
    torch.manual_seed(1)
    views, generator = family(), seeded(3)
    first = [content(views(sample, generator)) for _ in range(8)]
    after = torch.rand(3)
    torch.manual_seed(2)
    generator = seeded(3)
    assert [content(family()(sample, generator)) for _ in range(8)] == first
    assert len(set(first)) >= 7
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize(("family", "sample"), RAW)
def test_strength_zero_changes_nothing(family, sample):
    assert family(strength=0)(sample, seeded()) is sample


@pytest.mark.parametrize(("family", "sample"), RAW)
@pytest.mark.parametrize("strength", [-0.1, float("nan")])
def test_a_negative_strength_is_refused(family, sample, strength):
    with pytest.raises(InputError, match=rf"{family.__name__} needs strength >= 0, got {strength}"):
        family(strength=strength)


def test_settings_tell_views_apart():
    families = [ImageViews(), ImageViews(0.5), TextViews(), FeatureViews(), FeatureViews(dropout=0.1)]
    assert len({str(family.settings()) for family in families}) == len(families)


@pytest.mark.parametrize("size", [(64, 96), (17, 9), (160, 236)])
@pytest.mark.parametrize("strength", [0.3, 1.0, 8.0])
def test_pictures_keep_size_and_mode(size, strength):
    views, generator = ImageViews(strength), seeded()
    for _ in range(5):
        view = views(picture(*size), generator)
        assert (view.size, view.mode) == (size, "RGB")


def distance(strength: float) -> float:
    views, generator, original = ImageViews(strength), seeded(), np.asarray(picture(), dtype=float)
    return np.mean([np.abs(np.asarray(views(picture(), generator)) - original).mean() for _ in range(40)])


def test_a_stronger_view_of_a_picture_is_further_from_it():
    # A mirrored picture is far away at any strength, so the half that is mirrored counts in all.
    assert distance(0.05) < distance(0.4) < distance(1.0)


def test_views_of_pictures_flip_and_grey_as_often_as_simclr():
    halves = np.zeros((40, 60, 3), dtype=np.uint8)
    halves[:, :30] = (200, 30, 30)
    halves[:, 30:] = (30, 30, 30)
    views, generator = ImageViews(), seeded()
    drawn = [np.asarray(views(Image.fromarray(halves), generator), dtype=float) for _ in range(400)]
    grey = [np.ptp(view, axis=-1).max() <= 2 for view in drawn]
    flipped = [view[:, -5:].mean() > view[:, :5].mean() for view in drawn]
    assert np.mean(grey) == pytest.approx(0.2, abs=0.08)
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("strength", [0.2, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("text", [TEXT, "Alone", "Two words.", "a b c d e f"])
def test_views_of_texts_hold_words_of_the_text_and_at_least_one(text, strength):
    views, generator = TextViews(strength), seeded()
    for _ in range(50):
        words = views(text, generator).split()
        assert words
        assert all(words.count(word) <= text.split().count(word) for word in words)


def test_views_of_texts_drop_about_a_fourth_of_the_words_and_shuffle_half_of_the_texts():
    views, generator = TextViews(), seeded()
    text = " ".join(f"Sentence w{i}a w{i}b w{i}c w{i}d." for i in range(8))
    drawn = [views(text, generator).split() for _ in range(600)]
    # One word in five, after half of the texts lost a span of a tenth of the words on average.
    assert np.mean([len(words) for words in drawn]) == pytest.approx(40 * 0.95 * 0.8, abs=0.7)
    order = {word: i for i, word in enumerate(text.split())}
    positions = [[order[word] for word in words if word != "Sentence"] for words in drawn]
    shuffled = [places != sorted(places) for places in positions]
    assert np.mean(shuffled) == pytest.approx(0.5, abs=0.07)


def test_a_text_without_words_stays():
    assert TextViews()("  ", seeded()) == "  "


def features(batch: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    shapes = {"image.0": (4, 5), "image.1": (2, 7), "text.0": (6, 1), "audio": (3, 2)}
    inputs = {name: torch.rand(batch, *shape, generator=seeded()) + 1 for name, shape in shapes.items()}
    return inputs, {name: name.split(".")[0] for name in inputs}


def test_feature_views_without_rates_are_the_features():
    inputs, modality_of = features()
    views = FeatureViews()(inputs, modality_of, seeded())
    assert list(views) == list(inputs)
    assert all(views[name] is inputs[name] for name in inputs)


@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"noise": 0.2}, {"drop_modality": 1 / 3}])
def test_feature_views_come_from_the_generator_and_leave_the_inputs(rates):
    inputs, modality_of = features(batch=16)
    before = {name: value.clone() for name, value in inputs.items()}
    views = FeatureViews(**rates)
    first, again, other = (views(inputs, modality_of, seeded(seed)) for seed in (0, 0, 1))
    shuffled_names = views(dict(reversed(inputs.items())), modality_of, seeded(0))
    for name in inputs:
        assert torch.equal(inputs[name], before[name])
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], shuffled_names[name])
    assert any(not torch.equal(first[name], other[name]) for name in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_feature_dropout_and_noise_have_the_stated_statistics(dtype):
    inputs, modality_of = {"x": torch.ones(200, 30, 5, dtype=dtype)}, {"x": "image"}
    dropped = FeatureViews(dropout=0.3)(inputs, modality_of, seeded())["x"]
    assert dropped.dtype == dtype
    assert (dropped == 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert dropped[dropped != 0].double().unique().tolist() == pytest.approx([1 / 0.7], abs=1e-3)
    assert not torch.equal(dropped[0], dropped[1])
    noise = FeatureViews(noise=0.5)(inputs, modality_of, seeded())["x"].double() - 1
    assert noise.std().item() == pytest.approx(0.5, abs=0.01)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("rate", [0.1, 1 / 3])
def test_each_sample_loses_at_most_one_whole_modality(rate):
    inputs, modality_of = features(batch=6000)
    views = FeatureViews(drop_modality=rate)(inputs, modality_of, seeded())
    zero = {name: (value == 0).flatten(1) for name, value in views.items()}
    lost = {name: values.all(dim=1) for name, values in zero.items()}
    assert all(torch.equal(values.any(dim=1), lost[name]) for name, values in zero.items())
    assert torch.equal(lost["image.0"], lost["image.1"])
    assert (lost["image.0"].int() + lost["text.0"].int() + lost["audio"].int()).max() == 1
    for name in inputs:
        assert lost[name].double().mean().item() == pytest.approx(rate, abs=0.025)
        assert torch.equal(views[name][~lost[name]], inputs[name][~lost[name]])


def test_a_single_modality_is_never_dropped():
    inputs, modality_of = features(batch=50)
    images = {name: inputs[name] for name in ("image.0", "image.1")}
    views = FeatureViews(drop_modality=0.5)(images, modality_of, seeded())
    assert all(torch.equal(views[name], images[name]) for name in images)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
        ({"noise": -0.1}, "noise >= 0"),
        ({"drop_modality": 0.6}, r"drop_modality in \[0, 0.5\], got 0.6"),
        ({"drop_modality": -0.1}, "drop_modality"),
    ],
)
def test_rates_out_of_range_are_refused(rates, message):
    with pytest.raises(InputError, match=message):
        FeatureViews(**rates)


def test_rates_that_exceed_one_in_sum_are_refused():
    with pytest.raises(
        InputError, match=r"0.4 for each of 3 modalities \(audio, image, text\).* at most 0.333"
    ):
        FeatureViews(drop_modality=0.4)(*features(), seeded())


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 4.0])
def test_tokens_are_left_out_at_their_rate_and_one_stays(strength):
    tokens, views, generator = np.arange(40.0).reshape(20, 2), TokenViews(strength), seeded()
    viewed = [views(tokens, generator) for _ in range(400)]
    for view in viewed:
        assert len(view) >= 1
        assert (np.diff(view[:, 0]) > 0).all()
        assert np.isin(view, tokens).all()
    # A span of 0 to 4 tokens, 2 in the mean, goes with probability 0.5 s; each of the rest with 0.2 s.
    rest = 20 - 2 * min(0.5 * strength, 1)
    expected = max(rest * (1 - min(0.2 * strength, 1)), 1)
    assert np.mean([len(view) for view in viewed]) == pytest.approx(expected, abs=0.6)
    assert [len(views(tokens[:1], generator)) for _ in range(20)] == [1] * 20
    assert views.settings()["strength"] == strength

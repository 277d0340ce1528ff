"""Masks hide exactly as many units as asked, anew for each sample, and units are cut as written."""

import itertools

import pytest
import torch
from reference import masked_reconstruction as reference

from mmnas_lab.objective.masking import (
    Units,
    draw_masks,
    draw_noise,
    masked_count,
    normalised,
    visible_mean,
)
from mmnas_lab.types import InputError

SHAPES = [(3, 4, 6), (2, 6, 2), (5, 4), (5, 1), (3,)]


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_of_an_image_are_ordered_by_row_column_channel(patch, generator):
    images = torch.randn(2, 3, 4, 6, generator=generator)
    units = Units("image", (3, 4, 6), "patch", patch)
    expected = torch.tensor([[[float(v) for v in p] for p in reference.patches(i, patch)] for i in images])
    assert torch.equal(units.split(images), expected)
    assert (units.count, units.size) == expected.shape[1:]


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_runs_of_a_pooled_feature_hold_all_channels(patch, generator):
    features = torch.randn(2, 5, 4, generator=generator)
    units = Units("image.0", (5, 4), "patch", patch)
    expected = torch.tensor([[[float(v) for v in r] for r in reference.runs(f, patch)] for f in features])
    assert torch.equal(units.split(features), expected)


@pytest.mark.parametrize("unit", ["patch", "channel", "input"])
@pytest.mark.parametrize("shape", SHAPES)
def test_units_are_joined_back(shape, unit, generator):
    values = torch.randn(7, *shape, generator=generator)
    units = Units("x", shape, unit, 1)
    split = units.split(values)
    assert split.shape == (7, units.count, units.size)
    assert torch.equal(units.join(split), values)
    mask = torch.zeros(7, units.count, dtype=torch.bool)
    mask[:, 0] = True
    hidden = units.expand(mask)
    assert hidden.shape == values.shape
    assert hidden.sum() == 7 * units.size
    assert sorted(values[0][hidden[0]].tolist()) == sorted(split[0, 0].tolist())


def test_a_unit_can_be_a_channel_or_an_input():
    assert [Units("x", (5, 4), unit, 1).count for unit in ("patch", "channel", "input")] == [4, 5, 1]
    channel = Units("x", (2, 3), "channel", 1).expand(torch.tensor([[False, True]]))
    assert channel.tolist() == [[[False] * 3, [True] * 3]]


@pytest.mark.parametrize(
    ("shape", "patch", "message"),
    [
        ((3, 32, 30), 4, r"patch=4 does not divide 'x' of 32 x 30 positions; choose one of 1, 2$"),
        ((3, 32, 32), 64, r"choose one of 1, 2, 4, 8, 16, 32$"),
        ((5, 16), 3, r"patch=3 does not divide 'x' of 16 positions; choose one of 1, 2, 4, 8, 16$"),
        ((5,), 2, r"patch=2 does not divide 'x' of 1 positions; choose one of 1$"),
        ((5, 16), 0, r"patch must be at least 1, got 0"),
    ],
)
def test_a_patch_that_does_not_divide_is_refused(shape, patch, message):
    with pytest.raises(InputError, match=message):
        Units("x", shape, "patch", patch)


@pytest.mark.parametrize(
    ("ratio", "units", "count"), [(0.9, 50, 45), (0.5, 64, 32), (0.1, 64, 6), (0.3, 5, 2)]
)
def test_the_count_is_rounded(ratio, units, count):
    assert masked_count(ratio, units, "patch") == count
    assert int(50 * (1 - 0.9)) == 4  # what cutting off makes of 5


@pytest.mark.parametrize(
    ("ratio", "units"), [(0, 64), (1, 64), (-0.5, 64), (1.5, 64), (0.01, 4), (0.5, 1), (0.99, 4)]
)
def test_a_ratio_that_hides_none_or_all_is_refused(ratio, units):
    with pytest.raises(InputError, match=rf"mask_ratio={ratio:g} hides \d+ of {units} units \(patch\)"):
        masked_count(ratio, units, "patch")


def test_each_sample_has_a_mask_of_its_own_with_the_exact_count():
    torch.manual_seed(0)
    masks = draw_masks(200, 10, 3, torch.device("cpu"))
    assert masks.dtype == torch.bool
    assert masks.sum(1).tolist() == [3] * 200
    assert len({tuple(mask) for mask in masks.tolist()}) > 80  # of 120
    assert not torch.equal(masks, draw_masks(200, 10, 3, torch.device("cpu")))
    torch.manual_seed(0)
    assert torch.equal(masks, draw_masks(200, 10, 3, torch.device("cpu")))


def test_all_masks_are_equally_likely(generator):
    masks = draw_masks(6000, 4, 2, torch.device("cpu"), generator)
    counts = [0] * 6
    pairs = list(itertools.combinations(range(4), 2))
    for mask in masks:
        counts[pairs.index(tuple(mask.nonzero()[:, 0].tolist()))] += 1
    assert max(abs(count - 1000) for count in counts) < 150  # 5 standard deviations


def test_a_generator_gives_the_same_masks_and_noise():
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert torch.equal(
        draw_masks(5, 8, 4, torch.device("cpu"), first), draw_masks(5, 8, 4, torch.device("cpu"), second)
    )
    inputs = {"a": torch.zeros(400, 5), "b": torch.zeros(4, 3, dtype=torch.float64)}
    noise, again = draw_noise(inputs, first), draw_noise(inputs, second)
    assert all(torch.equal(noise[name], again[name]) for name in inputs)
    assert noise["a"].std().item() == pytest.approx(1, abs=0.1)
    assert {name: (v.shape, v.dtype) for name, v in noise.items()} == {
        name: (v.shape, v.dtype) for name, v in inputs.items()
    }


@pytest.mark.parametrize("shape", [(3, 4, 2), (3, 5), (3,)])
def test_the_visible_mean_is_that_of_a_loop(shape, generator):
    values = torch.randn(4, *shape, generator=generator)
    mask = torch.rand(4, *shape, generator=generator) < 0.6
    mask[0, 1] = True  # a channel of which nothing is visible
    means = visible_mean(values, mask)
    assert means.shape == (4, 3, *[1] * (len(shape) - 1))
    for b in range(4):
        for c in range(3):
            visible = values[b, c][~mask[b, c]]
            expected = visible.mean().item() if visible.numel() else 0.0
            assert means[b, c].item() == pytest.approx(expected, abs=1e-6)


def test_normalised_units_have_mean_0_and_variance_1(generator):
    units = 5 + 3 * torch.randn(2, 4, 6, generator=generator)
    result, mean, std = normalised(units)
    torch.testing.assert_close(result.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.var(-1), torch.ones(2, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(result * std + mean, units)
    assert normalised(torch.ones(1, 1, 4))[0].abs().max() == 0

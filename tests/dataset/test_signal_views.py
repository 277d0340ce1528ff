"""Views of arrays: shapes, randomness from the generator alone, and what a view may change."""

import numpy as np
import pytest
import torch

from mmnas_lab.dataset.signal_views import (
    AudioViews,
    SeriesViews,
    SkeletonViews,
    TabularViews,
    VideoViews,
    turn,
)
from mmnas_lab.types import InputError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(shape, seed=0):
    """Random walks along the first axis, between 0 and 1."""
    values = np.random.default_rng(seed).normal(size=shape).cumsum(axis=0)
    return ((values - values.min()) / np.ptp(values)).astype(np.float32)


def fitted(strength=1.0):
    views = TabularViews(strength)
    views.fit(np.random.default_rng(1).normal(size=(40, 9)).astype(np.float32))
    return views


SAMPLES = {
    AudioViews: smooth((20, 17)).T[None].copy(),
    SeriesViews: smooth((23, 5)),
    SkeletonViews: smooth((19, 7, 3)) - 0.5,
    TabularViews: smooth((9,)),
    fitted: smooth((9,)),
    VideoViews: smooth((11, 12, 13)),
}
FAMILIES = pytest.mark.parametrize(
    ("family", "sample"), SAMPLES.items(), ids=[family.__name__ for family in SAMPLES]
)


@FAMILIES
@pytest.mark.parametrize("strength", [0.2, 1.0, 7.0, 1e4])
def test_views_keep_shape_and_type_and_are_finite(family, sample, strength):
    views, generator, before = family(strength), seeded(), sample.copy()
    for _ in range(20):
        view = views(sample, generator)
        assert (view.shape, view.dtype) == (sample.shape, np.float32)
        assert np.isfinite(view).all()
    assert np.array_equal(sample, before)


@FAMILIES
def test_views_come_from_the_generator_alone(family, sample):
    np.random.seed(1)
    torch.manual_seed(1)
    views, generator = family(), seeded(3)
    first = [views(sample, generator).tobytes() for _ in range(8)]
    after = torch.rand(3)
    np.random.seed(2)
    torch.manual_seed(2)
    generator = seeded(3)
    assert [family()(sample, generator).tobytes() for _ in range(8)] == first
    assert len(set(first)) >= 7
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))


@FAMILIES
def test_strength_zero_changes_nothing(family, sample):
    assert family(0)(sample, seeded()) is sample


@FAMILIES
def test_a_stronger_view_is_further_from_the_sample(family, sample):
    def distance(strength):
        views, generator = family(strength), seeded()
        return np.mean([np.abs(views(sample, generator) - sample).mean() for _ in range(150)])

    assert distance(0.1) < distance(0.4) < distance(1.0) < distance(2.0)


@pytest.mark.parametrize("family", [AudioViews, SeriesViews, SkeletonViews, TabularViews, VideoViews])
@pytest.mark.parametrize("strength", [-0.1, float("nan")])
def test_a_negative_strength_is_refused(family, strength):
    with pytest.raises(InputError, match=rf"{family.__name__} needs strength >= 0, got {strength}"):
        family(strength)


def test_settings_tell_views_apart():
    families = [AudioViews(), SeriesViews(), SkeletonViews(), TabularViews(), VideoViews()]
    families += [AudioViews(0.5), SkeletonViews(vertical=2), VideoViews(flip=True), fitted()]
    assert len({str(family.settings()) for family in families}) == len(families)


@pytest.mark.parametrize(("family", "sample"), [(f, SAMPLES[f]) for f in (AudioViews, VideoViews)])
def test_spectrograms_and_videos_stay_in_their_range(family, sample):
    views, generator = family(3.0), seeded()
    for _ in range(20):
        view = views(sample, generator)
        assert 0 <= view.min() <= view.max() <= 1


def test_spectrograms_are_masked_by_spans_of_times_and_frequencies(monkeypatch):
    ramp = np.arange(20 * 30, dtype=np.float32).reshape(1, 20, 30) / 600
    monkeypatch.setattr(
        "mmnas_lab.dataset.signal_views._Draw.normal", lambda self, *s: np.zeros(s, np.float32)
    )
    views, generator, widths = AudioViews(), seeded(), []
    for _ in range(300):
        masked = views(ramp, generator)[0] == ramp.mean()
        times, frequencies = masked.all(axis=0), masked.all(axis=1)
        assert np.array_equal(masked, times[None] | frequencies[:, None])
        for places in (times, frequencies):
            assert np.abs(np.diff(places.astype(int), prepend=0, append=0)).sum() in (0, 2)
        widths.append((times.sum(), frequencies.sum()))
    assert np.max(widths, axis=0).tolist() == [6, 4]
    assert np.mean(widths, axis=0) == pytest.approx([3, 2], abs=0.3)


def test_a_series_is_read_in_order_and_from_all_of_its_parts():
    times = np.arange(40, dtype=np.float32)[:, None].repeat(2, axis=1)
    times[:, 1] = 5.0  # constant: stays so up to its scale
    views, generator = SeriesViews(), seeded()
    starts, ends, scales = [], [], []
    for _ in range(200):
        view = views(times, generator)
        assert np.ptp(view[:, 1]) < 1e-4
        scales.append(view[0, 1] / 5)
        starts.append(view[:5, 0].mean())
        ends.append(view[-5:, 0].mean())
        assert starts[-1] < ends[-1]
    assert np.std(np.log(scales)) == pytest.approx(0.1, abs=0.02)
    assert min(starts) < 3
    assert max(ends) > 36
    assert max(starts) > 8


@pytest.mark.parametrize("vertical", [0, 1, 2])
def test_a_turned_skeleton_keeps_heights_and_distances(vertical, monkeypatch):
    monkeypatch.setattr(
        "mmnas_lab.dataset.signal_views._Draw.normal", lambda self, *s: np.zeros(s, np.float32)
    )
    still = SAMPLES[SkeletonViews][:1].repeat(6, axis=0)  # no motion: time does not matter
    views, generator, angles = SkeletonViews(vertical=vertical), seeded(), []
    for _ in range(100):
        view = views(still, generator)
        assert view[..., vertical] == pytest.approx(still[..., vertical], abs=1e-5)
        assert np.linalg.norm(view, axis=-1) == pytest.approx(np.linalg.norm(still, axis=-1), abs=1e-5)
        plane = [axis for axis in range(3) if axis != vertical]
        a, b = (s[0, 0, plane[0]] + 1j * s[0, 0, plane[1]] for s in (still, view))
        angles.append(np.degrees(np.angle(b / a)))
    assert np.abs(angles).max() <= 30.001
    assert min(angles) < -20
    assert max(angles) > 20


def test_turns_are_rotations():
    for axis in range(3):
        matrix = turn(0.7, axis)
        assert matrix @ matrix.T == pytest.approx(np.eye(3), abs=1e-6)
        assert np.linalg.det(matrix) == pytest.approx(1)
    assert turn(np.pi / 2, 2) @ np.array([1, 0, 0]) == pytest.approx([0, 1, 0], abs=1e-6)


def test_another_axis_is_refused():
    with pytest.raises(InputError, match="vertical to be 0, 1 or 2, got 3"):
        SkeletonViews(vertical=3)


def test_features_are_replaced_by_those_of_other_samples():
    reference = np.arange(40 * 9, dtype=np.float32).reshape(40, 9) + 1000
    views, generator, sample = TabularViews(), seeded(), SAMPLES[TabularViews]
    views.fit(list(reference))
    changed, columns = [], [set() for _ in range(9)]
    for _ in range(600):
        view = views(sample, generator)
        replaced = view >= 1000
        assert np.array_equal(view[~replaced], sample[~replaced])
        for column in np.flatnonzero(replaced):
            assert view[column] in reference[:, column]
            columns[column].add(view[column])
        changed.append(replaced.mean())
    assert np.mean(changed) == pytest.approx(0.3, abs=0.03)
    assert min(len(seen) for seen in columns) > 35
    with pytest.raises(InputError, match=r"fit needs at least one sample"):
        views.fit([])


def test_unfitted_views_mask_features():
    views, generator, sample = TabularViews(), seeded(), SAMPLES[TabularViews] + 1
    drawn = np.stack([views(sample, generator) for _ in range(600)])
    assert (drawn == 0).mean() == pytest.approx(0.3, abs=0.03)
    assert (drawn - sample)[drawn != 0].std() == pytest.approx(0.1, abs=0.01)


def test_videos_are_mirrored_only_when_asked_for():
    halves = np.zeros((6, 10, 20), np.float32)
    halves[..., :10] = 0.9

    def mirrored(flip):
        views, generator = VideoViews(flip=flip), seeded()
        drawn = [views(halves, generator) for _ in range(200)]
        return np.mean([view[..., -3:].mean() > view[..., :3].mean() for view in drawn])

    assert mirrored(False) == 0
    assert mirrored(True) == pytest.approx(0.5, abs=0.1)

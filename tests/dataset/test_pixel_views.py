"""Batched views of pictures against torchvision's, picture by picture."""

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from mmnas_lab.dataset import pixel_views
from mmnas_lab.dataset.pixel_views import PixelViews
from mmnas_lab.types import InputError

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (40, 3, 12, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def draw(views, images, seed=0, second=False):
    return views(images, MEAN, STD, torch.Generator().manual_seed(seed), second)


def plain(images):
    return (images.float() / 255 - MEAN[:, None, None]) / STD[:, None, None]


def test_without_settings_pictures_are_normalised_only(images):
    assert torch.equal(draw(PixelViews(), images), plain(images))


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("brightness", reference.adjust_brightness),
        ("contrast", reference.adjust_contrast),
        ("saturation", reference.adjust_saturation),
    ],
)
def test_colours_change_as_in_torchvision(images, name, same):
    pixels = images.float() / 255
    factors = torch.linspace(0.2, 1.8, len(images))
    changed = getattr(pixel_views, name)(pixels, factors)
    expected = torch.stack([same(one, float(f)) for one, f in zip(pixels, factors, strict=True)])
    torch.testing.assert_close(changed, expected, atol=1e-3, rtol=0)  # torchvision rounds the grey weights


def test_hues_turn_as_in_torchvision(images):
    pixels = images.float() / 255
    pixels[:, :, 0] = pixels[:, :1, 0]  # greys have no hue
    shifts = torch.linspace(-0.5, 0.5, len(images))
    expected = torch.stack(
        [reference.adjust_hue(one, float(s)) for one, s in zip(pixels, shifts, strict=True)]
    )
    torch.testing.assert_close(pixel_views.hue(pixels, shifts), expected, atol=1e-5, rtol=0)


def test_crop_and_flip_are_windows_of_the_padded_picture(images):
    views = plain_undo(draw(PixelViews(crop_padding=2, flip=True), images))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    found = []
    for view, source in zip(views, padded, strict=True):
        windows = {
            (top, left, mirrored): window.flip(2) if mirrored else window
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for window in [source[:, top : top + 12, left : left + 10]]
        }
        places = [place for place, window in windows.items() if torch.equal(window, view)]
        assert places
        found.append(places[0])
    assert len({top for top, *_ in found}) == len({left for _, left, _ in found}) == 5
    assert 8 <= sum(mirrored for *_, mirrored in found) <= 32


def plain_undo(normalised):
    return ((normalised * STD[:, None, None] + MEAN[:, None, None]) * 255).round().to(torch.uint8)


def test_cutout_sets_one_square_to_the_mean(images):
    cut = draw(PixelViews(cutout=4), images)
    same = (cut == plain(images)).all(1)
    corners = set()
    for sample in range(len(images)):
        rows = (~same[sample]).any(1).nonzero()[:, 0]
        columns = (~same[sample]).any(0).nonzero()[:, 0]
        assert torch.equal(rows, torch.arange(int(rows[0]), int(rows[-1]) + 1))
        assert torch.equal(columns, torch.arange(int(columns[0]), int(columns[-1]) + 1))
        assert 2 <= len(rows) <= 4
        assert 2 <= len(columns) <= 4
        assert cut[sample][:, rows[:, None], columns].eq(0).all()
        corners.add((int(rows[0]), int(columns[0])))
    assert len(corners) > 10


def test_only_the_second_view_is_solarised(images):
    views = PixelViews(solarise=1.0)
    assert torch.equal(draw(views, images), plain(images))
    pixels = images.float() / 255
    expected = torch.where(pixels < 0.5, pixels, 1 - pixels)
    torch.testing.assert_close(
        draw(views, images, second=True), (expected - MEAN[:, None, None]) / STD[:, None, None]
    )


def test_a_resized_crop_of_a_flat_picture_is_flat_and_of_a_ramp_a_gentler_ramp():
    flat = torch.full((8, 3, 16, 16), 100, dtype=torch.uint8)
    torch.testing.assert_close(draw(PixelViews(least_area=0.2), flat), plain(flat))
    ramp = (torch.arange(16) * 16).to(torch.uint8).expand(64, 3, 16, 16)
    steps = draw(PixelViews(least_area=0.2), ramp).diff(dim=3)[:, 0, 8, 4:12].mean(1)
    assert steps.min() > 0
    assert steps.max() <= plain(ramp).diff(dim=3)[:, 0, 8, 4:12].mean() + 1e-5
    assert steps.std() > 0.05 * steps.mean()


def test_samples_do_not_share_their_draws_and_seeds_repeat(images):
    views = PixelViews(crop_padding=2, flip=True, jitter=0.5, grey=0.2, cutout=4)
    same = images[:1].expand(40, -1, -1, -1)
    viewed = draw(views, same)
    assert len({tuple(view.flatten().tolist()) for view in viewed}) > 35
    assert torch.equal(viewed, draw(views, same))
    assert not torch.equal(viewed, draw(views, same, seed=1))


def test_greys_are_drawn_at_their_rate():
    images = torch.randint(0, 256, (4000, 3, 2, 2), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    viewed = draw(PixelViews(grey=0.2), images) * STD[:, None, None] + MEAN[:, None, None]
    grey = (viewed.amax(1) - viewed.amin(1)).flatten(1).amax(1) < 1e-5
    assert float(grey.float().mean()) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("settings", [{"jitter": -1}, {"grey": 1.5}, {"crop_padding": -1}, {"least_area": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        PixelViews(**settings)


def test_grey_pictures_have_views_that_colours_do_not_change():
    images = torch.randint(256, (5, 1, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.4]), torch.tensor([0.2])

    def viewed(images, mean, std, **settings):
        return PixelViews(**settings)(images, mean, std, torch.Generator().manual_seed(1), second=True)

    geometry = {"crop_padding": 2, "flip": True, "least_area": 0.5, "cutout": 3, "solarise": 0.5}
    for settings in (geometry, {"jitter": 0.5}, {"grey": 0.5}, {**geometry, "jitter": 0.5, "grey": 0.5}):
        view = viewed(images, mean, std, **settings)
        coloured = viewed(images.expand(-1, 3, -1, -1), mean.expand(3), std.expand(3), **settings)
        torch.testing.assert_close(view.expand(-1, 3, -1, -1), coloured, atol=1e-5, rtol=0)

"""Pictures as inputs: decoded once, standardised by training statistics, kept on the device."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmnas_lab.backbone.pixels import PixelCache, Pixels, PixelSource
from mmnas_lab.dataset.base import LabelFree
from mmnas_lab.dataset.images import ImageFolder
from mmnas_lab.dataset.pixel_views import PixelViews
from mmnas_lab.types import InputError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(30):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                tmp_path / name / f"{k:02d}.png"
            )
    return tmp_path


@pytest.fixture
def cache(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("pixels")
    Pixels().write(LabelFree(ImageFolder(str(folder))), out)
    return PixelCache(out)


def pictures(folder, split):
    dataset = ImageFolder(str(folder))
    dataset.open()
    read = dataset.read(split, "image", range(len(dataset.ids(split))))
    return torch.from_numpy(np.stack([np.asarray(image) for image in read])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_clean_batches_are_the_standardised_pictures(folder, cache, memory):
    train = pictures(folder, "train").double() / 255
    mean, std = train.mean((0, 2, 3)), train.std((0, 2, 3), correction=0)
    for split in ("train", "val", "test"):
        source = PixelSource(cache, split, in_memory_bytes=memory)
        index = torch.arange(len(source)).flip(0)
        expected = (pictures(folder, split).double() / 255 - mean[:, None, None]) / std[:, None, None]
        (view,) = source.clean(index).views
        torch.testing.assert_close(view["image"].double(), expected.flip(0), atol=1e-5, rtol=0)


def test_rows_and_labels_go_together(folder, cache):
    dataset = ImageFolder(str(folder))
    labels, rows = dataset.labels("train"), torch.tensor([5, 2, 9])
    source = PixelSource(cache, "train", rows, labels)
    batch = source.clean(torch.tensor([2, 0]))
    assert batch.labels.tolist() == labels[[9, 5]].tolist()
    whole = PixelSource(cache, "train").clean(torch.tensor([9, 5]))
    assert torch.equal(batch.views[0]["image"], whole.views[0]["image"])
    assert whole.labels is None


def test_pairs_differ_and_are_functions_of_the_generator(cache):
    source = PixelSource(cache, "train", views=PixelViews(crop_padding=2, flip=True))
    index = torch.arange(16)
    first, again = (source.views(index, torch.Generator().manual_seed(3), 2) for _ in range(2))
    for a, b in zip(first.views, again.views, strict=True):
        assert torch.equal(a["image"], b["image"])
    assert not torch.equal(first.views[0]["image"], first.views[1]["image"])


def test_mixed_batches_hold_clean_pictures_at_their_share(cache):
    source = PixelSource(cache, "train", views=PixelViews(cutout=4))
    index = torch.arange(len(source)).repeat(20)
    clean = source.clean(index).views[0]["image"]
    for probability in (0.0, 0.5, 1.0):
        mixed = source.mixed(index, torch.Generator().manual_seed(0), probability).views[0]["image"]
        same = (mixed == clean).flatten(1).all(1)
        assert float(same.float().mean()) == pytest.approx(probability, abs=0.06)


def test_pictures_are_brought_to_one_size(folder, tmp_path_factory):
    Image.new("RGB", (20, 10), (9, 8, 7)).save(folder / "a" / "00.png")
    dataset = LabelFree(ImageFolder(str(folder)))
    with pytest.raises(InputError, match=r"20 x 10, the first one 8 x 8; set backbone.size|8 x 8, the first"):
        Pixels().write(dataset, tmp_path_factory.mktemp("out"))
    out = tmp_path_factory.mktemp("sized")
    Pixels(size=6).write(dataset, out)
    assert PixelCache(out).infos["image"].shape == (3, 6, 6)


def test_unfinished_folders_and_wrong_labels_are_refused(cache, tmp_path):
    with pytest.raises(InputError, match="features stage"):
        PixelCache(tmp_path)
    with pytest.raises(InputError, match="got labels of 2"):
        PixelSource(cache, "train", labels=torch.zeros(2, dtype=torch.long))


def test_data_of_other_modalities_is_refused():
    with pytest.raises(InputError, match="pictures alone"):
        Pixels().check({"image": "image", "text": "text"})

"""Datasets of pictures with one class each: the ways they lie on disk, splits, and what is refused."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmnas_lab.dataset.base import LabelFree
from mmnas_lab.dataset.images import CIFAR, ImageFolder, held_out
from mmnas_lab.types import InputError


def picture(rng, size=(8, 8)):
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path, rng):
    for name in ("cat", "dog", "newt"):
        (tmp_path / name).mkdir()
        for k in range(20):
            picture(rng).save(tmp_path / name / f"{k:02d}.png")
    return tmp_path


def pickled_cifar(folder, rng, num_classes):
    archive = folder / ("cifar-10-batches-py" if num_classes == 10 else "cifar-100-python")
    archive.mkdir()
    data = rng.integers(0, 256, (60, 3072), dtype=np.uint8)
    labels = rng.integers(0, num_classes, 60).tolist()
    names = [f"class {k}" for k in range(num_classes)]

    def dump(name, content):
        (archive / name).write_bytes(pickle.dumps(content))

    if num_classes == 10:
        for k in range(5):
            rows = slice(10 * k, 10 * k + 10)
            dump(f"data_batch_{k + 1}", {b"data": data[rows], b"labels": labels[rows]})
        dump("test_batch", {b"data": data[50:], b"labels": labels[50:]})
        dump("batches.meta", {b"label_names": [name.encode() for name in names]})
    else:
        dump("train", {b"data": data[:50], b"fine_labels": labels[:50]})
        dump("test", {b"data": data[50:], b"fine_labels": labels[50:]})
        dump("meta", {b"fine_label_names": [name.encode() for name in names]})
    return data, labels


@pytest.mark.parametrize("num_classes", [10, 100])
def test_the_python_archive_gives_pictures_and_labels(tmp_path, rng, num_classes):
    data, labels = pickled_cifar(tmp_path, rng, num_classes)
    dataset = CIFAR(str(tmp_path), num_classes, val_share=0.0)
    dataset.open()
    assert [len(dataset.ids(split)) for split in ("train", "val", "test")] == [50, 0, 10]
    assert dataset.labels("train").tolist() == labels[:50]
    assert dataset.labels("test").tolist() == labels[50:]
    assert dataset.classes == tuple(f"class {k}" for k in range(num_classes))
    (image,) = dataset.read("test", "image", [3])
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1).reshape(-1), data[53])


def test_a_pickle_that_names_a_function_is_refused_and_not_run(tmp_path, rng):
    pickled_cifar(tmp_path, rng, 10)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(InputError, match=r"data_batch_3.*not an array"):
        CIFAR(str(tmp_path)).open()
    assert not (tmp_path / "ran").exists()


def write_parquet(path, images, labels, names=None, column="image"):
    table = pa.table({column: [{"bytes": png(image), "path": "x"} for image in images], "label": labels})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path)


def test_parquet_files_give_pictures_labels_and_class_names(tmp_path, rng):
    images, labels = [picture(rng) for _ in range(30)], [k % 10 for k in range(30)]
    names = list("abcdefghij")
    write_parquet(tmp_path / "train-0.parquet", images[:10], labels[:10], names)
    write_parquet(tmp_path / "train-1.parquet", images[10:20], labels[10:20], names)
    write_parquet(tmp_path / "test-0.parquet", images[20:], labels[20:], names, column="img")
    dataset = CIFAR(str(tmp_path), val_share=0.25)
    assert [len(dataset.ids(split)) for split in ("train", "val", "test")] == [15, 5, 10]
    assert dataset.classes == tuple(names)
    assert not set(dataset.ids("train")) & set(dataset.ids("val"))
    for split in ("train", "val"):
        for identity, label in zip(dataset.ids(split), dataset.labels(split).tolist(), strict=True):
            assert labels[int(identity.split("-")[1])] == label
    row = int(dataset.ids("val")[0].split("-")[1])
    assert np.array_equal(np.asarray(dataset.read("val", "image", [0])[0]), np.asarray(images[row]))


def test_a_folder_of_classes_is_split_by_identity_alone(folder, rng):
    dataset = ImageFolder(str(folder), val_share=0.2, test_share=0.1)
    dataset.open()
    assert [len(dataset.ids(split)) for split in ("train", "val", "test")] == [43, 11, 6]
    assert dataset.classes == ("cat", "dog", "newt")
    every = {s: dict(zip(dataset.ids(s), dataset.labels(s).tolist(), strict=True)) for s in ("train", "val")}
    for split in every.values():
        for identity, label in split.items():
            assert identity.startswith(dataset.classes[label])
    (folder / "newt").rename(folder / "axolotl")
    renamed = ImageFolder(str(folder), val_share=0.2, test_share=0.1)
    assert {i for i in renamed.ids("val") if "axolotl" not in i} <= set(dataset.ids("val")) | set(
        dataset.ids("train")
    )


def test_folders_train_and_val_are_train_and_test(tmp_path, rng):
    for split, count in (("train", 10), ("val", 4)):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(count):
                picture(rng).save(tmp_path / split / name / f"{k}.jpg")
    dataset = ImageFolder(str(tmp_path), val_share=0.1)
    assert [len(dataset.ids(split)) for split in ("train", "val", "test")] == [18, 2, 8]
    assert all(identity.startswith("val/") for identity in dataset.ids("test"))


def test_held_out_rows_do_not_depend_on_the_order():
    ids = [f"picture {k}" for k in range(50)]
    taken = {ids[k] for k in held_out(ids, 0.2, "val")}
    assert len(taken) == 10
    assert {ids[::-1][k] for k in held_out(ids[::-1], 0.2, "val")} == taken
    assert {ids[k] for k in held_out(ids, 0.2, "test")} != taken


def test_without_labels_nothing_of_the_classes_is_told(folder):
    unlabelled = LabelFree(ImageFolder(str(folder)))
    for name in ("labels", "classes", "label_fingerprint"):
        with pytest.raises(InputError, match="label-free"):
            getattr(unlabelled, name)


def test_fingerprints_see_pictures_and_labels(folder, rng):
    before = ImageFolder(str(folder)).fingerprint(), ImageFolder(str(folder)).label_fingerprint()
    assert (ImageFolder(str(folder)).fingerprint(), ImageFolder(str(folder)).label_fingerprint()) == before
    picture(rng, (9, 9)).save(folder / "cat" / "00.png")
    assert ImageFolder(str(folder)).fingerprint() != before[0]


def test_unreadable_pictures_are_listed_and_can_be_dropped(folder):
    (folder / "dog" / "07.png").write_bytes(b"not a picture")
    dataset = ImageFolder(str(folder), val_share=0.0, test_share=0.0)
    bad = dataset.unreadable("train")
    (row,) = bad
    assert dataset.ids("train")[row] == "dog/07.png"
    assert "dog/07.png" in bad[row]
    dataset.drop({"train": [row]})
    assert len(dataset.ids("train")) == len(dataset.labels("train")) == 59
    assert dataset.unreadable("train") == {}


def test_grey_pictures_are_read_in_colour(folder):
    Image.new("L", (8, 8), 7).save(folder / "cat" / "00.png")
    dataset = ImageFolder(str(folder), val_share=0.0, test_share=0.0)
    (image,) = dataset.read("train", "image", [dataset.ids("train").index("cat/00.png")])
    assert np.asarray(image).shape == (8, 8, 3)


def one_class(folder):
    for name in ("dog", "newt"):
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()


def bad_label(folder):
    rng = np.random.default_rng(0)
    write_parquet(folder / "train.parquet", [picture(rng)], [10])
    write_parquet(folder / "test.parquet", [picture(rng)], [0])


@pytest.mark.parametrize(
    ("make", "spoil", "message"),
    [
        (lambda f: ImageFolder(str(f)), one_class, "at least two classes"),
        (lambda f: ImageFolder(str(f / "nowhere")), lambda f: None, "does not exist"),
        (lambda f: CIFAR(str(f)), lambda f: None, "prepare_cifar.py"),
        (lambda f: CIFAR(str(f)), bad_label, r"label 10 .* not in \[0, 10\)"),
        (lambda f: CIFAR(str(f), num_classes=20), lambda f: None, "10 or 100"),
        (lambda f: ImageFolder(str(f), val_share=1.0), lambda f: None, "val_share must be in"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_remedy(folder, make, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        make(folder).labels("train")

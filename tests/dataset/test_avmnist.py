"""AV-MNIST: pairs of one digit, recordings that no two splits share, and what is refused."""

import gzip
import io
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shared_data
from scipy.io import wavfile

from mmnas_lab.dataset.avmnist import AVMNIST
from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.dataset.spectrogram import averaged
from mmnas_lab.types import InputError

SPEAKERS = ("ann", "bob", "cleo")
SMALL = {"num_train": 60, "num_val": 20, "num_test": 25, "frequencies": 16, "frames": 12}


def wav(digit, rng, rate=8000):
    """A tone whose height is the digit."""
    seconds = np.arange(int(rng.integers(1200, 5000))) / rate
    values = np.sin(2 * np.pi * (300 + 300 * digit) * seconds) + 0.01 * rng.normal(size=len(seconds))
    stream = io.BytesIO()
    wavfile.write(stream, rate, (20000 * values / np.abs(values).max()).astype(np.int16))
    return stream.getvalue()


def idx(array):
    head = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def write_mnist(folder, rng, train=80, test=25):
    folder.mkdir()
    for file, count in (("train", train), ("t10k", test)):
        digits = rng.permutation(np.arange(count) % 10)
        pixels = rng.integers(0, 40, (count, 28, 28)) + 15 * digits[:, None, None]
        (folder / f"{file}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{file}-labels-idx1-ubyte").write_bytes(idx(digits))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("avmnist")
    write_mnist(folder / "mnist", rng)
    (folder / "fsdd" / "recordings").mkdir(parents=True)
    for digit in range(10):
        for speaker in SPEAKERS:
            for index in (0, 4, 5, 9, 10, 17):
                file = folder / "fsdd" / "recordings" / f"{digit}_{speaker}_{index}.wav"
                file.write_bytes(wav(digit, rng))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "avmnist")


def pairs(dataset, split):
    return dataset.records(split)


def check_pairs(dataset, split_of):
    """Every pair is of one digit, of its label; no recording is in two splits."""
    clips = {}
    for split in SPLITS:
        records = dataset.records(split)
        assert [pair.clip.digit for pair in records] == dataset.labels(split).tolist()
        clips[split] = {pair.clip.name for pair in records}
        assert {split_of(pair.clip) for pair in records} == {split}
    assert not clips["train"] & clips["val"]
    assert not (clips["train"] | clips["val"]) & clips["test"]


def by_index(clip):
    return "test" if clip.index < 5 else "val" if clip.index < 10 else "train"


def test_pairs_agree_and_splits_share_no_recording(folder):
    dataset = AVMNIST(str(folder), **SMALL)
    check_pairs(dataset, by_index)
    assert [len(dataset.ids(split)) for split in SPLITS] == [60, 20, 25]
    assert dataset.ids("val")[0] == "train-00060"
    assert not {split: dataset.unreadable(split) for split in SPLITS if dataset.unreadable(split)}


def test_speakers_are_disjoint_when_asked_for(folder):
    dataset = AVMNIST(str(folder), disjoint="speakers", **SMALL)
    check_pairs(dataset, lambda clip: {"ann": "train", "bob": "val", "cleo": "test"}[clip.speaker])


def test_samples_have_their_shapes_and_hold_the_digit(folder):
    dataset = AVMNIST(str(folder), degraded=False, **SMALL)
    (image,), (audio,) = dataset.read("train", "image", [3]), dataset.read("train", "audio", [3])
    assert (image.mode, image.size) == ("L", (28, 28))
    assert np.array_equal(np.asarray(image), pairs(dataset, "train")[3].pixels)
    assert (audio.shape, audio.dtype) == ((1, 16, 12), np.float32)
    heights = [sound[0].mean(1).argmax() for sound in dataset.read("test", "audio", range(25))]
    expected = [(300 + 300 * digit) / 4000 * 15 for digit in dataset.labels("test").tolist()]
    assert heights == pytest.approx(expected, abs=1)


def test_degraded_pictures_are_their_principal_components(folder):
    dataset = AVMNIST(str(folder), components=3, **SMALL)
    train = np.stack([pair.pixels.reshape(-1) for pair in pairs(dataset, "train")]).astype(np.float64)
    centred = train - train.mean(0)
    components = np.linalg.svd(centred, full_matrices=False)[2][:3]
    test = np.stack([pair.pixels.reshape(-1) for pair in pairs(dataset, "test")])
    expected = train.mean(0) + (test - train.mean(0)) @ components.T @ components
    found = np.stack([np.asarray(image).reshape(-1) for image in dataset.read("test", "image", range(25))])
    assert np.abs(found - expected.clip(0, 255)).max() <= 0.51


def test_noise_differs_between_pairs_of_one_recording_and_stays(folder):
    dataset = AVMNIST(str(folder), **SMALL)
    names = [pair.clip.name for pair in pairs(dataset, "train")]
    first = next(k for k, name in enumerate(names) if names.count(name) > 1)
    second = names.index(names[first], first + 1)
    one, two = dataset.read("train", "audio", [first, second])
    assert not np.array_equal(one, two)
    assert np.array_equal(AVMNIST(str(folder), **SMALL).read("train", "audio", [second])[0], two)
    assert 0 <= one.min() < one.max() == 1


def test_noise_is_averaged_along_with_the_recording(folder):
    fine = AVMNIST(str(folder), **SMALL).read("val", "audio", [4])[0]
    coarse = AVMNIST(str(folder), average=4, **SMALL).read("val", "audio", [4])[0]
    assert np.array_equal(coarse[0], averaged(fine[0], 4))
    assert coarse.shape == (1, 4, 3)


def test_a_smaller_dataset_begins_with_the_rows_of_a_larger(folder):
    larger = AVMNIST(str(folder), **SMALL)
    smaller = AVMNIST(str(folder), **SMALL | {"num_train": 30})
    names = [[pair.clip.name for pair in pairs(d, "train")] for d in (larger, smaller)]
    assert names[0][:30] == names[1]


def test_the_fingerprint_follows_inputs_and_settings(folder):
    dataset = AVMNIST(str(folder), **SMALL)
    first = dataset.fingerprint()
    assert AVMNIST(str(folder), **SMALL).fingerprint() == first
    assert AVMNIST(str(folder), degraded=False, **SMALL).fingerprint() != first
    assert AVMNIST(str(folder), seed=1, **SMALL).fingerprint() != first
    assert AVMNIST(str(folder), average=4, **SMALL).fingerprint() != first
    pairs(dataset, "train")[0].clip.content.write_bytes(wav(3, np.random.default_rng(5)))
    assert AVMNIST(str(folder), **SMALL).fingerprint() != first


def test_parquet_recordings_give_the_same_pairs(folder, tmp_path):
    rows = []
    for file in sorted((folder / "fsdd").rglob("*.wav")):
        digit, speaker, index = file.stem.split("_")
        audio = {"bytes": file.read_bytes(), "path": file.name}
        rows.append({"audio": audio, "digit": int(digit), "speaker": speaker, "index": int(index)})
    packed = tmp_path / "packed"
    shutil.copytree(folder / "mnist", packed / "mnist")
    (packed / "fsdd").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), packed / "fsdd" / "train.parquet")
    assert AVMNIST(str(packed), **SMALL).fingerprint() == AVMNIST(str(folder), **SMALL).fingerprint()
    pq.write_table(pa.table({"audio": [r["audio"] for r in rows]}), packed / "fsdd" / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet' has no column 'digit'"):
        AVMNIST(str(packed), **SMALL).open()


def test_pairs_of_a_bad_recording_are_reported_and_dropped(folder):
    dataset = AVMNIST(str(folder), **SMALL)
    victim = pairs(dataset, "train")[5].clip
    stream = io.BytesIO()
    wavfile.write(stream, 8000, np.zeros(0, np.int16))
    victim.content.write_bytes(stream.getvalue())
    dataset = AVMNIST(str(folder), on_bad_sample="skip", **SMALL)
    bad = dataset.unreadable("train")
    rows = [row for row, pair in enumerate(pairs(dataset, "train")) if pair.clip.name == victim.name]
    assert sorted(bad) == rows
    assert f"'{victim.name}' has no samples" in bad[5]
    before = dataset.ids("train")
    picture = np.asarray(dataset.read("train", "image", [6])[0])
    dataset.drop({"train": rows})
    assert dataset.ids("train") == [name for row, name in enumerate(before) if row not in rows]
    row = dataset.ids("train").index(before[next(r for r in range(6, 60) if r not in rows)])
    assert len(dataset.labels("train")) == 60 - len(rows)
    assert not dataset.unreadable("train")
    if 6 not in rows:
        assert np.array_equal(np.asarray(dataset.read("train", "image", [row])[0]), picture)


def remove_clips(folder):
    for file in (folder / "fsdd" / "recordings").glob("7_*_5.wav"):
        file.unlink()
    for file in (folder / "fsdd" / "recordings").glob("7_*_9.wav"):
        file.unlink()


def cut_pictures(folder):
    file = folder / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-5]))


def break_archive(folder):
    file = folder / "mnist" / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_clips, r"no recording of the digit 7 for the val split \(index 5 to 9\)"),
        (cut_pictures, r"train-images-idx3-ubyte\.gz' is not an idx file of 3 dimensions, or is cut off"),
        (break_archive, r"cannot unpack '.*train-images-idx3-ubyte\.gz'"),
        (lambda f: (f / "mnist" / "t10k-labels-idx1-ubyte").unlink(), r"needs '.*t10k-labels.*prepare_avm"),
        (
            lambda f: (f / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(25))),
            r"25 pictures and 25 labels up to 24",
        ),
        (lambda f: shutil.rmtree(f / "fsdd"), r"AVMNIST needs recordings .*prepare_avmnist\.py"),
    ],
)
def test_bad_files_are_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(InputError, match=message):
        AVMNIST(str(folder), **SMALL).open()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_train": 70}, r"80, but 90 are asked for; lower dataset\.num_train and dataset\.num_val"),
        ({"components": 0}, r"dataset\.components must be in \[1, 784\], got 0"),
        ({"average": 5}, r"average=5 must divide dataset\.frequencies=16 and dataset\.frames=12"),
        ({"average": 0}, r"dataset\.average must be in \[1, 64\], got 0"),
        ({"disjoint": "takes"}, r"dataset\.disjoint must be clips or speakers, got 'takes'"),
        ({"on_bad_sample": "stay"}, r"dataset\.on_bad_sample must be stop or skip"),
    ],
)
def test_bad_settings_are_named(folder, settings, message):
    with pytest.raises(InputError, match=message):
        AVMNIST(str(folder), **{**SMALL, **settings}).open()


@shared_data.needs("mnist", "fsdd")
@pytest.mark.parametrize("disjoint", ["clips", "speakers"])
def test_the_real_recordings_and_digits_pair_up(disjoint):
    dataset = AVMNIST(str(shared_data.FOLDER), disjoint=disjoint)
    assert [len(dataset.ids(split)) for split in SPLITS] == [55_000, 5_000, 10_000]
    last = {"theo": "val", "yweweler": "test"}
    check_pairs(dataset, by_index if disjoint == "clips" else lambda c: last.get(c.speaker, "train"))


@shared_data.needs("mnist", "fsdd")
def test_real_pictures_are_degraded_to_about_the_published_level():
    from sklearn.neighbors import KNeighborsClassifier

    dataset = AVMNIST(str(shared_data.FOLDER), num_train=3000, num_val=300, num_test=1000)

    def data(split):
        images = dataset.read(split, "image", range(len(dataset.ids(split))))
        return np.stack([np.asarray(image).reshape(-1) for image in images]), dataset.labels(split).numpy()

    accuracy = KNeighborsClassifier(15).fit(*data("train")).score(*data("test"))
    assert 0.5 < accuracy < 0.7  # 0.65 with all rows

"""MIMIC-III on generated arrays: MultiBench's split and labels, its pickle, and what is refused."""

import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import prepare_mimic3

from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.dataset.mimic3 import MIMIC3
from mmnas_lab.types import InputError

COUNT = 47


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    made = {
        "ep_tdata": rng.normal(3.0, 2.0, (COUNT, 24, 12)),
        "adm_features_all": rng.normal(size=(COUNT, 5)),
        "adm_labels_all": np.sort(rng.integers(0, 2, (COUNT, 6)), axis=1).astype(float),
        "y_icd9": rng.integers(0, 2, (COUNT, 20)).astype(float),
    }
    made["ep_tdata"][3, 4, 5] = np.nan
    made["ep_tdata"][3, 4, 6] = np.inf
    made["adm_features_all"][:, 4] = 1.0
    return made


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / "mimic3.npz", **arrays())
    return tmp_path / "mimic3.npz"


def samples(dataset, split, modality):
    return np.stack(dataset.read(split, modality, range(len(dataset.ids(split)))))


def multibench():
    """(series, descriptors, class) of each split in MultiBench's order, as its loader makes them."""
    made = arrays()
    rows = []
    for row in range(COUNT):
        label = 0
        for column in range(1, 6):
            if made["adm_labels_all"][row][column] > 0:
                label = column
                break
        rows.append((row, label))
    random.seed(10)
    random.shuffle(rows)
    return {"val": rows[: COUNT // 10], "test": rows[COUNT // 10 : COUNT // 5], "train": rows[COUNT // 5 :]}


def test_splits_and_classes_are_multibenchs(file):
    dataset = MIMIC3(str(file))
    for split, rows in multibench().items():
        assert [int(name.split("-")[1]) for name in dataset.ids(split)] == [row for row, _ in rows]
        assert dataset.labels(split).tolist() == [label for _, label in rows]
    assert len(dataset.classes) == 6
    diagnoses = MIMIC3(str(file), target="icd9", icd9_group=4)
    expected = [int(arrays()["y_icd9"][row, 4]) for row, _ in multibench()["test"]]
    assert diagnoses.labels("test").tolist() == expected
    assert len(diagnoses.classes) == 2
    assert diagnoses.fingerprint() == dataset.fingerprint()


@pytest.mark.parametrize("statistics", ["train", "all"])
def test_features_are_standardised_by_the_rows_that_are_asked_for(file, statistics):
    dataset = MIMIC3(str(file), statistics=statistics)
    made, order = arrays(), multibench()
    series = np.nan_to_num(made["ep_tdata"], nan=0.0, posinf=0.0)
    used = [row for split in (SPLITS if statistics == "all" else ["train"]) for row, _ in order[split]]
    mean, std = series[used].mean((0, 1)), series[used].std((0, 1))
    ages = made["adm_features_all"][:, 0]
    for split in SPLITS:
        rows = [row for row, _ in order[split]]
        found = samples(dataset, split, "series")
        assert found.dtype == np.float32
        assert found == pytest.approx((series[rows] - mean) / std, abs=1e-5)
        tabular = samples(dataset, split, "tabular")
        expected = (ages[rows] - ages[used].mean()) / ages[used].std()
        assert tabular[:, 0] == pytest.approx(expected, abs=1e-5)
        assert not tabular[:, 4].any()  # constant


def test_a_row_without_measures_is_reported_and_can_be_left_out(file):
    made = arrays()
    row = multibench()["train"][2][0]
    made["ep_tdata"][row] = np.nan
    np.savez(file, **made)
    dataset = MIMIC3(str(file), on_bad_sample="skip")
    assert dataset.unreadable("train") == {2: f"row {row} of '{file}' has no finite value in its series"}
    dataset.drop({"train": [2]})
    assert not dataset.unreadable("train")
    assert len(dataset.labels("train")) == len(samples(dataset, "train", "series"))


def test_labels_do_not_change_the_inputs(file):
    first = MIMIC3(str(file))
    before = first.fingerprint(), first.label_fingerprint()
    made = arrays()
    made["adm_labels_all"][:] = 0
    np.savez(file, **made)
    second = MIMIC3(str(file))
    assert second.fingerprint() == before[0]
    assert second.label_fingerprint() != before[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("ep_tdata"), r"has no array 'ep_tdata'; it has: adm_features_all"),
        (lambda a: a.pop("adm_labels_all"), r"has no array 'adm_labels_all'"),
        (lambda a: a.update(ep_tdata=a["ep_tdata"].transpose(0, 2, 1)), r"\(n, 24, 12\), got \(47, 12, 24\)"),
        (lambda a: a.update(adm_features_all=a["adm_features_all"][1:]), r"47 series and 46 rows of descr"),
        (lambda a: a.update(adm_labels_all=a["adm_labels_all"][1:]), r"47 series and 46 rows of labels"),
        (lambda a: a.update(adm_labels_all=a["adm_labels_all"] + 1), r"must be 0 or 1, got 2"),
        (lambda a: a.update(ep_tdata=np.array([{}])), r"cannot read '.*mimic3\.npz'"),
    ],
)
def test_bad_arrays_are_named(file, change, message):
    made = arrays()
    change(made)
    np.savez(file, **made)
    with pytest.raises(InputError, match=message):
        MIMIC3(str(file)).labels("train")


def test_a_file_that_is_missing_or_none_says_how_to_make_it(tmp_path):
    with pytest.raises(InputError, match=r"im\.pk from MultiBench's authors.*prepare_mimic3\.py im\.pk"):
        MIMIC3(str(tmp_path / "mimic3.npz")).open()
    (tmp_path / "mimic3.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"cannot read '.*mimic3\.npz'"):
        MIMIC3(str(tmp_path / "mimic3.npz")).open()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "sepsis"}, r"dataset\.target must be mortality or icd9"),
        ({"statistics": "val"}, r"dataset\.statistics must be train or all"),
        ({"icd9_group": 20}, r"dataset\.icd9_group must be in \[0, 19\], got 20"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        MIMIC3("mimic3.npz", **settings)


@pytest.mark.parametrize("keys", [str, str.encode])
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_pickle_becomes_a_file_that_the_dataset_reads(tmp_path, file, keys, protocol, capsys):
    source, out = tmp_path / "im.pk", tmp_path / "made" / "mimic3.npz"
    source.write_bytes(pickle.dumps({keys(name): a for name, a in arrays().items()}, protocol))
    assert prepare_mimic3.main([str(source), "--out", str(out)]) == 0
    assert "is ready, 47 admissions" in capsys.readouterr().out
    one, two = MIMIC3(str(out)), MIMIC3(str(file))
    assert samples(one, "test", "series") == pytest.approx(samples(two, "test", "series"), abs=1e-5)
    assert one.labels("train").tolist() == two.labels("train").tolist()
    assert [path.name for path in out.parent.iterdir()] == ["mimic3.npz"]


class Evil:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"ep_tdata": Evil()}), "not an array"),
        (pickle.dumps([1, 2]), "holds no dictionary but list"),
        (pickle.dumps({"ep_tdata": np.zeros((2, 24, 12))}), "has no 'adm_features_all'"),
        (
            pickle.dumps(arrays() | {"y_icd9": np.zeros((COUNT, 19))}),
            r"'y_icd9' in .* \(n, 20\), got \(47, 19\)",
        ),
        (pickle.dumps(arrays() | {"y_icd9": np.zeros((3, 20))}), "differ in length"),
        (pickle.dumps(arrays() | {"y_icd9": "text"}), "'y_icd9' in .* is no array of numbers"),
        (pickle.dumps(arrays())[:-100], "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_a_bad_pickle_is_one_message_and_runs_nothing(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    Path("im.pk").write_bytes(content)
    assert prepare_mimic3.main(["im.pk"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(InputError, match=message):
        prepare_mimic3.read_arrays(Path("im.pk"))
    assert not Path("ran").exists()
    assert not Path("data/mimic3.npz").exists()

"""Other labels, or none, give the same features, search and pretraining, bit for bit."""

import random

import pytest
from cli_support import LABEL_FREE, MMIMDB, files_of, movies, one_message, run, succeed, write_raw

STAGES = ("data", "backbone", "features", "search", "pretrain")


def permuted(rows):
    genres = [row["genres"] for row in rows["train"]]
    shuffled = random.Random(0).sample(genres, len(genres))
    assert shuffled != genres
    for row, others in zip(rows["train"], shuffled, strict=True):
        row["genres"] = others


def constant(rows):
    for row in rows["train"]:
        row["genres"] = ["Drama"]


def absent(rows):
    for row in (row for part in rows.values() for row in part):
        del row["genres"]


def place(folder, change=None):
    """A folder with the movies and an empty cache."""
    rows = movies()
    if change is not None:
        change(rows)
    write_raw(folder / "movies", rows)
    return folder


@pytest.fixture(scope="module")
def true_run(tmp_path_factory):
    folder = place(tmp_path_factory.mktemp("true"))
    succeed(*MMIMDB, cwd=folder)
    return folder


def label_free_files(folder):
    files = files_of(folder / "outputs", *STAGES)
    assert {name.split("/")[0] for name in files} == set(STAGES)
    assert sum(len(digests) for digests in files.values()) > 15
    return files


@pytest.mark.parametrize("change", [permuted, constant])
def test_other_labels_change_the_classifier_only(tmp_path, true_run, change):
    other = place(tmp_path, change)
    succeed(*MMIMDB, cwd=other)
    assert label_free_files(other) == label_free_files(true_run)
    networks = [
        [digests["network.safetensors"] for digests in files_of(folder / "outputs", "train").values()]
        for folder in (true_run, other)
    ]
    assert len(networks[0]) == len(networks[1]) == 1
    assert networks[0] != networks[1]


@pytest.mark.parametrize("objective", ["barlow_twins", "masked_features"])
def test_a_search_by_another_label_free_objective_depends_on_no_label(tmp_path, objective):
    searches = []
    for name, change in (("true", None), ("permuted", permuted), ("absent", absent)):
        folder = place(tmp_path / name, change)
        succeed(*MMIMDB, f"objective={objective}", "stages=[features,search]", cwd=folder)
        searches.append(files_of(folder / "outputs", "features", "search"))
    assert sum(len(digests) for digests in searches[0].values()) > 5
    assert searches[0] == searches[1] == searches[2]


def test_without_labels_only_the_classifier_is_refused(tmp_path, true_run):
    other = place(tmp_path, absent)
    assert "genres" in one_message(run(*MMIMDB, cwd=other))
    succeed(*MMIMDB, LABEL_FREE, cwd=other)
    assert label_free_files(other) == label_free_files(true_run)


def test_a_supervised_search_depends_on_the_labels(tmp_path, true_run):
    supervised = [*MMIMDB, "experiment=bm_nas_mmimdb", "stages=[features,search]"]
    other = place(tmp_path, permuted)
    before = set(files_of(true_run / "outputs", "search"))
    for folder in (true_run, other):
        succeed(*supervised, cwd=folder)
    true_searches = set(files_of(true_run / "outputs", "search")) - before
    assert len(true_searches) == 1
    assert not true_searches & set(files_of(other / "outputs", "search"))
    unsupervised = ("data", "backbone", "features")
    assert files_of(other / "outputs", *unsupervised) == files_of(true_run / "outputs", *unsupervised)
    without = place(tmp_path / "without", absent)
    assert "genres" in one_message(run(*supervised, cwd=without))

"""A run that is killed and started again leaves the record of one that was not."""

import json
import shutil
import signal

import pytest
from cli_support import TINY, files_of, reproducible, run, succeed

COMMAND = (*TINY, "baselines=[]", "trainer.checkpoint_seconds=0")
FITS = ("search", "pretrain", "train")
PLACES = [("after_step", 2), ("last_step", 1), ("last_step", 2), ("after_validation", 1), ("after_epoch", 1)]


def record_of(place, done):
    return reproducible(json.loads((place / done.folder / "record.json").read_text()))


def undisturbed(place, *options):
    done = succeed(*COMMAND, *options, cwd=place)
    stages = files_of(place / "outputs", "search", "pretrain", "train", "test")
    return place / "outputs/stages", record_of(place, done), stages


@pytest.fixture(scope="module")
def ssl_nas(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("ssl_nas"))


@pytest.fixture(scope="module")
def bm_nas(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("bm_nas"), "experiment=bm_nas_movies")


def with_features(folder, stages):
    """A folder in which only the features are there."""
    for stage in ("backbone", "features"):
        shutil.copytree(stages / stage, folder / "outputs/stages" / stage)
    return folder


def kill(folder, *options, **where):
    done = run(*COMMAND, *options, cwd=folder, hook={"name": "kill_at", **where})
    assert done.code == -signal.SIGKILL, f"{where} was not reached:\n{done.err}"
    return done


@pytest.mark.parametrize(("where", "number"), [*PLACES, ("before_done", 1)])
def test_killed_fits_go_on_to_the_same_record(tmp_path, ssl_nas, where, number):
    stages, record, files = ssl_nas
    place = with_features(tmp_path, stages)
    said = "".join(kill(place, place=where, fit=fit, number=number).err for fit in FITS)
    done = succeed(*COMMAND, cwd=place)
    said += done.err
    assert record_of(place, done) == record
    assert files_of(place / "outputs", "search", "pretrain", "train", "test") == files
    for fit in FITS:
        assert (f"{fit} goes on at step" in said.replace(".found", "")) == (where != "before_done")


@pytest.mark.parametrize(("where", "number"), [("after_step", 1), ("after_validation", 1)])
def test_a_search_that_alternates_by_epoch_goes_on_too(tmp_path, bm_nas, where, number):
    stages, record, files = bm_nas
    place = with_features(tmp_path, stages)
    kill(place, "experiment=bm_nas_movies", place=where, fit="search", number=number)
    assert record_of(place, succeed(*COMMAND, "experiment=bm_nas_movies", cwd=place)) == record
    assert files_of(place / "outputs", "search", "train", "test") == {
        name: digests for name, digests in files.items() if not name.startswith("pretrain")
    }


def test_a_random_search_goes_on_within_a_draw(tmp_path, ssl_nas):
    options = ("strategy=random", "strategy.draws=2", "strategy.epochs=2", "stages=[features,search]")
    records = []
    for name in ("killed", "undisturbed"):
        place = with_features(tmp_path / name, ssl_nas[0])
        if name == "killed":
            kill(place, *options, place="after_step", fit="search.draw.1", number=2)
        done = succeed(*COMMAND, *options, cwd=place)
        assert ("search.draw.1 goes on at step 2" in done.err) == (name == "killed")
        records.append(record_of(place, done))
    assert records[0] == records[1]


def test_an_unreadable_save_point_is_said_and_left(tmp_path, ssl_nas):
    stages, record, _ = ssl_nas
    place = with_features(tmp_path, stages)
    kill(place, place="after_step", fit="search", number=2)
    (point,) = place.rglob("*.ckpt")
    point.write_bytes(point.read_bytes()[:-100])
    done = succeed(*COMMAND, cwd=place)
    assert "cannot be read" in done.err
    assert "search starts again" in done.err
    assert record_of(place, done) == record

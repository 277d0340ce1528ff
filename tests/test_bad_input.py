import json
import os
from typing import Any

import numpy as np
import pytest
from cli_support import (
    MMIMDB,
    TINY,
    movies,
    one_message,
    reproducible,
    run,
    stage_folders,
    succeed,
    write_parquet,
    write_raw,
)

FEATURES = "stages=[features]"


def refused(*arguments: str, cwd: Any, **options: Any) -> str:
    return one_message(run(*arguments, cwd=cwd, **options))


def test_missing_data_names_the_path_and_what_to_do(tmp_path):
    message = refused("experiment=ssl_nas_mmimdb", "dataset.path=nowhere/mmimdb", cwd=tmp_path)
    assert "'nowhere/mmimdb'" in message
    assert "scripts/prepare_mmimdb.py" in message
    assert "python run.py experiment=ssl_nas_movies" in message


def test_a_folder_without_data_names_what_it_lacks(tmp_path):
    (tmp_path / "movies").mkdir()
    message = refused(*MMIMDB, cwd=tmp_path)
    assert "movies/split.json" in message
    assert "movies/train*.parquet" in message


@pytest.fixture
def damaged():
    """Movies of which four cannot be used."""
    rows = movies()
    rows["train"][3]["poster"] = rows["train"][3]["poster"][:60]
    rows["train"][7]["poster"] = b"no picture"
    rows["dev"][2]["poster"] = b""
    rows["test"][5]["plot"] = " "
    return rows, ["train train003", "train train007", "val dev002", "test test005"]


@pytest.mark.parametrize("write", [write_raw, write_parquet])
def test_unusable_samples_are_all_listed(tmp_path, damaged, write):
    rows, names = damaged
    write(tmp_path / "movies", rows)
    message = refused(*MMIMDB, FEATURES, cwd=tmp_path)
    assert "4 samples" in message
    for name in names:
        assert name in message
    assert "empty text" in message
    assert "dataset.on_bad_sample=skip" in message


def test_unusable_samples_can_be_left_out(tmp_path, damaged):
    rows, names = damaged
    write_raw(tmp_path / "movies", rows)
    done = succeed(*MMIMDB, FEATURES, "dataset.on_bad_sample=skip", cwd=tmp_path)
    assert "left out 4 unreadable samples" in done.err
    for name in names:
        assert name in done.err
    record = json.loads((tmp_path / done.folder / "record.json").read_text())
    assert record["data"]["counts"] == {"train": 32, "val": 18, "test": 20}


@pytest.mark.parametrize("column", ["plot", "poster", "imdb_id"])
def test_a_missing_column_is_named(tmp_path, column):
    write_parquet(tmp_path / "movies", movies(), without=column)
    message = refused(*MMIMDB, FEATURES, cwd=tmp_path)
    assert f"no column '{column}'" in message
    assert "Rename or add" in message


def test_an_unknown_genre_is_named(tmp_path):
    rows = movies()
    rows["train"][4]["genres"] = ["Drama", "Sitcom"]
    write_raw(tmp_path / "movies", rows)
    message = refused(*MMIMDB, cwd=tmp_path)
    assert "unknown genre 'Sitcom' of the movie 'train004'" in message
    assert "Known genres: Drama" in message
    assert stage_folders(tmp_path / "outputs", "features") == [], (
        "labels are read before anything is computed"
    )


def test_no_labels_are_a_matter_of_the_share(tmp_path):
    message = refused(*TINY, "labelled_share=0", cwd=tmp_path)
    assert "labelled_share must be in (0, 1], got 0" in message
    assert "stages=[features,search,pretrain]" in message


def test_an_unknown_encoder_is_refused_with_the_nearest(tmp_path):
    message = refused(*TINY, "backbone.image.model=efficientnet_lite00", cwd=tmp_path)
    assert "efficientnet_lite00" in message
    assert "efficientnet_lite0" in message.replace("efficientnet_lite00", "")


def test_without_a_network_the_remedy_is_named(tmp_path):
    hub = "+backbone.image.pretrained=true"
    message = refused(*TINY, hub, FEATURES, cwd=tmp_path, hook={"name": "without_hub"})
    assert "'test_efficientnet' could not be had from the model hub" in message
    assert "checkpoint_path" in message
    assert "backbone=offline" in message


def test_a_missing_encoder_package_is_named(tmp_path):
    package = "+backbone.image.checkpoint_path=package:no_such_encoder"
    message = refused(*TINY, package, FEATURES, cwd=tmp_path)
    assert "'no-such-encoder', which is not installed" in message
    assert "make install" in message


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    message = refused(*TINY, "search.batch_size=100", cwd=tmp_path)
    assert "search.batch_size=100 is larger than the 24 samples" in message
    assert "48 in train, 24 in val" in message
    assert "set it to 24 or less" in message


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    done = run(*TINY, "baselines=[]", "search.optimizer.lr=1e30", "search.clip_norm=null", cwd=tmp_path)
    message = one_message(done, code=1)
    assert "search/" in message
    assert "nan" in message or "inf" in message
    assert "search.optimizer.lr" in message
    (folder,) = stage_folders(tmp_path / "outputs", "search")
    assert not (folder / "done.json").exists()


def test_a_truncated_file_of_a_finished_run_is_computed_again(tmp_path):
    command = [*TINY, "baselines=[]", f"output={tmp_path / 'elsewhere'}"]
    first = succeed(*command, cwd=tmp_path)
    features = max((tmp_path / "elsewhere/stages/features").rglob("train.image*.npy"))
    before = np.load(features)
    os.truncate(features, features.stat().st_size // 2)
    second = succeed(*command, cwd=tmp_path)
    assert f"{features.name} is truncated or changed" in second.err
    assert "computed again" in second.err
    assert np.array_equal(np.load(features), before)
    old, new = (json.loads((done.folder / "record.json").read_text()) for done in (first, second))
    assert reproducible(new) == reproducible(old)


def test_a_full_disk_ends_in_one_message(tmp_path):
    hook = {"name": "full_disk", "file": "genotype.json"}
    done = run(*TINY, "baselines=[]", "stages=[features,search]", cwd=tmp_path, hook=hook)
    assert "no space left on the disk" in one_message(done, code=1)
    assert "done" in succeed(*TINY, "baselines=[]", "stages=[features,search]", cwd=tmp_path).err


def test_regularisers_without_mixing_weights_are_refused(tmp_path):
    zero_one = "{weight: 1.0, function: {_target_: mmnas_lab.objective.regularisers.ZeroOne}}"
    message = refused("strategy=random", f"+search.regularisers.zero_one={zero_one}", cwd=tmp_path)
    assert "search.regularisers" in message
    assert "strategy=bilevel" in message


def test_a_mask_ratio_of_0_is_refused(tmp_path):
    message = refused(
        *TINY, "objective=masked_features", "objective.mask_ratio=0", FEATURES[:-1] + ",search]", cwd=tmp_path
    )
    assert "objective.mask_ratio=0 hides 0 of" in message

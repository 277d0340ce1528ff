import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from cli_support import LABEL_FREE, TINY, reproducible, run_process, succeed
from safetensors.torch import load_file

from mmnas_lab.build import check_config
from mmnas_lab.experiment import Experiment
from mmnas_lab.study import compose
from mmnas_lab.training import Runtime

POSTERS = Path(
    os.environ.get("MMNAS_POSTERS", Path(__file__).resolve().parents[2] / "shared/data/movie_posters")
)
BASELINES = {"text", "image", "two_stream", "late_fusion", "random_genotype"}
RUN_FILES = {
    "config.yaml", "record.json", "genotype.json", "genotype.svg", "genotype.png", "metrics.csv",
    "curves.png", "log.txt", "network.safetensors",
}  # fmt: skip
RECORD_KEYS = {
    "schema", "experiment", "overrides", "seed", "label_free", "genotype", "margins", "metrics", "baselines",
    "selection", "parameters", "flops", "data", "stages", "timing", "environment", "benchmark", "inputs",
}  # fmt: skip
ALONE = (*TINY, "baselines=[]")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The whole chain as a user starts it."""
    place = tmp_path_factory.mktemp("quickstart")
    done = run_process(*TINY, cwd=place)
    assert done.code == 0, done.err
    return place, done, json.loads((place / done.folder / "record.json").read_text())


@pytest.fixture
def started(quickstart, tmp_path):
    """A folder in which the stages of the quickstart are there already."""
    place, _, record = quickstart
    shutil.copytree(place / "outputs", tmp_path / "outputs")
    return tmp_path, record


def record_of(place, done):
    return json.loads((place / done.folder / "record.json").read_text())


def test_the_run_folder_is_the_only_output_and_complete(quickstart):
    place, done, _ = quickstart
    assert done.out.splitlines() == [str(done.folder)]
    assert done.folder.parts[:2] == ("outputs", "ssl_nas_movies")
    assert done.folder.name == "seed_0"
    assert {path.name for path in (place / done.folder).iterdir()} == RUN_FILES
    for name in RUN_FILES:
        assert (place / done.folder / name).stat().st_size > 100
    assert (place / done.folder / "genotype.png").read_bytes().startswith(b"\x89PNG")
    assert (place / done.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "Warning" not in done.err
    assert "Traceback" not in done.err


def test_the_record_holds_what_the_report_needs(quickstart):
    record = quickstart[2]
    assert set(record) == RECORD_KEYS
    assert (record["experiment"], record["seed"], record["label_free"]) == ("ssl_nas_movies", 0, True)
    assert record["overrides"] == list(TINY)
    assert set(record["metrics"]) == {"val", "test"}
    assert set(record["baselines"]) == BASELINES
    for metrics in (record["metrics"], *record["baselines"].values()):
        for split in ("val", "test"):
            values = {name: value for name, value in metrics[split].items() if name != "per_class"}
            assert "f1_weighted" in values
            assert all(0 <= value <= 1 for value in values.values())
            assert np.isfinite(list(values.values())).all()
    assert {"features", "search", "pretrain", "train", "test", "train.image", "test.two_stream"} <= set(
        record["stages"]
    )
    assert set(record["timing"]) == set(record["stages"])
    assert not any(timing["reused"] for timing in record["timing"].values())
    assert record["data"]["counts"] == {"train": 48, "val": 24, "test": 25}
    assert record["data"]["labelled"] == 48
    assert record["flops"] > 1000
    assert set(record["environment"]) >= {"command", "commit", "versions", "hardware"}
    assert set(record["selection"]) >= {"search", "pretrain", "train"}


def test_the_record_agrees_with_the_files_beside_it(quickstart):
    place, done, record = quickstart
    folder = place / done.folder
    assert json.loads((folder / "genotype.json").read_text()) == record["genotype"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["scale"], config["dataset"]["num_train"]) == ("smoke", 48)
    sizes = [value.numel() for name, value in load_file(folder / "network.safetensors").items()]
    assert sum(sizes) >= record["parameters"]["network"] + record["parameters"]["head"]
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    assert rows[0] == ["stage", "run", "step", "epoch", "name", "value"]
    runs = {(row[0], row[1]) for row in rows[1:]}
    assert {("search", "found"), ("pretrain", "found"), ("train", "found"), ("train", "image")} <= runs
    assert np.isfinite([float(row[5]) for row in rows[1:]]).all()
    assert "search: computing" in (folder / "log.txt").read_text()


def test_a_second_run_reuses_all_stages(quickstart):
    place, first, record = quickstart
    second = succeed(*TINY, cwd=place)
    again = record_of(place, second)
    assert second.folder == first.folder
    assert all(timing["reused"] for timing in again["timing"].values())
    assert reproducible(again) == reproducible(record)


def test_a_fresh_folder_gives_the_same_record(quickstart, tmp_path):
    _, first, record = quickstart
    done = succeed(*TINY, cwd=tmp_path)
    again = record_of(tmp_path, done)
    assert not any(timing["reused"] for timing in again["timing"].values())
    assert reproducible(again) == reproducible(record)
    assert done.folder == first.folder


def test_another_seed_differs_in_all_but_features(started):
    place, record = started
    other = record_of(place, succeed(*ALONE, "seed=1", cwd=place))
    assert other["timing"]["features"]["reused"]
    for stage in ("search", "pretrain", "train", "test"):
        assert not other["timing"][stage]["reused"]
        assert other["stages"][stage] != record["stages"][stage]
    assert other["margins"] != record["margins"]
    assert other["metrics"] != record["metrics"]


def test_a_smaller_share_of_labels_shares_search_and_pretraining(started):
    place, record = started
    half = record_of(place, succeed(*ALONE, "labelled_share=0.5", cwd=place))
    reused = {stage: timing["reused"] for stage, timing in half["timing"].items()}
    assert reused == {"features": True, "search": True, "pretrain": True, "train": False, "test": False}
    assert half["data"]["labelled"] == 24
    assert half["genotype"] == record["genotype"]


def test_the_label_free_stages_alone(started):
    place, _ = started
    done = succeed(*ALONE, "seed=1", LABEL_FREE, cwd=place)
    alone = record_of(place, done)
    assert set(alone["stages"]) == {"features", "search", "pretrain"}
    assert (alone["metrics"], alone["baselines"]) == ({}, {})
    assert "labels" not in alone["data"]
    assert not (place / done.folder / "network.safetensors").exists()


def test_a_given_genotype_is_trained_without_a_search(quickstart, started):
    place, record = started
    genotype = place / quickstart[1].folder / "genotype.json"
    fixed = record_of(place, succeed(*ALONE, "strategy=fixed", f"strategy.genotype={genotype}", cwd=place))
    assert fixed["genotype"] == record["genotype"]
    assert fixed["timing"]["train"]["reused"], "the same network on the same data is the same stage"
    assert fixed["metrics"] == record["metrics"]


def test_random_search(started):
    place, _ = started
    options = ["strategy=random", "strategy.draws=2", "strategy.epochs=1"]
    drawn = record_of(place, succeed(*ALONE, *options, cwd=place))
    assert drawn["selection"]["search"]["draws"] == 2
    assert drawn["timing"]["features"]["reused"]
    assert not drawn["timing"]["search"]["reused"]
    assert drawn["label_free"]


def test_bm_nas_reads_labels_in_its_search(started):
    place, _ = started
    supervised = record_of(place, succeed(*ALONE, "experiment=bm_nas_movies", cwd=place))
    assert not supervised["label_free"]
    assert set(supervised["stages"]) == {"features", "search", "train", "test"}
    assert supervised["timing"]["features"]["reused"]
    half = record_of(place, succeed(*ALONE, "experiment=bm_nas_movies", "labelled_share=0.5", cwd=place))
    assert not half["timing"]["search"]["reused"]


@pytest.mark.parametrize(("logger", "files"), [("wandb", "*.wandb"), ("tensorboard", "events.out.*")])
def test_loggers_get_a_run_that_reuses_its_stages(started, logger, files):
    place, record = started
    done = succeed(*TINY, f"logger={logger}", cwd=place, drawings=True)
    assert reproducible(record_of(place, done))["metrics"] == record["metrics"]
    written = list(place.rglob(files))
    assert len(written) == 1, done.err
    assert written[0].stat().st_size > 2000


@pytest.mark.ddp
def test_two_ranks_leave_one_run_folder(tmp_path):
    options = ["trainer=ddp", "trainer.devices=2", "baselines=[image]"]
    done = run_process(*TINY, *options, cwd=tmp_path, timeout=600)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1
    assert [path.parent for path in tmp_path.rglob("record.json")] == [tmp_path / done.folder]
    record = record_of(tmp_path, done)
    assert 0 <= record["metrics"]["test"]["f1_weighted"] <= 1
    assert set(record["baselines"]) == {"image"}
    assert done.err.count("search: computing") == 1


@pytest.mark.posters
@pytest.mark.skipif(not POSTERS.is_dir(), reason=f"no movie posters in {POSTERS}")
def test_real_posters_and_plots_run_through_all_stages(tmp_path):
    (tmp_path / "posters").mkdir()
    for split, size in (("train", 40), ("dev", 20), ("test", 22)):
        rows = pq.read_table(POSTERS / f"{split}.parquet").slice(0, size)
        pq.write_table(rows, tmp_path / f"posters/{split}.parquet")
    options = ["scale=smoke", "trainer.threads=1", "dataset.path=posters", "baselines=[]"]
    done = succeed("experiment=ssl_nas_mmimdb", *options, cwd=tmp_path)
    record = record_of(tmp_path, done)
    assert record["data"]["counts"] == {"train": 40, "val": 20, "test": 22}
    assert len(record["metrics"]["test"]["per_class"]) == 23


@pytest.mark.parametrize("experiment", ["ssl_nas_movies", "bm_nas_movies"])
@pytest.mark.parametrize("scale", ["quickstart", "cpu"])
def test_the_bundled_data_is_large_enough_for_its_scales(tmp_path, experiment, scale):
    config = check_config(compose([f"experiment={experiment}", f"scale={scale}", f"output={tmp_path}"]))
    Experiment(config, Runtime())  # refuses what would stop a stage

"""Searches of cells on pictures, end to end: every objective and strategy, and what must be refused."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file

from mmnas_lab.runner import run
from mmnas_lab.study import compose, open_experiment
from mmnas_lab.types import InputError

CLASSES = 10
LABEL_FREE = ("mae_nas_cifar10", "ssl_nas_cifar10", "ssf_nas_cifar10lt")
EXPERIMENTS = ("darts_cifar10", "fair_darts_cifar10lt", *LABEL_FREE)


def encoded(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(folder, relabel=lambda labels: labels):
    """Pictures of 16 x 16 whose brightness tells the class, as parquet files of CIFAR-10's form."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 120), ("test", 40)):
        labels = np.arange(count) % CLASSES
        noise = rng.integers(0, 60, (count, 16, 16, 3))
        pictures = (noise + 19 * labels[:, None, None, None]).astype(np.uint8)
        told = relabel(labels) if split == "train" else labels
        table = {"image": [{"bytes": encoded(p), "path": "x"} for p in pictures], "label": told.tolist()}
        pq.write_table(pa.table(table), folder / f"{split}-0.parquet")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cifar"))


def configuration(pictures, output, experiment="darts_cifar10", *overrides):
    where = "dataset.dataset.path" if experiment.endswith("lt") else "dataset.path"
    values = [f"experiment={experiment}", "scale=smoke", f"{where}={pictures}", f"output={output}"]
    if experiment.endswith("lt"):
        values.append("dataset.mu=0.2")
    return compose([*values, "trainer.threads=1", "search.epochs=1", *overrides])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_to_its_record(pictures, tmp_path, experiment):
    folder = run(configuration(pictures, tmp_path, experiment, "train.epochs=1"))
    record = json.loads((folder / "record.json").read_text())
    assert record["genotype"]["space"] == "cnn_cells"
    assert 0 <= record["metrics"]["test"]["accuracy"] <= 1
    assert "random_genotype" in record["baselines"]
    assert record["label_free"] == (experiment in LABEL_FREE)
    assert ("accuracy_long_tailed" in record["metrics"]["test"]) == experiment.endswith("lt")
    for name in ("genotype.png", "genotype.svg", "curves.png", "edge_weights.png", "network.safetensors"):
        assert (folder / name).stat().st_size > 200
    logged = (folder / "metrics.csv").read_text()
    assert "search/skips_normal" in logged
    assert ("search/arch_zero_one" in logged) == experiment.endswith("lt")
    assert (folder / "reconstructions.png").exists() == experiment.startswith("mae_nas")


@pytest.mark.parametrize(
    "strategy",
    [
        ["strategy=single_level"],
        ["strategy.order=second_released"],
        ["strategy.order=second_exact"],
        ["strategy.half_steps=weights_first"],
        ["strategy=darts_es", "strategy.early_stop.every=1"],
        ["strategy=random", "strategy.draws=2", "strategy.epochs=1"],
    ],
)
def test_every_strategy_takes_steps(pictures, tmp_path, strategy):
    experiment = open_experiment(configuration(pictures, tmp_path, "darts_cifar10", *strategy))
    genotype = experiment.genotype()
    assert genotype.to_json()["space"] == "cnn_cells"


def test_a_found_genotype_is_trained_on_other_pictures(pictures, tmp_path):
    first = run(configuration(pictures, tmp_path / "a", "darts_cifar10", "stages=[features,search]"))
    overrides = [
        "strategy=fixed",
        f"strategy.genotype={first / 'genotype.json'}",
        "train.epochs=1",
        "baselines=[]",
    ]
    other = run(configuration(write(tmp_path / "other"), tmp_path / "b", "darts_cifar10", *overrides))
    records = [json.loads((folder / "record.json").read_text()) for folder in (first, other)]
    assert records[0]["genotype"] == records[1]["genotype"]


def test_a_published_genotype_is_trained_by_its_name(pictures, tmp_path):
    overrides = ["strategy=fixed", "strategy.genotype=DARTS_V2", "train.epochs=1", "baselines=[]"]
    folder = run(configuration(pictures, tmp_path, "darts_cifar10", *overrides))
    normal = json.loads((folder / "genotype.json").read_text())["cells"][0]
    assert [[edge["input"] for edge in node] for node in normal["nodes"]] == [[0, 1], [0, 1], [1, 0], [0, 2]]
    overrides[1] = "strategy.genotype=DARTS_V9"
    with pytest.raises(InputError, match="DARTS_V2"):
        run(configuration(pictures, tmp_path, "darts_cifar10", *overrides))


@pytest.mark.parametrize("experiment", ["mae_nas_cifar10", "ssf_nas_cifar10"])
def test_label_free_searches_do_not_depend_on_labels(tmp_path, experiment):
    """Training labels permuted and constant: the same pictures and genotype; another classifier."""
    objective = [] if experiment.startswith("mae") else ["objective=barlow_twins"]
    found = []
    for name, relabel in (
        ("true", lambda labels: labels),
        ("permuted", lambda labels: labels[::-1].copy()),
        ("constant", lambda labels: np.zeros_like(labels)),
    ):
        data = write(tmp_path / name / "data", relabel)
        overrides = [*objective, "train.epochs=1", "baselines=[]", "search.pixel_views.jitter=0.5"]
        values = configuration(data, tmp_path / name, "mae_nas_cifar10", *overrides)
        experiment_ = open_experiment(values)
        genotype = experiment_.genotype()
        trained = experiment_.evaluate(genotype, "found").stages["train"].folder / "network.safetensors"
        stages = {k: experiment_.results[k].key for k in ("features", "search")}
        trace = (experiment_.results["search"].folder / "trace.json").read_bytes()
        found.append((stages, genotype.to_json(), trace, load_file(trained)))
    for other in found[1:]:
        assert found[0][:3] == other[:3]
        assert any(not (found[0][3][name] == other[3][name]).all() for name in found[0][3])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.size=18"], r"18"),
        (["objective=masked_reconstruction", "objective.patch=3"], "patch"),
        (["objective=masked_reconstruction", "objective.mask_ratio=0"], "mask_ratio"),
        (["objective=masked_reconstruction", "objective.mask_ratio=1"], "mask_ratio"),
        (["search_space.auxiliary=false", "train.objective.auxiliary_weight=0.4"], "auxiliary"),
        (["train.objective.label_smoothing=1.0"], "label_smoothing"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(pictures, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        run(configuration(pictures, tmp_path, "darts_cifar10", *overrides, "train.epochs=1"))


def test_a_genotype_of_another_space_is_refused(pictures, tmp_path):
    fusion = {"space": "fusion", "schema": 1, "cells": [], "head_cells": 1}
    (tmp_path / "genotype.json").write_text(json.dumps(fusion))
    overrides = ["strategy=fixed", f"strategy.genotype={tmp_path / 'genotype.json'}"]
    with pytest.raises(InputError, match="fusion"):
        run(configuration(pictures, tmp_path, "darts_cifar10", *overrides))


def test_a_space_that_fuses_features_is_refused_on_pixels(pictures, tmp_path):
    values = configuration(pictures, tmp_path, "darts_cifar10")
    values["search_space"] = compose([])["search_space"]
    with pytest.raises(InputError, match="FusionSpace fuses features; choose backbone=offline"):
        open_experiment(values)

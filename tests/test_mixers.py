"""Searches of mixers, end to end: micro-benchmarks with and without labels, and fixed networks."""

import json

import numpy as np
import pytest
from shared_data import FOLDER, needs

from mmnas_lab.runner import run
from mmnas_lab.study import compose, open_experiment
from mmnas_lab.types import InputError

SMOKE = ["scale=smoke", "trainer.threads=1"]


def write_admissions(path, count):
    """Arrays of MIMIC-III's form, of which both modalities tell something of the class."""
    rng = np.random.default_rng(0)
    death = rng.integers(0, 2, count)
    labels = np.zeros((count, 6), np.int64)
    labels[:, 1] = death
    np.savez(
        path,
        adm_features_all=rng.normal(size=(count, 5)) + death[:, None],
        ep_tdata=rng.normal(size=(count, 24, 12)) + death[:, None, None],
        adm_labels_all=labels,
        y_icd9=rng.integers(0, 2, (count, 20)),
    )
    return path


@pytest.fixture(scope="module")
def admissions(tmp_path_factory):
    return write_admissions(tmp_path_factory.mktemp("mimic") / "mimic3.npz", 240)


def configuration(experiment, path, output, *overrides):
    where = [f"experiment={experiment}", f"dataset.path={path}", f"output={output}"]
    return compose([*where, *SMOKE, *overrides])


def test_mixmas_runs_to_its_record_and_adds_a_candidate_later(admissions, tmp_path):
    folder = run(configuration("mixmas_mimic3", admissions, tmp_path))
    record = json.loads((folder / "record.json").read_text())
    assert record["genotype"]["space"] == "mixers"
    assert set(record["genotype"]["encoders"]) == {"series", "tabular"}
    assert {"m2_mixer", "late_fusion", "random_genotype"} <= record["baselines"].keys()
    assert "auroc_macro" in record["metrics"]["test"] or "auroc" in record["metrics"]["test"]
    decisions = record["selection"]["search"]["decisions"]
    assert [name for name in decisions if name.startswith("fusion")] == ["fusion_function", "fusion_network"]
    assert not record["label_free"]
    for name in ("genotype.png", "decisions.png"):
        assert (folder / name).stat().st_size > 1000
    assert (tmp_path / "scores.sqlite").exists()
    more = run(
        configuration(
            "mixmas_mimic3", admissions, tmp_path, "stages=[features,search]",
            "search_space.fusion_functions=[concat,mean,max,sum]",
        )
    )  # fmt: skip
    later = json.loads((more / "record.json").read_text())
    again = later["selection"]["search"]
    # Scores of the new function under three seeds, and of a network after it if it is taken.
    assert later["timing"]["search"]["new_scores"] in (3, 6)
    for function, option in decisions["fusion_function"]["options"].items():
        assert again["decisions"]["fusion_function"]["options"][function] == option


def test_m2_mixer_is_trained_by_its_name(admissions, tmp_path):
    folder = run(configuration("m2_mixer_mimic3", admissions, tmp_path))
    genotype = json.loads((folder / "genotype.json").read_text())
    assert genotype["fusion_function"] == "concat"
    assert "mlp_mixer" in genotype["encoders"].values()


def test_micro_benchmarks_without_labels(admissions, tmp_path):
    values = configuration(
        "mixmas_mimic3", admissions, tmp_path, "objective=nt_xent", "search.batch_size=16",
        "stages=[features,search]", "search.views.dropout=0.2",
    )  # fmt: skip
    record = json.loads((run(values) / "record.json").read_text())
    assert record["label_free"]
    assert record["selection"]["search"]["name"] == "loss"


def selected(folder):
    return {
        path.parent.name.rsplit("-", 1)[0]: json.loads(path.read_text())["name"]
        for path in sorted((folder / "stages/train").glob("*/selection.json"))
    }


def test_search_training_and_baselines_select_by_one_metric(admissions, tmp_path):
    folder = run(configuration("mixmas_mimic3", admissions, tmp_path, "train.objective.select=auroc_macro"))
    record = json.loads((folder / "record.json").read_text())
    assert record["selection"]["search"]["name"] == "auroc_macro"
    assert record["selection"]["train"]["name"] == "val_auroc_macro"
    names = selected(tmp_path)
    assert {"found_0", "m2_mixer_0", "series_0", "random_0_0"} <= names.keys()
    assert set(names.values()) == {"val_auroc_macro"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.objective.select=auroc",
            r"select=auroc: multiclass data of 6 classes",
        ),
        ("objective.select=f1_samples", r"objective\.select=f1_samples: .* valid are: auto, loss, accuracy"),
        ("train.objective.select=aurok", r"select=aurok: no such option; did you mean auroc"),
    ],
)
def test_a_metric_that_the_data_has_not_is_refused_early(admissions, tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        run(configuration("mixmas_mimic3", admissions, tmp_path, override))
    assert not (tmp_path / "stages/features").exists()


@pytest.mark.parametrize("baseline", ["two_stream", "audio"])
def test_baselines_that_the_space_has_not_are_refused_early(admissions, tmp_path, baseline):
    with pytest.raises(InputError, match="baselines"):
        open_experiment(configuration("mixmas_mimic3", admissions, tmp_path, f"baselines=[{baseline}]"))


@needs("utd_mhad")
def test_three_real_modalities(tmp_path):
    overrides = ["stages=[features,search]", "baselines=[]"]
    folder = run(configuration("mixmas_utd_mhad", FOLDER / "utd_mhad", tmp_path, *overrides))
    genotype = json.loads((folder / "genotype.json").read_text())
    assert list(genotype["encoders"]) == ["skeleton", "inertial", "depth"]

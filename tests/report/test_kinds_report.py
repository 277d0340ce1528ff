from mmnas_lab.report.kinds import best_modality, genotype_told, report_kinds
from mmnas_lab.study_rows import append

CELL = {"inputs": ["skeleton.1", "inertial.2"], "steps": [{"inputs": [0, 1], "op": "sum"}]}
GENOTYPE = {"space": "fusion", "cells": [CELL]}


def row(seed, dataset="utd_mhad", share=0.1, metric="accuracy", **test):
    levels = {
        "ssl_nas": 0.70, "supervised_search": 0.60, "bm_nas": 0.50, "skeleton": 0.66, "inertial": 0.64,
        "late_fusion": 0.71, "late_fusion_chosen": 0.69, "random_genotype": 0.705, **test,
    }  # fmt: skip
    noise = 0.002 * seed
    return {
        "dataset": dataset,
        "labelled_share": share,
        "seed": seed,
        "labelled": {"rows": 26, "of": 263, "classes": 26 - seed, "classes_of": 27, "least": 0},
        "selected_by": f"val_{metric}",
        "networks": {
            name: {
                "val": {metric: 1 - level if name == "inertial" else 0.3},
                "test": {metric: level + (noise if name == "late_fusion" else 0.0)},
            }
            for name, level in levels.items()
        },
        "late_fusion_chosen": ["skeleton", "inertial"],
        "genotypes": {"ssl_nas": GENOTYPE, "supervised_search": GENOTYPE},
        "search_seconds": {"ssl_nas": 10.0, "supervised_search": 20.0},
        "commit": "abc",
        "hardware": "a processor",
    }


def test_the_single_modality_is_chosen_on_val():
    assert best_modality([row(seed) for seed in (0, 1)]) == "inertial"


def test_a_genotype_is_told_by_inputs_and_operations():
    assert genotype_told(GENOTYPE) == "(skeleton.1 + inertial.2 -> sum)"


def test_the_page_pairs_seeds_and_says_what_is_undecided_and_missing(tmp_path):
    assert report_kinds(tmp_path) == []
    for seed in (0, 1, 2):
        append(tmp_path / "ssl_nas_kinds.jsonl", row(seed))
    append(tmp_path / "ssl_nas_kinds.jsonl", row(0, "physionet2012", metric="auroc"))
    (page,) = report_kinds(tmp_path)
    text = page.read_text()
    assert "(a) SSL-NAS - inertial alone" in text
    assert "+6.0 [+6.0, +6.0] effect" in text  # against inertial
    assert "+20.0 [+20.0, +20.0] effect" in text  # BM-NAS
    assert "-0.5 [-0.5, -0.5] effect" in text  # random genotypes
    assert "-1.2 [-1.7, -0.7] effect" in text  # late fusion, whose seeds differ
    assert "+6.0 (one seed)" in text
    assert "of at least 24 of the 27 classes, at least 0 of each" in text
    assert "+1.0 [+1.0, +1.0] effect" in text  # late fusion, chosen
    assert "best on val: seed 0 skeleton + inertial, seed 1 skeleton + inertial" in text
    assert "Not whole yet: 4 of 12 rows" in text
    assert "were added" not in text
    assert "logistic regression, " not in text  # none for every run
    for seed in (0, 1, 2):
        models = {name: {"test": {"accuracy": level}} for name, level in (("found", 0.7), ("all", 0.8))}
        identity = {"dataset": "utd_mhad", "labelled_share": 0.1, "seed": seed}
        append(tmp_path / "ssl_nas_kinds_sklearn.jsonl", {**identity, "models": models})
    report_kinds(tmp_path)
    assert "| logistic regression, all features" in page.read_text()


def test_seeds_that_were_added_later_are_told(tmp_path):
    for seed in (0, 3):
        append(tmp_path / "ssl_nas_kinds.jsonl", row(seed))
    (page,) = report_kinds(tmp_path)
    text = page.read_text()
    assert "Not whole yet: 1 of 12 rows. The seeds after these were added" in text

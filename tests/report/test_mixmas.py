"""The page of MixMAS' study: scores and choices of every stage, methods against each other within seeds."""

from mmnas_lab.report.mixmas import ROWS, report_mixmas, score_of
from mmnas_lab.study_rows import append

SOURCE = {"commit": "abcdef0123456789", "data": "d", "hardware": "a processor"}


def decision(taken, tied=(), confidence=0.9, **means):
    options = {
        name: {"mean": mean, "std": 0.01, "scores": [mean], "flops": 1_500_000}
        for name, mean in means.items()
    }
    return {"option": taken, "tie": list(tied), "confidence": confidence, "options": options}


def row(seed, found, m2_mixer, dataset="physionet2012", **more):
    decisions = {
        "encoder.series": decision("mlp_mixer", mlp_mixer=0.80 + 0.01 * seed, hyper_mixer=0.70),
        "encoder.tabular": decision("feed_forward", confidence=None, feed_forward=0.6),
        "fusion_function": decision("mean", ("concat", "mean"), 0.55, concat=0.81, mean=0.80),
    }
    scores = {"found": found, "m2_mixer": m2_mixer, "series": 0.78, "tabular": 0.6, "random_genotype": 0.75}
    scores |= {"late_fusion": 0.8}
    val = scores | {"tabular": 0.9 if seed == 2 else 0.5}
    return {
        "dataset": dataset,
        "seed": seed,
        "metric": "auroc",
        "counts": {"train": 100, "val": 20, "test": 30},
        "epochs": {"search": 5, "train": 15},
        "selection": {"name": "auroc", "sample": {"rows": 80}, "decisions": decisions},
        "search_seconds": 90.0,
        "val": {name: {"auroc": value} for name, value in val.items()},
        "test": {name: {"auroc": value, "accuracy": 0.5} for name, value in scores.items()},
        "parameters": {"found": 12_345, "m2_mixer": 20_000},
        **SOURCE,
        **more,
    }


def page(tmp_path, rows):
    for one in rows:
        append(tmp_path / ROWS, one)
    (path,) = report_mixmas(tmp_path)
    return path.read_text()


def cells(text, *starts):
    """The cells of the one line whose first cells are these."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    (found,) = (line for line in lines if tuple(line[: len(starts)]) == starts)
    return found[len(starts) :]


def levels(text):
    """The table of test scores."""
    return text.split("## Networks")[1].split("Looked for")[0]


def test_without_rows_there_is_no_page(tmp_path):
    assert report_mixmas(tmp_path) == []


def score_ofs_choices_and_ties_of_every_stage_are_told(tmp_path):
    text = page(tmp_path, [row(seed, 0.85, 0.80) for seed in (2, 0, 1)])
    told = cells(text, "encoder of series", "mlp_mixer")
    assert told == ["0.810", "1.50", "0.800 **taken**", "0.810 **taken**", "0.820 **taken**"]
    assert cells(text, "fusion function", "concat")[2:] == ["0.810 tied"] * 3
    assert cells(text, "fusion function", "mean")[2:] == ["0.800 tied **taken**"] * 3
    assert "encoder of tabular" not in text  # one candidate is no choice
    assert "encoder.series 0.90, 0.90, 0.90; fusion_function 0.55, 0.55, 0.55" in text


def test_methods_are_compared_within_seeds_by_the_metric_of_the_data(tmp_path):
    rows = [row(seed, 0.80 + 0.01 * seed, 0.79 + 0.01 * seed) for seed in (0, 1, 2)]
    text = page(tmp_path, [*rows, row(0, 0.1, 0.9, overrides=["train.epochs=1"])])
    assert cells(levels(text), "MixMAS") == ["0.810 [0.785, 0.835]"]
    assert cells(levels(text), "series alone") == ["0.780 [0.780, 0.780]"]
    differences, parameters = text.split("| MixMAS minus")[1].split("Parameters without heads")
    assert cells(differences, "M2-Mixer")[0] == "+1.0 [+1.0, +1.0] effect"
    assert cells(parameters, "MixMAS") == ["12.3"]
    assert "PhysioNet 2012 has" not in text
    assert "UTD-MHAD has 0 of 3 seeds" in text
    assert "abcdef012345" in text


def test_the_best_single_modality_is_chosen_on_val():
    assert score_of(row(0, 0.8, 0.8), "best single modality") == 0.78
    assert score_of(row(2, 0.8, 0.8), "best single modality") == 0.6
    assert score_of(row(0, 0.8, 0.8), "video") is None


def test_one_seed_has_no_interval_and_data_sets_stand_side_by_side(tmp_path):
    text = page(tmp_path, [row(0, 0.85, 0.8), row(0, 0.7, 0.75, "utd_mhad")])
    assert cells(levels(text), "MixMAS") == ["0.850", "0.700"]
    assert "+5.0 (one seed)" in text
    assert "-5.0 (one seed)" in text
    assert "PhysioNet 2012 has 1 of 3 seeds" in text


def test_plain_models_stand_beside_where_their_levels_are_known(tmp_path):
    level = {"dataset": "physionet2012", "inputs": "both", "model": "gradient boosting", "metric": "auroc"}
    append(tmp_path / "mixmas_levels.jsonl", {**level, "val": 0.84, "test": 0.86})
    append(tmp_path / "mixmas_levels.jsonl", {**level, "dataset": "avmnist", "val": 0.1, "test": 0.1})
    text = page(tmp_path, [row(0, 0.85, 0.8)])
    assert cells(text, "PhysioNet 2012", "both") == ["gradient boosting", "auroc", "0.840", "0.860"]

"""What the generated movies were made to show: fusing pays, and pays nothing where there is no signal."""

import pytest

from mmnas_lab.baselines import run_baselines
from mmnas_lab.report.tables import paired_interval
from mmnas_lab.study import compose, open_experiment

SEEDS = range(5)


def gains(tmp_path, *overrides):
    """Test F1-W of the found network and of the unimodal ones, by seed."""
    scores = {"found": [], "text": [], "image": []}
    for seed in SEEDS:
        options = [f"seed={seed}", f"output={tmp_path}", "baselines=[text,image]", *overrides]
        experiment = open_experiment(compose(options))
        found = experiment.evaluate(experiment.genotype(), "found")
        scores["found"].append(found.metrics["test"]["f1_weighted"])
        for name, metrics in run_baselines(experiment).items():
            scores[name].append(metrics["test"]["f1_weighted"])
    return scores


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fusion_beats_each_modality_on_clean_movies(tmp_path):
    scores = gains(tmp_path)
    for name in ("text", "image"):
        assert min(a - b for a, b in zip(scores["found"], scores[name], strict=True)) >= 0.05
        assert paired_interval(scores["found"], scores[name]).low >= 0.05


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fusion_gains_nothing_where_there_is_no_signal(tmp_path):
    scores = gains(tmp_path, "dataset.noise=1")
    for name in ("text", "image"):
        gain = paired_interval(scores["found"], scores[name])
        assert gain.low <= 0 <= gain.high
        assert gain.mean < 0.02

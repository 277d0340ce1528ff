import math

import pytest

from mmnas_lab.report import mixer_grid
from mmnas_lab.report.mixer_grid import gather, kendall, report_mixer_grid, tau_interval
from mmnas_lab.study_rows import append

SOURCE = {"samples": {"train": 3200, "val": 800, "test": 4000}, "commit": "abc", "hardware": "a processor"}
NAMES = [
    f"mlp_mixer, hyper_mixer, {f}, {n}"
    for f in ("concat", "mean", "max")
    for n in ("mlp_mixer", "hyper_mixer")
]


def network(seed, place, **more):
    """Levels that rise by a point with the place, but for the last two on val, which change places."""
    val = {4: 5, 5: 4}.get(place, place)
    return {
        "kind": "network", "dataset": "physionet2012", "seed": seed, "network": NAMES[place],
        "micro": [0.5 + 0.02 * place, 0.5 + 0.02 * place + 0.01], "micro_metric": "auroc",
        "selected_by": "val_auroc", "val": {"auroc": 0.8 + 0.01 * val}, "test": {"auroc": 0.7 + 0.01 * place},
        "train_seconds": 10.0, **SOURCE, **more,
    }  # fmt: skip


def search(seed, place):
    row = {"kind": "search", "dataset": "physionet2012", "seed": seed, "network": NAMES[place]}
    return {**row, "search_seconds": 3.0, **SOURCE}


@pytest.fixture
def rows():
    networks = [network(seed, place) for seed in (0, 1, 2) for place in range(6)]
    return [*networks, *(search(seed, place) for seed, place in enumerate((5, 2, 5)))]


def test_regret_is_against_the_network_that_is_best_on_val(rows):
    grid = gather(rows, "physionet2012", 6)
    assert grid.best_on_val == NAMES[4]
    assert grid.regrets("val") == pytest.approx([1.0, 3.0, 1.0])
    assert grid.regrets("test") == pytest.approx([-1.0, 2.0, -1.0])
    assert grid.gains("test") == pytest.approx([2.5, -0.5, 2.5])
    assert grid.grid_seconds[0] == 60


def test_a_seed_counts_when_it_is_whole(rows):
    assert gather(rows[1:], "physionet2012", 6).seeds == (1, 2)
    assert gather(rows, "physionet2012", 18) is None
    assert gather(rows, "utd_mhad", 6) is None


def test_tau_is_that_of_the_field():
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3])[0] == pytest.approx(4 / 6)
    assert math.isnan(kendall([1, 1, 1], [1, 2, 3])[0])
    whole = tau_interval([1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7])
    assert (whole.mean, whole.low, whole.high) == pytest.approx((1, 1, 1))


def test_the_page_says_regret_tau_and_what_is_missing(rows, tmp_path, monkeypatch):
    assert report_mixer_grid(tmp_path) == []
    monkeypatch.setattr(mixer_grid, "NETWORKS_OF", {"utd_mhad": 24, "physionet2012": 6})
    for row in rows:
        append(tmp_path / "mixmas_grid.jsonl", row)
    page, figure = report_mixer_grid(tmp_path)
    text = page.read_text()
    assert "3,200 training, 800 val and 4,000 test samples" in text
    assert "val: 1.0, 3.0, 1.0; mean +1.7 [-1.2, +4.5]" in text
    assert "a random pick), test: +1.5 [-2.8, +5.8] undecided" in text
    assert "means of all seeds: 0.87" in text
    assert "two seeds, what noise leaves: 1.00" in text
    assert "Not whole yet: seeds of UTD-MHAD 0 of 3" in text
    assert figure.stat().st_size > 1000

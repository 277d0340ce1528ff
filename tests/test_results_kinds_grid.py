"""The rows of SSL-NAS on other kinds of data and of the mixers' grid: each once, with source and page."""

from collections import Counter
from pathlib import Path

import pytest

from mmnas_lab.report.kinds import NETWORKS, PLAIN_ROWS, PLANNED, metric_of, report_kinds
from mmnas_lab.report.mixer_grid import NETWORKS_OF, report_mixer_grid
from mmnas_lab.study_rows import read_rows

RESULTS = Path(__file__).parent.parent / "results"
KINDS = read_rows(RESULTS / "ssl_nas_kinds.jsonl")
PLAIN = read_rows(RESULTS / PLAIN_ROWS)
GRID = read_rows(RESULTS / "mixmas_grid.jsonl")


def test_every_run_on_other_kinds_is_there_once_and_whole():
    identities = Counter((row["dataset"], row["labelled_share"], row["seed"]) for row in KINDS)
    assert all(count == 1 for count in identities.values())
    for row in KINDS:
        assert row["labelled_share"] in PLANNED[row["dataset"]]
        assert set(NETWORKS) < set(row["networks"])  # and the single modalities
        assert all(metric_of(row) in scores["test"] for scores in row["networks"].values())


def test_every_network_of_the_grid_is_there_once():
    networks = Counter(
        (row["dataset"], row["seed"], row["network"]) for row in GRID if row["kind"] == "network"
    )
    assert all(count == 1 for count in networks.values())
    for dataset, planned in NETWORKS_OF.items():
        assert len({name for other, _, name in networks if other == dataset}) <= planned
    for row in GRID:
        if row["kind"] == "search":
            seed = {name for dataset, at, name in networks if (dataset, at) == (row["dataset"], row["seed"])}
            assert row["network"] in seed or len(seed) < NETWORKS_OF[row["dataset"]]


def test_each_run_on_other_kinds_has_its_plain_models():
    keys = ("dataset", "labelled_share", "seed")
    runs = Counter(tuple(row[key] for key in keys) for row in KINDS)
    assert Counter(tuple(row[key] for key in keys) for row in PLAIN) == runs
    for row in PLAIN:
        assert {"found", "all"} < set(row["models"])
        assert all(row["metric"] in model["test"] for model in row["models"].values())


@pytest.mark.parametrize("rows", [KINDS, PLAIN, GRID], ids=["kinds", "plain", "grid"])
def test_rows_say_where_they_come_from(rows):
    for row in rows:
        assert len(row["commit"]) == 40
        assert row["data"]
        assert "cores" in row["hardware"]


@pytest.mark.parametrize(
    ("rows", "report"), [("ssl_nas_kinds", report_kinds), ("mixmas_grid", report_mixer_grid)]
)
def test_the_page_is_made_from_the_rows_that_are_there(rows, report, tmp_path):
    for source in RESULTS.glob(f"{rows}*.jsonl"):
        (tmp_path / source.name).write_text(source.read_text())
    for path in report(tmp_path):
        if path.suffix == ".md":
            assert path.read_text() == (RESULTS / path.name).read_text()

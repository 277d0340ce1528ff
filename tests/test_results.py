"""The recorded studies are whole, say where they come from, and hold what the documentation says of them."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from mmnas_lab.report import studies
from mmnas_lab.report.fusion_table import BY_LOSS, report_fusion_table
from mmnas_lab.report.mixmas import report_mixmas
from mmnas_lab.study_rows import append, read_rows

RESULTS = Path(__file__).parent.parent / "results"
TABLE = read_rows(RESULTS / "fusion_table.jsonl")
SEARCHES = read_rows(RESULTS / "fusion_table_searches.jsonl")
POSTERS = read_rows(RESULTS / "ssl_nas_posters.jsonl")


def means(split):
    """Mean over the fresh seeds of each repeated genotype."""
    names = {row["genotype"] for row in TABLE if row["seed"] > 0}
    return {n: fmean(r[split] for r in TABLE if r["genotype"] == n and r["seed"] > 0) for n in names}


def test_every_single_cell_genotype_is_in_the_table_once():
    first = [row["genotype"] for row in TABLE if row["seed"] == 0]
    assert len(first) == len(set(first)) == 8 * 7 * 4
    assert {name.split(", ")[2].rstrip(")") for name in first} == {
        "sum",
        "attention",
        "linear_glu",
        "concat_fc",
    }


def test_the_best_and_every_searched_genotype_have_five_fresh_seeds():
    first = sorted((row for row in TABLE if row["seed"] == 0), key=lambda row: -row["val"])
    chosen = {row["genotype"] for row in first[:20]} | {row["genotype"] for row in SEARCHES}
    for name in chosen:
        assert sorted(r["seed"] for r in TABLE if r["genotype"] == name and r["seed"] > 0) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_default_label_free_search_finds_good_genotypes(split):
    """Above the mean of all genotypes with every seed, and within two points of the best in eight of nine."""
    default = [row for row in SEARCHES if row["search"] == BY_LOSS]
    assert sorted(row["seed"] for row in default) == list(range(9))
    assert {row["pairing"] for row in default} == {"distinct"}
    mean_of_all = fmean(row[split] for row in TABLE if row["seed"] == 0)
    repeated = means(split)
    assert all(repeated[row["genotype"]] > mean_of_all for row in default)
    near = [row["seed"] for row in default if repeated[row["genotype"]] > max(repeated.values()) - 0.02]
    assert len(near) == 8
    assert {0, 1, 2} <= set(near)


def test_the_sweep_is_whole_for_every_seed_that_is_there():
    cells = [(r["experiment"], r["pretrain_epochs"] > 0, r["labelled_share"], r["seed"]) for r in POSTERS]
    seeds = {seed for *_, seed in cells}
    assert seeds
    assert len(cells) == len(set(cells)) == 2 * 2 * 4 * len(seeds)
    for row in POSTERS:
        assert set(row["baselines"]) == {"text", "image", "two_stream", "late_fusion", "random_genotype"}


@pytest.mark.parametrize("rows", [TABLE, SEARCHES, POSTERS], ids=["table", "searches", "posters"])
def test_rows_say_where_they_come_from(rows):
    assert rows
    for row in rows:
        assert len(row["commit"]) == 40
        assert row["data"]
        assert "cores" in row["hardware"]


def test_reports_are_made_from_the_rows_that_are_there(tmp_path):
    for path in RESULTS.glob("*.jsonl"):
        (tmp_path / path.name).write_text(path.read_text())
    made = [*studies.report_posters(tmp_path), *report_fusion_table(tmp_path)]
    assert {path.name for path in made} == {"ssl_nas_posters.md", "ssl_nas_posters.png", "fusion_table.md"}
    for path in made:
        if path.suffix == ".md":
            assert path.read_text() == (RESULTS / path.name).read_text()


def test_a_torn_last_line_is_passed_over_and_the_next_row_is_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    append(path, {"k": 1})
    with path.open("a") as file:
        file.write('{"k": 2, "va')
    append(path, {"k": 3})
    assert read_rows(path) == [{"k": 1}, {"k": 3}]
    assert json.loads(path.read_text().splitlines()[0]) == {"k": 1}


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (studies.Interval(2.0, 1.0, 3.0), "effect"),
        (studies.Interval(0.1, -0.9, 0.9), "no effect"),
        (studies.Interval(0.5, -0.5, 1.5), "undecided"),
    ],
)
def test_what_may_be_said_of_a_difference(points, said):
    assert studies.verdict(points).endswith(said)


def test_every_run_on_mechanisms_is_there_once_and_had_a_thousand_steps():
    rows = read_rows(RESULTS / "cell_mechanisms.jsonl")
    names = ("study", "mask_ratio", "decoder", "zero_one", "relaxation", "objective", "draw", "seed")
    identities = [tuple(row.get(name) for name in names) for row in rows]
    assert len(set(identities)) == len(identities)
    assert all(row["steps"] >= 1000 for row in rows if row.get("relaxation") != "random")
    assert all(row["commit"] and row["data"] and row["hardware"] for row in rows)
    assert (RESULTS / "cell_mechanisms.md").exists()


MIXMAS = read_rows(RESULTS / "mixmas.jsonl")


def test_every_run_of_the_mixmas_study_is_there_once_and_says_where_it_comes_from():
    identities = [(row["dataset"], row["seed"], *row.get("overrides", ())) for row in MIXMAS]
    assert identities
    assert len(set(identities)) == len(identities)
    for row in MIXMAS:
        assert {"found", "m2_mixer", "late_fusion", "random_genotype"} <= row["test"].keys()
        assert row["test"].keys() == row["val"].keys()
        assert all(row["metric"] in scores for scores in row["test"].values())
        assert row["selection"]["name"] == row["metric"]
        assert all(row[name] for name in ("commit", "data", "hardware"))


def test_a_search_of_mixers_took_the_options_that_its_row_tells():
    for row in MIXMAS:
        taken = {stage: made["option"] for stage, made in row["selection"]["decisions"].items()}
        encoders = {name: taken[f"encoder.{name}"] for name in row["genotype"]["encoders"]}
        assert row["genotype"]["encoders"] == encoders
        assert row["genotype"]["fusion_function"] == taken["fusion_function"]


def test_the_page_of_the_mixmas_study_is_that_of_its_rows(tmp_path):
    for name in ("mixmas.jsonl", "mixmas_levels.jsonl"):
        (tmp_path / name).write_text((RESULTS / name).read_text())
    (page,) = report_mixmas(tmp_path)
    assert page.read_text() == (RESULTS / "mixmas.md").read_text()

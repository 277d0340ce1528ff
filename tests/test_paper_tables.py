from pathlib import Path

import yaml

TABLES = Path(__file__).resolve().parent.parent / "mmnas_lab/report/paper_tables.yaml"
EXPERIMENTS = TABLES.parents[2] / "conf/experiment"


def tables():
    return yaml.safe_load(TABLES.read_text())


def test_the_tables_say_where_they_are_from():
    assert len(tables()) > 5
    for table in tables():
        for key in ("paper", "table", "title", "metric", "source"):
            assert table.get(key), f"{table.get('paper')} {table.get('table')} has no {key}"
    names = [(table["paper"], table["table"]) for table in tables()]
    assert len(names) == len(set(names))


def test_every_row_has_a_method_and_a_value_or_is_missing():
    rows = [(table, row) for table in tables() for row in table.get("rows") or []]
    assert len(rows) > 20
    for table, row in rows:
        where = f"{table['paper']} {table['table']}: {row}"
        assert row.get("method"), where
        values = [value for key, value in row.items() if key not in ("method", "setting")]
        assert "value" in row or row.get("missing") or any(isinstance(v, int | float) for v in values), where


def test_a_table_without_rows_lists_what_is_missing():
    for table in tables():
        assert table.get("rows") or table.get("missing"), f"{table['paper']} {table['table']}"


def test_every_experiment_that_a_row_names_exists():
    named = {
        row["experiment"] for table in tables() for row in table.get("rows") or [] if "experiment" in row
    }
    assert named <= {path.stem for path in EXPERIMENTS.glob("[!_]*.yaml")}


def test_the_sweep_of_a_table_runs_its_rows():
    for table, sweep in ((("MixMAS (2412.18437)", "II"), "mixmas_table2"),):
        (found,) = (one for one in tables() if (one["paper"], one["table"]) == table)
        named = {row["experiment"] for row in found["rows"]}
        path = EXPERIMENTS.parent / "sweep" / f"{sweep}.yaml"
        params = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
        assert {name.strip() for name in params["experiment"].split(",")} == named

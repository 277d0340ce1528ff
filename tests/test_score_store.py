"""The store of scores: what is in it stays, writers do not disturb each other, damage is told."""

import json
import multiprocessing
import sqlite3
import sys
from pathlib import Path

import pytest

from mmnas_lab.score_store import COLUMNS, SCHEMA, ScoreStore
from mmnas_lab.types import InputError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import scores


def row(key, score=0.5):
    plain = {"candidate": {"encoders": {"a": "x"}}, "budget": {"epochs": 2}, "versions": {"torch": "2"}}
    text = {name: f"{name} of {key}" for name in ("choice", "option", "data", "sample", "metric")}
    return {**plain, **text, "key": key, "seed": 1, "score": score, "seconds": 2.0, "training_seconds": 1.5}


def test_rows_come_back_as_they_were_put(tmp_path):
    store = ScoreStore(tmp_path / "a" / "scores.sqlite")
    assert store.get("k") is None
    store.put(row("k"))
    assert store.get("k") == row("k")
    store.put(row("k", score=0.9))
    assert store.get("k")["score"] == 0.5
    store.put(row("l"))
    assert [each["key"] for each in ScoreStore(store.path).rows()] == ["k", "l"]


def write_many(path, first):
    store = ScoreStore(path)
    for k in range(first, first + 30):
        store.put(row(f"{k % 45}"))


def test_concurrent_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path / "s.sqlite", k)) for k in (0, 15, 30)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert all(writer.exitcode == 0 for writer in writers)
    assert {each["key"] for each in ScoreStore(tmp_path / "s.sqlite").rows()} == {str(k) for k in range(45)}


def test_a_store_of_another_version_is_refused(tmp_path):
    path = tmp_path / "s.sqlite"
    ScoreStore(path)
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA + 1}")
    with pytest.raises(InputError, match="schema version"):
        ScoreStore(path)


def test_a_locked_store_is_told_and_keeps_its_rows(tmp_path):
    store = ScoreStore(tmp_path / "s.sqlite", wait_seconds=0.1)
    store.put(row("k"))
    other = sqlite3.connect(store.path)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(InputError, match="locked by another process"):
        store.put(row("l"))
    other.rollback()
    other.close()
    store.put(row("l"))
    assert len(store.rows()) == 2


@pytest.mark.parametrize("content", [b"not a database at all" * 100, None])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "s.sqlite"
    if content is not None:
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE other (a)")
    with pytest.raises(InputError, match="strategy.store"):
        ScoreStore(path)


def test_scores_are_listed_and_exported(tmp_path, capsys):
    store = ScoreStore(tmp_path / "s.sqlite")
    store.put(row("k"))
    assert scores.main(["--store", str(store.path)]) == 0
    assert "option of k" in capsys.readouterr().out
    for name in ("s.json", "s.csv"):
        assert scores.main(["--store", str(store.path), "--export", str(tmp_path / name)]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == [row("k")]
    header, line = (tmp_path / "s.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert line.startswith("k,")
    assert scores.main(["--store", str(store.path), "--export", str(tmp_path / "s.txt")]) == 2
    assert scores.main(["--store", str(tmp_path / "absent")]) == 2

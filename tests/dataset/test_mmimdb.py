from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmnas_lab.dataset.base import SPLITS, LabelFree
from mmnas_lab.dataset.mmimdb import GENRES, MMIMDB
from mmnas_lab.types import InputError

POSTERS = Path(
    os.environ.get("MMNAS_POSTERS", Path(__file__).resolve().parents[3] / "shared/data/movie_posters")
)
NAMES = {"train": "train", "val": "dev", "test": "test"}


def jpeg(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).resize((32, 48)).save(file, "JPEG")
    return file.getvalue()


def multi_hot(genres: list[str]) -> list[int]:
    return [int(genre in genres) for genre in GENRES]


def rows(split: str, size: int, first: int) -> list[dict[str, Any]]:
    choices = (["Drama"], ["Comedy", "News"], ["Film-Noir", "Drama"], [])
    return [
        {
            "imdb_id": f"tt{first + i:07d}",
            "poster": {"bytes": jpeg(first + i), "path": f"{first + i}.jpg"},
            "plot": f"Plot {first + i} of the {split} movies.",
            "overview": [None, "", f"Overview {i}.", f"Plot {first + i}"][i % 4],
            "genres": choices[i % 4],
            "labels": multi_hot(choices[i % 4]),
        }
        for i in range(size)
    ]


@pytest.fixture
def movies() -> dict[str, list[dict[str, Any]]]:
    return {"train": rows("train", 5, 10), "val": rows("val", 3, 20), "test": rows("test", 4, 30)}


def write_parquet(
    folder: Path, movies: dict[str, list[dict[str, Any]]], without: tuple[str, ...] = ()
) -> str:
    folder.mkdir(exist_ok=True)
    for split, entries in movies.items():
        kept = [{key: row[key] for key in row if key not in without} for row in entries]
        pq.write_table(pa.Table.from_pylist(kept), folder / f"{NAMES[split]}.parquet")
    return str(folder)


def write_raw(folder: Path, movies: dict[str, list[dict[str, Any]]], inside: str = "") -> str:
    (folder / inside).mkdir(parents=True, exist_ok=True)
    ids = {NAMES[split]: [row["imdb_id"] for row in entries] for split, entries in movies.items()}
    (folder / "split.json").write_text(json.dumps(ids))
    for row in (row for entries in movies.values() for row in entries):
        content = {"plot": ["Short.", row["plot"]], "genres": row["genres"], "year": 1950}
        (folder / inside / f"{row['imdb_id']}.json").write_text(json.dumps(content))
        (folder / inside / f"{row['imdb_id']}.jpeg").write_bytes(row["poster"]["bytes"])
    return str(folder)


def opened(path: str, text: Any = "plot") -> MMIMDB:
    dataset = MMIMDB(path, text)
    dataset.open()
    return dataset


@pytest.mark.parametrize("inside", ["", "dataset"])
def test_parquet_and_the_archive_give_the_same_rows(tmp_path, movies, inside):
    parquet = opened(write_parquet(tmp_path / "parquet", movies))
    raw = opened(write_raw(tmp_path / "raw", movies, inside))
    for split, entries in movies.items():
        everything = range(len(entries))
        assert parquet.ids(split) == raw.ids(split) == [row["imdb_id"] for row in entries]
        assert raw.read(split, "text", everything) == [row["plot"] for row in entries]
        assert parquet.read(split, "text", everything) == raw.read(split, "text", everything)
        for one, other in zip(
            parquet.read(split, "image", everything), raw.read(split, "image", everything), strict=True
        ):
            assert (one.mode, one.size) == ("RGB", (32, 48))
            assert np.array_equal(np.asarray(one), np.asarray(other))
        assert torch.equal(parquet.labels(split), raw.labels(split))
        assert parquet.labels(split).tolist() == [multi_hot(row["genres"]) for row in entries]
        assert parquet.labels(split).dtype == torch.uint8
    assert parquet.label_fingerprint() == raw.label_fingerprint()


def test_classes_are_those_of_mm_imdb_by_frequency():
    classes = MMIMDB("nowhere").classes
    assert len(set(classes)) == 23
    assert (classes[0], classes[10], classes[17], classes[-1]) == (
        "Drama",
        "Sci-Fi",
        "Animation",
        "Film-Noir",
    )


def test_shards_are_read_in_the_order_of_their_names(tmp_path, movies):
    path = Path(write_parquet(tmp_path, movies))
    (path / "train.parquet").unlink()
    for i, part in enumerate((movies["train"][:2], movies["train"][2:])):
        pq.write_table(pa.Table.from_pylist(part), path / f"train-0000{i}-of-00002.parquet")
    (path / "dev.parquet").rename(path / "val-00000-of-00001.parquet")
    dataset = opened(str(path))
    assert dataset.ids("train") == [row["imdb_id"] for row in movies["train"]]
    assert dataset.read("train", "text", [3, 0]) == [movies["train"][3]["plot"], movies["train"][0]["plot"]]
    assert dataset.labels("train").tolist() == [row["labels"] for row in movies["train"]]
    assert dataset.ids("val") == [row["imdb_id"] for row in movies["val"]]


def test_an_overview_is_added_where_it_says_more(tmp_path, movies):
    texts = opened(write_parquet(tmp_path, movies), "plot_and_overview").read("train", "text", range(4))
    plots = [row["plot"] for row in movies["train"]]
    assert texts == [plots[0], plots[1], plots[2] + " Overview 2.", plots[3]]


@pytest.mark.parametrize("kind", ["parquet", "raw"])
def test_fingerprint_covers_inputs_and_no_label(tmp_path, movies, kind):
    def prints(name: str) -> tuple[str, str]:
        write = write_parquet if kind == "parquet" else write_raw
        dataset = opened(write(tmp_path / name, movies))
        return dataset.fingerprint(), dataset.label_fingerprint()

    inputs, labels = prints("same")
    assert prints("copy") == (inputs, labels)

    train = movies["train"]
    train[0]["genres"], train[2]["genres"] = train[2]["genres"], train[0]["genres"]
    assert prints("labels")[0] == inputs
    assert prints("labels")[1] != labels

    movies["test"][1]["plot"] += "!"
    changed = prints("plot")[0]
    movies["val"][0]["poster"]["bytes"] += b"."
    poster = prints("poster")[0]
    movies["test"].reverse()
    assert len({inputs, changed, poster, prints("order")[0]}) == 4


@pytest.mark.parametrize("without", [("genres",), ("labels",), ("genres", "labels")])
def test_without_label_columns_the_inputs_are_the_same(tmp_path, movies, without):
    full = opened(write_parquet(tmp_path / "full", movies))
    dataset = opened(write_parquet(tmp_path / "less", movies, without))
    assert dataset.fingerprint() == full.fingerprint()
    assert LabelFree(dataset).read("val", "text", [1]) == full.read("val", "text", [1])
    if len(without) < 2:
        assert dataset.labels("train").tolist() == full.labels("train").tolist()
    else:
        with pytest.raises(
            InputError, match=r"dev\.parquet' has no column 'genres' .*or 'labels'.* it has: imdb"
        ):
            dataset.labels("val")


def test_open_reads_no_label_column(tmp_path, movies, monkeypatch):
    columns = []
    read_table = pq.read_table

    def spy(*args: Any, **kwargs: Any) -> Any:
        columns.append(kwargs["columns"])
        return read_table(*args, **kwargs)

    monkeypatch.setattr(pq, "read_table", spy)
    dataset = opened(write_parquet(tmp_path, movies))
    dataset.unreadable("train")
    dataset.fingerprint()
    dataset.open()
    assert columns == [["imdb_id", "poster", "plot"]] * 3


@pytest.mark.parametrize("kind", ["parquet", "raw"])
def test_unreadable_lists_corrupt_posters_and_empty_plots(tmp_path, movies, kind):
    train = movies["train"]
    train[0]["poster"] = {"bytes": train[0]["poster"]["bytes"][:-200], "path": "x"}  # opens, does not decode
    train[2]["poster"] = {"bytes": b"not a picture", "path": "x"}
    train[3]["plot"] = " \n" * 9
    dataset = opened((write_parquet if kind == "parquet" else write_raw)(tmp_path, movies))
    if kind == "raw":  # where row 3 has another plot
        (tmp_path / f"{train[4]['imdb_id']}.jpeg").unlink()
    reasons = dataset.unreadable("train")
    assert sorted(reasons) == ([0, 2, 3] if kind == "parquet" else [0, 2, 4])
    assert "truncated" in reasons[0]
    assert train[2]["imdb_id"] in reasons[2]
    assert "cannot identify" in reasons[2]
    if kind == "parquet":
        assert reasons[3] == "empty text"
    assert dataset.unreadable("val") == {}
    with pytest.raises(InputError, match="cannot read the poster"):
        dataset.read("train", "image", [2])

    labels, ids = dataset.labels("train"), dataset.ids("train")
    left = [row for row in range(5) if row not in reasons]
    before = dataset.fingerprint()
    dataset.drop({"train": sorted(reasons)})
    assert dataset.unreadable("train") == {}
    assert dataset.ids("train") == [ids[row] for row in left]
    assert torch.equal(dataset.labels("train"), labels[left])
    assert dataset.fingerprint() != before


def test_a_movie_without_poster_or_plot_is_unreadable(tmp_path, movies):
    movies["test"][1] |= {"poster": None, "plot": None}
    reasons = opened(write_parquet(tmp_path, movies)).unreadable("test")
    assert list(reasons) == [1]
    assert reasons[1].endswith("; empty text")


def test_a_missing_folder_says_how_to_get_the_data(tmp_path):
    with pytest.raises(InputError) as error:
        opened(str(tmp_path / "mmimdb"))
    for part in (
        str(tmp_path / "mmimdb"),
        "scripts/prepare_mmimdb.py",
        "dataset.path=",
        "python run.py experiment=ssl_nas_movies",
    ):
        assert part in str(error.value)


def test_missing_files_are_named(tmp_path, movies):
    path = Path(write_parquet(tmp_path, movies))
    (path / "dev.parquet").unlink()
    with pytest.raises(InputError, match=r"split\.json', or '.*dev\*\.parquet'; get MM-IMDB with"):
        opened(str(path))


@pytest.mark.parametrize("column", ["imdb_id", "poster", "plot"])
def test_a_missing_column_is_named(tmp_path, movies, column):
    path = write_parquet(tmp_path, movies, without=(column,))
    with pytest.raises(InputError, match=rf"train\.parquet' has no column '{column}'.* it has: .*genres"):
        opened(path)


def test_an_overview_that_is_not_there_is_refused(tmp_path, movies):
    with pytest.raises(InputError, match=r"no column 'overview'.* or set dataset\.text=plot"):
        opened(write_parquet(tmp_path / "parquet", movies, without=("overview",)), "plot_and_overview")
    with pytest.raises(InputError, match=r"archive, which has no overviews; set dataset\.text=plot"):
        opened(write_raw(tmp_path / "raw", movies), "plot_and_overview")
    with pytest.raises(InputError, match="'plot' or 'plot_and_overview', got 'title'"):
        MMIMDB("x", "title")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["parquet", "raw"])
def test_an_unknown_genre_is_named_with_its_movie(tmp_path, movies, kind):
    movies["val"][1]["genres"] = ["Drama", "Telenovela"]
    dataset = opened((write_parquet if kind == "parquet" else write_raw)(tmp_path, movies))
    with pytest.raises(
        InputError, match=r"'Telenovela' of the movie 'tt0000021'.*Known genres: Drama, Comedy"
    ):
        dataset.labels("val")


def test_labels_of_another_width_are_refused(tmp_path, movies):
    for row in movies["train"]:
        row["labels"] = row["labels"][:-1]
    dataset = opened(write_parquet(tmp_path, movies, without=("genres",)))
    with pytest.raises(InputError, match=r"'tt0000010'.* must be 23 numbers.* got 22"):
        dataset.labels("train")


def test_a_movie_in_two_splits_is_refused(tmp_path, movies):
    movies["test"][2]["imdb_id"] = movies["train"][0]["imdb_id"]
    with pytest.raises(InputError, match=r"'tt0000010' .*occurs twice, in train and in test"):
        opened(write_parquet(tmp_path, movies))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tt0000011.json", None, r"needs '.*tt0000011\.json', which split\.json asks for"),
        ("tt0000011.json", "{", r"cannot read '.*tt0000011\.json'"),
        ("tt0000011.json", '{"genres": []}', r"tt0000011\.json' has no 'plot'.* it has: genres"),
        ("split.json", '{"train": [], "test": []}', r"list of ids named 'dev'; it has: test, train"),
        ("split.json", '{"train": [], "dev": [], "test": []}', "no movie for the train split"),
        ("split.json", "[]", r"split\.json' must hold a JSON object, got list"),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path, movies, file, content, message):
    path = Path(write_raw(tmp_path, movies))
    (path / file).unlink()
    if content is not None:
        (path / file).write_text(content)
    with pytest.raises(InputError, match=message):
        opened(str(path))


def test_a_plot_may_be_a_text(tmp_path, movies):
    path = Path(write_raw(tmp_path, movies))
    (path / "tt0000010.json").write_text(json.dumps({"plot": "One plot only.", "genres": ["Drama"]}))
    (path / "tt0000011.json").write_text(json.dumps({"plot": [], "genres": ["Drama"]}))
    dataset = opened(str(path))
    assert dataset.read("train", "text", [0, 1]) == ["One plot only.", ""]
    assert dataset.unreadable("train") == {1: "empty text"}


def test_a_broken_parquet_file_is_refused(tmp_path, movies):
    path = Path(write_parquet(tmp_path, movies))
    (path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"cannot read '.*test\.parquet' as parquet"):
        opened(str(path))


@pytest.mark.posters
@pytest.mark.skipif(not (POSTERS / "train.parquet").is_file(), reason=f"no movie posters in {POSTERS}")
def test_real_posters():
    dataset = opened(str(POSTERS))
    assert [len(dataset.ids(split)) for split in SPLITS] == [2401, 402, 1197]
    labels = dataset.labels("val")
    assert labels.sum(0)[[0, 1, 22]].tolist() == [225, 150, 3]
    stored = pq.read_table(POSTERS / "dev.parquet", columns=["labels"])["labels"].to_pylist()
    assert labels.tolist() == stored
    assert dataset.unreadable("val") == {}
    poster = dataset.read("test", "image", [7])[0]
    assert poster.mode == "RGB"
    assert poster.width <= 160
    longer = opened(str(POSTERS), "plot_and_overview")
    assert longer.fingerprint() != dataset.fingerprint()

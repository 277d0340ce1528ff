"""The tabular check: conversion runs nothing, and what is looked up is what the published file says."""

import collections
import pickle

import pytest
import torch

from mmnas_lab.search_space.cnn_cells.bench_201 import Bench201Table, convert
from mmnas_lab.search_space.cnn_cells.genotype import bench_201_genotype
from mmnas_lab.search_space.cnn_cells.space import CnnCellSpace
from mmnas_lab.types import InputError

ARCHS = [
    "|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|",
    "|avg_pool_3x3~0|+|nor_conv_1x1~0|none~1|+|skip_connect~0|none~1|nor_conv_3x3~2|",
]


def run(offset, splits, epochs=200):
    """One trial as the file holds it: percentages of every epoch by set."""
    reached = {f"{split}@{epoch}": 10.0 + offset for split in splits for epoch in range(epochs - 1)}
    reached |= {f"{split}@{epochs - 1}": 50.0 + offset + k for k, split in enumerate(splits)}
    return {
        "name": "infer.tiny",
        "epochs": epochs,
        "eval_acc1es": collections.OrderedDict(reached),
        "params": 0.3 + offset,
        "flop": 40.0,
        "net_state_dict": {"weight": torch.zeros(2)},
    }


def published(path):
    infos = {}
    for index in range(len(ARCHS)):
        results = {
            ("cifar10-valid", 777): run(index, ["x-valid", "ori-test"]),
            ("cifar10", 777): run(index, ["ori-test"]),
            ("cifar10", 888): run(index + 2, ["ori-test"]),
            ("cifar100", 777): run(index, ["x-valid", "x-test", "ori-test"]),
        }
        infos[index] = {"full": {"arch_index": index, "all_results": results}, "less": {}}
    data = {"meta_archs": ARCHS, "arch2infos": infos, "evaluated_indexes": [0, 1]}
    torch.save(data, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture
def table(tmp_path):
    assert convert(published(tmp_path / "bench.pth"), tmp_path / "sub" / "table.parquet") == 2
    return tmp_path / "sub" / "table.parquet"


def test_a_cell_has_the_means_over_seeds_of_the_last_epoch(table):
    found = Bench201Table(table).look_up(bench_201_genotype(ARCHS[0]))
    assert found["cifar10.val"] == pytest.approx(0.50)
    assert found["cifar10.test"] == pytest.approx(0.51)  # of 50 and 52
    assert found["cifar100.val"] == pytest.approx(0.50)
    assert found["cifar100.test"] == pytest.approx(0.51)
    assert found["cifar100.test.rank"] == 2
    assert found["cifar100.test.best"] == pytest.approx(0.52)
    assert not any(name.startswith("imagenet") for name in found)
    assert found["flops_millions"] == 40


def test_the_order_of_edges_does_not_matter(table):
    reordered = "|avg_pool_3x3~0|+|none~1|nor_conv_1x1~0|+|nor_conv_3x3~2|skip_connect~0|none~1|"
    both = [Bench201Table(table).look_up(bench_201_genotype(text)) for text in (reordered, ARCHS[1])]
    assert both[0] == both[1]
    assert both[0]["cifar100.test.rank"] == 1


def test_the_space_looks_cells_up(table):
    space = CnnCellSpace(vocabulary="nas_bench_201", table=str(table))
    assert space.benchmark(space.published(ARCHS[1]))["cifar10.test"] == pytest.approx(0.52)
    assert CnnCellSpace(vocabulary="nas_bench_201").benchmark(space.published(ARCHS[1])) == {}
    with pytest.raises(InputError, match="vocabulary=nas_bench_201"):
        CnnCellSpace(table=str(table))


class Runs:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("kind", ["code", "other", "missing", "cut"])
def test_files_that_are_not_the_benchmark_are_refused(kind, tmp_path, capsys):
    path = tmp_path / "bench.pth"
    if kind == "code":
        path.write_bytes(pickle.dumps({"meta_archs": Runs(), "arch2infos": {}}))
    elif kind == "other":
        torch.save({"weights": torch.zeros(2)}, path)
    elif kind == "cut":
        published(path)
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="bench.pth"):
        convert(path, tmp_path / "table.parquet")
    assert "run" not in capsys.readouterr().out


def test_bad_tables_are_refused(tmp_path, table):
    with pytest.raises(InputError, match="prepare_nas_bench_201"):
        Bench201Table(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(InputError, match="prepare_nas_bench_201"):
        Bench201Table(tmp_path / "text.parquet")
    other = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
    with pytest.raises(InputError, match="no cell"):
        Bench201Table(table).look_up(bench_201_genotype(other))

"""NAS-Bench-201 as a table: what each of its 15,625 cells reaches when trained for 200 epochs.

The published file (arXiv 2001.00326, `NAS-Bench-201-v1_1-096897.pth`) is a pickle of 4.7 GB; `convert` reads
it without running what is in it, and keeps a small parquet file of means over seeds.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmnas_lab.search_space.cnn_cells.genotype import CnnGenotype, bench_201_genotype, bench_201_string
from mmnas_lab.types import InputError

SPLITS = {
    "cifar10-valid": {"x-valid": "cifar10.val"},
    "cifar10": {"ori-test": "cifar10.test"},
    "cifar100": {"x-valid": "cifar100.val", "x-test": "cifar100.test"},
    "ImageNet16-120": {"x-valid": "imagenet16_120.val", "x-test": "imagenet16_120.test"},
}
"""For each training set of the benchmark the sets that are evaluated, and our names of these columns."""
REMEDY = "convert the published file once: scripts/prepare_nas_bench_201.py <file.pth> <table.parquet>"


def convert(published: Path, table: Path) -> int:
    """Write the table of a published file; the number of cells.

    Raises:
        InputError: a file that is missing, is not the benchmark's, or names code to run.
    """
    import torch

    if not published.is_file():
        raise InputError(
            f"no file '{published}'; give the NAS-Bench-201-v1_1-096897.pth that its authors share"
        )
    try:
        data = torch.load(published, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"'{published}' is no benchmark file that can be read safely: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(data, Mapping) or not {"meta_archs", "arch2infos"} <= data.keys():
        raise InputError(
            f"'{published}' has no 'meta_archs' and 'arch2infos': it is not NAS-Bench-201's file"
        )
    rows = [
        {"arch": data["meta_archs"][index], **_row(infos["full"])}
        for index, infos in sorted(data["arch2infos"].items())
    ]
    table.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), table, compression="zstd")
    return len(rows)


def _row(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Means over seeds of the accuracies after the last epoch, as fractions; None where one is absent."""
    row: dict[str, float | None] = {}
    for dataset, splits in SPLITS.items():
        runs = [run for (name, _), run in results["all_results"].items() if name == dataset]
        for split, column in splits.items():
            reached = [
                run["eval_acc1es"][key] / 100
                for run in runs
                if (key := f"{split}@{run['epochs'] - 1}") in run["eval_acc1es"]
            ]
            row[column] = float(np.mean(reached)) if reached else None
    every = list(results["all_results"].values())
    row["parameters_millions"] = float(np.mean([run["params"] for run in every]))
    row["flops_millions"] = float(np.mean([run["flop"] for run in every]))
    return row


class Bench201Table:
    """The converted table.

    Args:
        path: what `convert` wrote.

    Raises:
        InputError: a missing file, or one that is not such a table.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"search_space.table: no file '{path}'; {REMEDY}")
        try:
            table = pq.read_table(path)
            archs = table.column("arch").to_pylist()
        except (pa.ArrowInvalid, KeyError) as error:
            raise InputError(
                f"search_space.table: '{path}' is no converted table ({error}); {REMEDY}"
            ) from None
        self.rows = {bench_201_string(bench_201_genotype(arch)): row for row, arch in enumerate(archs)}
        self.columns: dict[str, Any] = {
            name: np.array(table.column(name).to_pylist(), dtype=float)
            for name in table.column_names
            if name != "arch"
        }

    def look_up(self, genotype: CnnGenotype) -> dict[str, float]:
        """The cell's row; for each accuracy also `<name>.rank`, 1 for the best cell, and `<name>.best`.

        Raises:
            InputError: a cell that the table has not.
        """
        text = bench_201_string(genotype)
        if text not in self.rows:
            raise InputError(f"the table has no cell {text}; convert the whole published file")
        found: dict[str, float] = {}
        for name, values in self.columns.items():
            value = values[self.rows[text]]
            if np.isnan(value):
                continue
            found[name] = float(value)
            if name.endswith((".val", ".test")):
                found[f"{name}.rank"] = int((values > value).sum()) + 1
                found[f"{name}.best"] = float(np.nanmax(values))
        return found

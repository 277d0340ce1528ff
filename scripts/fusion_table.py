"""Train every single-cell fusion genotype of a dataset, and see where searches land in that table.

    python scripts/fusion_table.py dataset.path=<movie_posters>          (or `make fusion-table`)

One row of `results/fusion_table.jsonl` for each (genotype, seed): all ordered pairs of features times the
operations (N = 1, M = 1) with one seed, then the best ones on val and every searched genotype with five
fresh seeds. Searches (objective x views x pairing x seed) are rows of `results/fusion_table_searches.jsonl`;
the defaults were chosen on the first three seeds of the search, the other three were not looked at before.
That single genotypes are compared by their loss was chosen on the first five seeds, the other four were not
looked at before.
Both files are appended to; what is in them is not computed again. `scripts/report.py results` writes the
tables from them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmnas_lab.report.fusion_table import BY_LOSS, SEEDS_TUNED_ON
from mmnas_lab.study import compose, open_experiment, row_environment
from mmnas_lab.study_rows import append, read_rows

log = logging.getLogger("fusion_table")

BASE = [
    "experiment=ssl_nas_mmimdb",
    "scale=cpu",
    "search_space.num_cells=1",
    "labelled_share=0.3",
    "pretrain.epochs=0",
    "baselines=[]",
]
FRESH_SEEDS = (1, 2, 3, 4, 5)
SEARCH_SEEDS = (*SEEDS_TUNED_ON, 3, 4, 5)
SEARCH_SEEDS_BY_LOSS = (*SEARCH_SEEDS, 6, 7, 8)
TOP = 20
SEARCHES = {
    "nt_xent, modality-dropping views": ["strategy=bilevel"],
    BY_LOSS: ["strategy=bilevel_by_loss"],
    "nt_xent, plain views": ["strategy=bilevel", "search.views.drop_modality=0"],
    "supervised": ["experiment=bm_nas_mmimdb"],
}


def name_of(genotype: dict[str, Any]) -> str:
    """A single-cell genotype as text."""
    (cell,) = genotype["cells"]
    x, y = cell["inputs"]
    return f"({x}, {y}, {cell['steps'][0]['op']})"


class Table:
    """The rows of the study, on disk and by key."""

    def __init__(self, folder: Path, overrides: list[str], shard: tuple[int, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows_file = folder / "fusion_table.jsonl"
        self.searches_file = folder / "fusion_table_searches.jsonl"
        self.overrides, self.shard = overrides, shard

    def mine(self, number: int) -> bool:
        """Whether this process computes the item of that number."""
        return number % self.shard[1] == self.shard[0]

    def train(self, genotypes: list[dict[str, Any]], seeds: tuple[int, ...]) -> None:
        """Train each genotype with each seed, unless its row is there."""
        for seed in seeds:
            have = {(row["genotype"], row["seed"]) for row in read_rows(self.rows_file)}
            todo = [g for k, g in enumerate(genotypes) if (name_of(g), seed) not in have and self.mine(k)]
            if not todo:
                continue
            experiment = open_experiment(compose([*BASE, f"seed={seed}", *self.overrides]))
            started = time.monotonic()
            for k, data in enumerate(todo):
                genotype = experiment.space.parse(data, experiment.data.cache.infos)
                found = experiment.evaluate(genotype, "table")
                append(
                    self.rows_file,
                    {
                        "genotype": name_of(data),
                        "seed": seed,
                        "val": found.metrics["val"]["f1_weighted"],
                        "test": found.metrics["test"]["f1_weighted"],
                        "seconds": round(found.stages["train"].seconds, 2),
                        **row_environment(experiment),
                    },
                )
                left = (time.monotonic() - started) / (k + 1) * (len(todo) - k - 1)
                log.info("seed %d: %d of %d, about %.0f s left", seed, k + 1, len(todo), left)

    def search(self) -> None:
        """Every search, unless its row is there."""
        for number, (kind, pairing, seed) in enumerate(searches()):
            if not self.mine(number):
                continue
            overrides = [
                *BASE,
                *SEARCHES[kind],
                f"search_space.pairing={pairing}",
                f"seed={seed}",
                *self.overrides,
            ]
            config = compose(overrides)
            have = {
                (row["search"], row["pairing"], row["seed"], row["arch_lr"])
                for row in read_rows(self.searches_file)
            }
            if (kind, pairing, seed, config["search"]["arch_optimizer"]["lr"]) in have:
                continue
            experiment = open_experiment(config)
            genotype = experiment.genotype()
            result = experiment.results["search"]
            append(
                self.searches_file,
                {
                    "search": kind,
                    "pairing": pairing,
                    "seed": seed,
                    "arch_lr": config["search"]["arch_optimizer"]["lr"],
                    "genotype": name_of(genotype.to_json()),
                    "genotype_json": genotype.to_json(),
                    "margins": json.loads((result.folder / "margins.json").read_text()),
                    "seconds": round(result.seconds, 2),
                    **row_environment(experiment),
                },
            )
            log.info("%s, %s, seed %d: %s", kind, pairing, seed, name_of(genotype.to_json()))


def searches() -> Iterator[tuple[str, str, int]]:
    """All searches of the study; the shared hypernet cannot stand for the single genotypes of `BY_LOSS`."""
    for kind in SEARCHES:
        pairings = ("distinct",) if kind == BY_LOSS else ("distinct", "shared")
        seeds = SEARCH_SEEDS_BY_LOSS if kind == BY_LOSS else SEARCH_SEEDS
        yield from product([kind], pairings, seeds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", help="Hydra overrides for every run, dataset.path=... above all"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the rows")
    parser.add_argument("--shard", default="0/1", help="k/n: compute every n-th item, from the k-th on")
    parser.add_argument("--phase", choices=["all", "grid", "search", "fresh"], default="all")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("mmnas_lab").setLevel(logging.WARNING)
    index, count = (int(part) for part in arguments.shard.split("/"))
    table = Table(arguments.out, arguments.overrides, (index, count))
    experiment = open_experiment(compose([*BASE, *arguments.overrides]))
    grid = [genotype.to_json() for genotype in experiment.space.all_single_cells(experiment.data.cache.infos)]
    if arguments.phase in ("all", "search"):
        table.search()
    if arguments.phase in ("all", "grid"):
        table.train(grid, (0,))
    if arguments.phase in ("all", "fresh"):
        val = {row["genotype"]: row["val"] for row in read_rows(table.rows_file) if row["seed"] == 0}
        best = sorted(grid, key=lambda genotype: -val[name_of(genotype)])[:TOP]
        found = {row["genotype"] for row in read_rows(table.searches_file)}
        chosen = best + [genotype for genotype in grid if name_of(genotype) in found and genotype not in best]
        table.train(chosen, FRESH_SEEDS)


if __name__ == "__main__":
    main()

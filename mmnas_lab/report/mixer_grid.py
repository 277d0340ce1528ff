"""The study of MixMAS' greedy search against a whole grid as a page and a figure, from its rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mmnas_lab.report.studies import verdict, write_text
from mmnas_lab.report.tables import Interval, markdown_table, mean_interval, paired_interval
from mmnas_lab.study_rows import read_rows

ROWS = "mixmas_grid.jsonl"
DATASETS = {"utd_mhad": "UTD-MHAD", "physionet2012": "PhysioNet 2012"}
NETWORKS_OF = {"utd_mhad": 24, "physionet2012": 18}
SEEDS = 3
RESAMPLES = 2000
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """What is known of a dataset: of seeds under which every network of it was trained.

    Attributes:
        samples: by split.
        metric: that selects, of full training.
        micro_metric: of the micro-benchmarks.
        seeds: whose rows are whole.
        micro: micro-benchmark score by network, one a seed, the mean of the search's own seeds.
        val: after full training, likewise.
        test: likewise.
        chosen: the greedy choice, by seed.
        search_seconds: by seed.
        grid_seconds: of the full trainings, by seed.
    """

    samples: Mapping[str, int]
    metric: str
    micro_metric: str
    seeds: tuple[int, ...]
    micro: dict[str, list[float]]
    val: dict[str, list[float]]
    test: dict[str, list[float]]
    chosen: dict[int, str]
    search_seconds: dict[int, float]
    grid_seconds: dict[int, float]

    def level(self, split: str, network: str) -> float:
        """Mean over the seeds of the full training."""
        return fmean(self._scores(split)[network])

    @property
    def best_on_val(self) -> str:
        """The network with the highest level on val."""
        return max(self.val, key=lambda network: self.level("val", network))

    def regrets(self, split: str) -> list[float]:
        """By seed, the network that is best on val in the mean minus that seed's choice, in points."""
        scores, best = self._scores(split), self.best_on_val
        return [100 * (scores[best][k] - scores[self.chosen[seed]][k]) for k, seed in enumerate(self.seeds)]

    def gains(self, split: str) -> list[float]:
        """By seed, that seed's choice minus the mean of the grid, in points."""
        scores = self._scores(split)
        return [
            100 * (scores[self.chosen[seed]][k] - fmean(values[k] for values in scores.values()))
            for k, seed in enumerate(self.seeds)
        ]

    def _scores(self, split: str) -> dict[str, list[float]]:
        return self.val if split == "val" else self.test


def gather(rows: Sequence[Row], dataset: str, planned: int) -> Grid | None:
    """The grid of a dataset, from its seeds of which `planned` networks and the search are there."""
    own = [row for row in rows if row["dataset"] == dataset]
    searches = {row["seed"]: row for row in own if row["kind"] == "search"}
    by_seed: dict[int, dict[str, Row]] = {}
    for row in own:
        if row["kind"] == "network":
            by_seed.setdefault(row["seed"], {})[row["network"]] = row
    seeds = tuple(seed for seed in sorted(by_seed) if len(by_seed[seed]) == planned and seed in searches)
    if not seeds:
        return None
    first = by_seed[seeds[0]]
    any_row = next(iter(first.values()))
    metric = str(any_row["selected_by"]).removeprefix("val_")

    def values(split: str) -> dict[str, list[float]]:
        return {name: [by_seed[seed][name][split][metric] for seed in seeds] for name in first}

    return Grid(
        any_row["samples"],
        metric,
        any_row["micro_metric"],
        seeds,
        {name: [fmean(by_seed[seed][name]["micro"]) for seed in seeds] for name in first},
        values("val"),
        values("test"),
        {seed: searches[seed]["network"] for seed in seeds},
        {seed: searches[seed]["search_seconds"] for seed in seeds},
        {seed: sum(row["train_seconds"] for row in by_seed[seed].values()) for seed in seeds},
    )


def kendall(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Kendall's tau-b of two scores of the same networks, and its p-value; nan where one has no order."""
    from scipy.stats import kendalltau

    result = kendalltau(a, b)
    return float(result.statistic), float(result.pvalue)


def tau_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Kendall's tau-b with the 95 % percentile interval of a bootstrap over networks."""
    draw, first, second = np.random.default_rng(0), np.asarray(a), np.asarray(b)
    taus = []
    for _ in range(RESAMPLES):
        rows = draw.integers(len(first), size=len(first))
        taus.append(kendall(first[rows].tolist(), second[rows].tolist())[0])
    low, high = np.nanquantile(taus, [0.025, 0.975])
    return Interval(kendall(a, b)[0], float(low), float(high))


def report_mixer_grid(results: Path) -> list[Path]:
    """`mixmas_grid.md` and its figure."""
    rows = read_rows(results / ROWS)
    grids = {
        dataset: grid
        for dataset, planned in NETWORKS_OF.items()
        if (grid := gather(rows, dataset, planned)) is not None
    }
    if not grids:
        return []
    figure = _figure(results / "mixmas_grid.png", grids)
    parts = [
        "# MixMAS' greedy search against the exhaustive grid (our own small-scale study)",
        "Small vocabularies, of which every network is trained: UTD-MHAD (skeleton, inertial sensor and "
        "depth as 8 frames of 30 x 40) with two encoders each for skeleton and sensor, PhysioNet 2012 with "
        "three for the series; three fusion functions and two fusion networks. Sizes of `scale=cpu`, few "
        "epochs. Ours, at this scale; not to be set beside the paper's figures. What was looked for was "
        "written down before the first run, in `scripts/mixmas_grid.py`.",
        "A network is named after its encoders (of skeleton, sensor and depth; of series and table), its "
        "fusion function and its fusion network. Its level is its mean over the seeds of the full "
        "training. Regret is the network of the highest level on val minus the greedy choice of a seed, both "
        "as trained under that seed, in points; on test it may be negative, and on val it favours the grid, "
        "whose best one is chosen there. Intervals are 95 %; over seeds they are "
        f"Student's, of tau they are a bootstrap over networks ({RESAMPLES} resamples).",
        *(_dataset(dataset, grid) for dataset, grid in grids.items()),
        f"![micro-benchmark score against full training]({figure.name})",
        _provenance(rows, grids),
    ]
    return [write_text(results / "mixmas_grid.md", "\n\n".join(parts) + "\n"), figure]


def _points(values: Sequence[float]) -> str:
    """Each seed's figure, their mean and its interval."""
    each = ", ".join(f"{value:.1f}" for value in values)
    interval = mean_interval(values)
    end = "" if len(values) < 2 else f" [{interval.low:+.1f}, {interval.high:+.1f}]"
    return f"{each}; mean {interval.mean:+.1f}{end}"


def _tau(interval: Interval) -> str:
    said = "positive" if interval.low > 0 else "negative" if interval.high < 0 else "undecided"
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}] {said}"


def _dataset(dataset: str, grid: Grid) -> str:
    ranked = sorted(grid.val, key=lambda network: -grid.level("val", network))
    taken = {name: [seed for seed in grid.seeds if grid.chosen[seed] == name] for name in ranked}
    table = [
        {
            "rank": rank,
            "network": name,
            "micro-benchmark": f"{fmean(grid.micro[name]):.3f}",
            "val": _level(grid.val[name]),
            "test": _level(grid.test[name]),
            "greedy choice of seeds": ", ".join(map(str, taken[name])),
        }
        for rank, name in enumerate(ranked, 1)
    ]
    micro, val, test = ([fmean(by[name]) for name in ranked] for by in (grid.micro, grid.val, grid.test))
    regrets, gains = ({split: of(split) for split in ("val", "test")} for of in (grid.regrets, grid.gains))
    lines = [
        f"- regret of the greedy choice by search seed, val: {_points(regrets['val'])}",
        f"- the same on test: {_points(regrets['test'])}",
        "- greedy choice minus the mean of the grid (a random pick), test: "
        + verdict(paired_interval(gains["test"], [0.0] * len(grid.seeds))),
        f"- tau of micro-benchmark against val after full training, means of all seeds: "
        f"{_tau(tau_interval(micro, val))}; against test {_tau(tau_interval(micro, test))}",
        "- tau of one seed's micro-benchmarks against the same val means: "
        + ", ".join(_told(*kendall([grid.micro[n][k] for n in ranked], val)) for k in range(len(grid.seeds))),
    ]
    if len(grid.seeds) > 1:
        pairs = [
            kendall([grid.val[n][a] for n in ranked], [grid.val[n][b] for n in ranked])[0]
            for a, b in combinations(range(len(grid.seeds)), 2)
        ]
        lines.append(
            f"- tau of val between full trainings of two seeds, what noise leaves: {fmean(pairs):.2f}"
        )
    lines.append(
        f"- time: a search {fmean(grid.search_seconds.values()):.0f} s, all full trainings "
        f"{fmean(grid.grid_seconds.values()):.0f} s a seed"
    )
    return "\n\n".join(
        [
            f"## {DATASETS[dataset]}",
            f"{len(ranked)} networks, {len(grid.seeds)} seed{'s' * (len(grid.seeds) > 1)}; "
            f"{grid.samples['train']:,} training, "
            f"{grid.samples['val']:,} val and {grid.samples['test']:,} test samples; full training is "
            f"selected and compared by {grid.metric}, micro-benchmarks score {grid.micro_metric}.",
            "\n".join(lines),
            markdown_table(table, list(table[0])),
        ]
    )


def _told(tau: float, p: float) -> str:
    return f"{tau:.2f} (p = {p:.2g})"


def _level(values: Sequence[float]) -> str:
    spread = "" if len(values) < 2 else f" ± {np.std(values, ddof=1):.3f}"
    return f"{fmean(values):.3f}{spread}"


def _provenance(rows: Sequence[Row], grids: Mapping[str, Grid]) -> str:
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    hardware = "; ".join(sorted({row["hardware"] for row in rows}))
    missing = [
        f"{DATASETS[dataset]} {len(grids[dataset].seeds) if dataset in grids else 0} of {SEEDS}"
        for dataset in DATASETS
        if dataset not in grids or len(grids[dataset].seeds) < SEEDS
    ]
    state = f" Not whole yet: seeds of {', '.join(missing)}." if missing else ""
    return (
        "In the tables ± is the standard deviation over seeds. Command: `python scripts/mixmas_grid.py "
        f"--utd_mhad <folder> --physionet2012 <folder>`. Commit {commits}; {hardware}.{state}"
    )


def _figure(path: Path, grids: Mapping[str, Grid]) -> Path:
    from matplotlib.figure import Figure

    from mmnas_lab.report.curves import INK, PALETTE

    figure = Figure(figsize=(5 * len(grids), 4.2), layout="constrained")
    every = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (dataset, grid) in zip(every, grids.items(), strict=True):
        functions = list(dict.fromkeys(name.split(", ")[-2] for name in grid.val))
        for name in grid.val:
            function, network = name.split(", ")[-2:]
            axes.plot(
                fmean(grid.micro[name]),
                grid.level("val", name),
                "o" if network == "mlp_mixer" else "s",
                color=PALETTE[functions.index(function)],
                markersize=6,
                alpha=0.85,
            )
        for name in set(grid.chosen.values()):
            axes.plot(
                fmean(grid.micro[name]),
                grid.level("val", name),
                "o",
                markersize=14,
                markerfacecolor="none",
                markeredgecolor=INK,
                markeredgewidth=1.5,
            )
        for k, function in enumerate(functions):
            axes.plot([], [], "o", color=PALETTE[k], label=function)
        axes.plot([], [], "o", color="#888888", label="MLP-Mixer fuses")
        axes.plot([], [], "s", color="#888888", label="HyperMixer fuses")
        axes.plot(
            [], [], "o", markersize=11, markerfacecolor="none", markeredgecolor=INK, label="greedy choice"
        )
        tau = kendall([fmean(grid.micro[n]) for n in grid.val], [grid.level("val", n) for n in grid.val])[0]
        axes.set(
            title=f"{DATASETS[dataset]}: {len(grid.val)} networks, tau {tau:.2f}",
            xlabel=f"micro-benchmark, {grid.micro_metric}",
            ylabel=f"full training, val {grid.metric}",
        )
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e5e5")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    return path

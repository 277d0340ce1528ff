"""The study of mechanisms on cells as a page and a figure, from its rows alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmnas_lab.report.studies import verdict, write_text
from mmnas_lab.report.tables import markdown_table, mean_interval, paired_interval
from mmnas_lab.search_space.cnn_cells.vocabulary import SAME_ON_ALL_EDGES
from mmnas_lab.study_rows import read_rows

ROWS = "cell_mechanisms.jsonl"
LOW, HIGH = (0.1, 0.3), (0.5, 0.7, 0.9)
"""Mask ratios below which MAE-NAS reports collapse, and those from which it does not."""
UNDECIDED = (0.2, 0.8)
SKIP = SAME_ON_ALL_EDGES["darts"].index("skip_connect")
NUM_OPS = len(SAME_ON_ALL_EDGES["darts"])
Row = Mapping[str, Any]
BySeed = dict[int, float]


def report_mechanisms(results: Path) -> list[Path]:
    """`cell_mechanisms.md` and its figure."""
    rows = [row for row in read_rows(results / ROWS) if "overrides" not in row]
    if not rows:
        return []
    figure = _figure(results / "cell_mechanisms.png", rows)
    parts = [
        "# Mechanisms of cell searches, measured on small supernets",
        "Real CIFAR-10 (recompressed), pictures of 16 x 16 instead of 32 x 32; supernets of 3 cells of 2 "
        "nodes with C 4 (the papers: 8 cells of 4 nodes, C 16), so a cell keeps 4 of 5 edges; 1,022 or "
        "1,044 steps of the architecture. Ours, at this scale; not to be set beside the papers' figures. "
        "What was looked for was written down before the first run, in `scripts/cell_mechanisms.py`. "
        "Intervals are 95 %, paired over seeds where two arms are compared.",
        _masking(rows),
        _sharpening(rows),
        _long_tail(rows),
        f"![skips, weights and accuracies]({figure.name})",
        _provenance(rows),
    ]
    return [write_text(results / "cell_mechanisms.md", "\n\n".join(parts) + "\n"), figure]


def skip_weight(row: Row) -> float:
    """Mean softmax weight of the skip connection over the edges of the normal cell."""
    weights: Sequence[float] = row["mixing"]["alpha_normal"]
    every = weights[SKIP::NUM_OPS]
    return sum(every) / len(every)


def undecided_share(row: Row) -> float:
    """Share of the sigmoid weights that lie between 0.2 and 0.8."""
    weights = [weight for part in row["mixing"].values() for weight in part]
    return sum(UNDECIDED[0] < weight < UNDECIDED[1] for weight in weights) / len(weights)


def _select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if wanted.items() <= row.items()]


def _by_seed(rows: Sequence[Row], value: Any) -> BySeed:
    """Mean of a value over the rows of each seed."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        found[row["seed"]].append(value(row))
    return {seed: sum(values) / len(values) for seed, values in sorted(found.items())}


def _mean(values: BySeed, digits: int = 2) -> str | None:
    if not values:
        return None
    interval = mean_interval(list(values.values()))
    end = "" if math.isnan(interval.low) else f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    return f"{interval.mean:.{digits}f}{end}"


def _difference(a: BySeed, b: BySeed, scale: float = 1.0) -> str:
    seeds = sorted(set(a) & set(b))
    if not seeds:
        return "not measured yet"
    return verdict(paired_interval([scale * a[s] for s in seeds], [scale * b[s] for s in seeds]))


def _masking(rows: Sequence[Row]) -> str:
    own = _select(rows, study="a")
    table = [
        {
            "decoder": decoder,
            "mask ratio": ratio,
            "seeds": len(cell),
            "skips in the normal cell, of 4": _mean(_by_seed(cell, lambda row: row["skips_normal"])),
            "mean weight of a skip": _mean(_by_seed(cell, skip_weight), 4),
        }
        for decoder in ("hierarchical", "plain")
        for ratio in (*LOW, *HIGH)
        if (cell := _select(own, decoder=decoder, mask_ratio=ratio))
    ]

    def skips(decoder: str | None, ratios: Sequence[float]) -> BySeed:
        part = [row for row in own if row["mask_ratio"] in ratios and decoder in (None, row["decoder"])]
        return _by_seed(part, lambda row: row["skips_normal"])

    lines = [
        f"- ratio 0.5 and above minus below, {decoder} decoder: "
        + _difference(skips(decoder, HIGH), skips(decoder, LOW))
        for decoder in ("hierarchical", "plain")
    ]
    every = (*LOW, *HIGH)
    decoders = _difference(skips("hierarchical", every), skips("plain", every))
    lines.append(f"- hierarchical minus plain decoder, all ratios: {decoders}")
    return "\n\n".join(
        [
            "## (a) Skip connections against mask ratio and decoder",
            "Looked for: fewer skips at 0.5 and above than at 0.1 and 0.3, and fewer with the hierarchical "
            "decoder.",
            markdown_table(table, list(table[0])) if table else "not measured yet",
            "Differences in number of skips:\n\n" + "\n".join(lines),
        ]
    )


def _sharpening(rows: Sequence[Row]) -> str:
    arms = {on: _by_seed(_select(rows, study="b", zero_one=on), undecided_share) for on in (True, False)}
    return "\n\n".join(
        [
            "## (b) Sigmoid weights with and without the zero-one loss",
            "Looked for: fewer weights between 0.2 and 0.8 with it.",
            f"Share of weights between 0.2 and 0.8: with it {_mean(arms[True])}, without it "
            f"{_mean(arms[False])}; difference in points of per cent "
            f"{_difference(arms[True], arms[False], 100)}.",
        ]
    )


def _long_tail(rows: Sequence[Row]) -> str:
    own = _select(rows, study="c")

    def scores(relaxation: str, objective: str | None, name: str = "accuracy") -> BySeed:
        wanted = {"relaxation": relaxation, **({"objective": objective} if objective else {})}
        return _by_seed(_select(own, **wanted), lambda row: row["test"][name])

    arms = [
        (relaxation, objective)
        for relaxation in ("softmax", "sigmoid_zero_one")
        for objective in ("supervised", "barlow_twins")
    ]
    table = [
        {
            "relaxation": relaxation.replace("_zero_one", " + zero-one"),
            "objective": objective.replace("_", " "),
            "seeds": len(scores(relaxation, objective)),
            "balanced test accuracy": _mean(scores(relaxation, objective), 4),
            "long-tailed test accuracy": _mean(scores(relaxation, objective, "accuracy_long_tailed"), 4),
        }
        for relaxation, objective in [*arms, ("random", "none")]
        if scores(relaxation, objective)
    ]
    comparisons = {
        "Barlow Twins minus cross-entropy, softmax": (arms[1], arms[0]),
        "Barlow Twins minus cross-entropy, sigmoid + zero-one": (arms[3], arms[2]),
        "sigmoid + zero-one minus softmax, cross-entropy": (arms[2], arms[0]),
        "sigmoid + zero-one minus softmax, Barlow Twins": (arms[3], arms[1]),
        "softmax with cross-entropy minus random cells": (arms[0], ("random", "none")),
        "sigmoid + zero-one with Barlow Twins minus random cells": (arms[3], ("random", "none")),
    }
    lines = [
        f"- {name}: {_difference(scores(*first), scores(*second), 100)}"
        for name, (first, second) in comparisons.items()
    ]
    return "\n\n".join(
        [
            "## (c) Relaxation and objective on long-tailed CIFAR-10",
            "Exponential, mu 0.01. The same retraining for all cells: 5 cells, C 8, 10 epochs (the papers "
            "train hundreds), so the networks are far from converged. Random cells: two a seed, their mean. "
            "Looked for: Barlow Twins above cross-entropy, sigmoid with zero-one above softmax, all above "
            "random cells.",
            markdown_table(table, list(table[0])) if table else "not measured yet",
            "Differences in points of balanced accuracy:\n\n" + "\n".join(lines),
        ]
    )


def _provenance(rows: Sequence[Row]) -> str:
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    hardware = "; ".join(sorted({row["hardware"] for row in rows}))
    counts = {study: len(_select(rows, study=study)) for study in "abc"}
    planned = {"a": 30, "b": 6, "c": 18}
    missing = ", ".join(
        f"({study}) has {counts[study]} of {planned[study]} runs"
        for study in "abc"
        if counts[study] < planned[study]
    )
    state = f" Not whole yet: {missing}; the command goes on from the rows." if missing else ""
    return (
        "Command: `python scripts/cell_mechanisms.py --path <cifar10>`. "
        f"Commit {commits}; {hardware}; seeds 0 to 2.{state}"
    )


def _figure(path: Path, rows: Sequence[Row]) -> Path:
    from matplotlib.figure import Figure

    from mmnas_lab.report.curves import GREY, INK, PALETTE

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for k, decoder in enumerate(("hierarchical", "plain")):
        own = _select(rows, study="a", decoder=decoder)
        ratios = sorted({row["mask_ratio"] for row in own})
        cells = [_select(own, mask_ratio=ratio) for ratio in ratios]
        shift = 0.012 * (2 * k - 1)
        for ratio, cell in zip(ratios, cells, strict=True):
            skips = [row["skips_normal"] for row in cell]
            left.plot([ratio + shift] * len(skips), skips, "o", color=PALETTE[k], alpha=0.35, markersize=5)
        means = [sum(row["skips_normal"] for row in cell) / len(cell) for cell in cells]
        left.plot([ratio + shift for ratio in ratios], means, color=PALETTE[k], linewidth=2, label=decoder)
    left.set(
        title="(a) skips in the normal cell", xlabel="mask ratio", ylabel="of 4 operations", ylim=(-0.2, 4.2)
    )
    left.legend(frameon=False, title="decoder")
    for on, colour, label in ((False, GREY, "without"), (True, PALETTE[0], "with zero-one")):
        own = _select(rows, study="b", zero_one=on)
        weights = [weight for row in own for part in row["mixing"].values() for weight in part]
        if weights:
            middle.hist(weights, bins=[k / 25 for k in range(26)], color=colour, alpha=0.75, label=label)
    middle.set(title="(b) sigmoid weights at the end", xlabel="weight", ylabel="number of weights")
    middle.legend(frameon=False)
    names = {
        ("softmax", "supervised"): "softmax,\ncross-entropy",
        ("softmax", "barlow_twins"): "softmax,\nBarlow Twins",
        ("sigmoid_zero_one", "supervised"): "sigmoid,\ncross-entropy",
        ("sigmoid_zero_one", "barlow_twins"): "sigmoid,\nBarlow Twins",
        ("random", "none"): "random\ncells",
    }
    for place, (arm, _) in enumerate(names.items()):
        own = _select(rows, study="c", relaxation=arm[0], objective=arm[1])
        values = [row["test"]["accuracy"] for row in own]
        right.plot([place] * len(values), values, "o", color=INK if arm[0] != "random" else GREY, alpha=0.6)
    right.set_xticks(range(len(names)), list(names.values()), fontsize=7)
    right.set(title="(c) balanced test accuracy", ylabel="test accuracy")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)
    return path

"""The sweep on real posters as tables and a figure, from the rows under `results/` alone."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmnas_lab.report.tables import Interval, markdown_table, mean_interval, paired_interval
from mmnas_lab.stage import atomically
from mmnas_lab.study_rows import append, read_rows

Key = tuple[str, str, float]  # network, pretraining, labelled share

POSTERS = "ssl_nas_posters.jsonl"
SKLEARN = "ssl_nas_posters_sklearn.jsonl"
NETWORKS = {"ssl_nas_mmimdb": "found, NT-Xent search", "bm_nas_mmimdb": "found, supervised search"}
DECIDED = {"ssl_nas_mmimdb": "loss", "bm_nas_mmimdb": "weights"}  # how the experiments find a genotype
BASELINES = {
    "random_genotype": "random genotype",
    "text": "text only",
    "image": "poster only",
    "two_stream": "two-stream",
    "late_fusion": "late fusion",
}
JOBS_OF_A_SEED = 16  # 2 searches x 2 trainings x 4 shares
SCRATCH, PRETRAINED = "from scratch", "pretrained"


def collect_posters(outputs: Path, results: Path) -> int:
    """Add the runs of the sweep's finished seeds to the rows; gives the number of new rows.

    A row is one record without its per-class figures, drawings and stage keys.
    """
    results.mkdir(parents=True, exist_ok=True)
    have = {_identity(row) for row in read_rows(results / POSTERS)}
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(outputs.glob("*_mmimdb/*/seed_*/record.json")):
        record = json.loads(path.read_text())
        if record["experiment"] not in NETWORKS or "test" not in record["metrics"]:
            continue
        config = (path.parent / "config.yaml").read_text()
        row = _row(record, config)
        if row is not None and _identity(row) not in have:
            have.add(_identity(row))
            found[row["seed"]].append(row)
    whole = [row for rows in found.values() if len(rows) >= JOBS_OF_A_SEED for row in rows]
    for row in whole:
        append(results / POSTERS, row)
    return len(whole)


def _row(record: Mapping[str, Any], config_text: str) -> dict[str, Any] | None:
    import yaml

    config = yaml.safe_load(config_text)
    strategy = config["strategy"]
    decided = strategy.get("decide", "weights")
    if config["scale"] != "cpu" or strategy["_target_"].rsplit(".", 1)[-1] != "Bilevel":
        return None
    if decided != DECIDED[record["experiment"]]:
        return None

    def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
        return {split: round(metrics[split]["f1_weighted"], 6) for split in ("val", "test")}

    environment = record["environment"]
    return {
        "experiment": record["experiment"],
        "decided_by": decided,
        "pretrain_epochs": config["pretrain"]["epochs"],
        "labelled_share": config["labelled_share"],
        "seed": record["seed"],
        "found": scores(record["metrics"]),
        "baselines": {name: scores(metrics) for name, metrics in record["baselines"].items()},
        "random_draws": [
            scores(draw) for draw in record["baselines"].get("random_genotype", {}).get("draws", [])
        ],
        "genotype": record["genotype"],
        "margins": record["margins"],
        "command": _without_paths(environment["command"]),
        "commit": environment["commit"],
        "data": record["data"]["fingerprint"][:16],
        "labelled": record["data"]["labelled"],
        "hardware": f"{environment['hardware']['processor']}, {environment['hardware']['cores']} cores",
    }


def _without_paths(command: str) -> str:
    words = [
        f"{word.split('=', 1)[0]}=<movie_posters>" if word.startswith("dataset.path=") else word
        for word in command.split()
        if not word.startswith("output=")
    ]
    return " ".join(words)


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    decided = row.get("decided_by", "weights")
    return row["experiment"], decided, row["pretrain_epochs"] > 0, row["labelled_share"], row["seed"]


def poster_scores(rows: Sequence[Mapping[str, Any]]) -> dict[Key, dict[int, float]]:
    """Test F1-W by seed of every network, with and without pretraining, at every labelled share."""
    scores: dict[Key, dict[int, float]] = defaultdict(dict)
    for row in rows:
        recipe = PRETRAINED if row["pretrain_epochs"] else SCRATCH
        share, seed = row["labelled_share"], row["seed"]
        scores[NETWORKS[row["experiment"]], recipe, share][seed] = row["found"]["test"]
        for name, metrics in row["baselines"].items():
            scores[BASELINES[name], recipe, share][seed] = metrics["test"]
    return scores


def report_posters(results: Path) -> list[Path]:
    """`ssl_nas_posters.md` and `.png`: levels, the effect of search and the effect of pretraining."""
    rows = read_rows(results / POSTERS)
    if not rows:
        return []
    scores = poster_scores(rows)
    shares = sorted({share for _, _, share in scores})
    names = [*NETWORKS.values(), *BASELINES.values()]
    levels: list[dict[str, Any]] = [
        {"network": name, "training": recipe}
        | {
            f"r = {share:g}": plus_minus(list(scores.get((name, recipe, share), {}).values()))
            for share in shares
        }
        for name in names
        for recipe in (SCRATCH, PRETRAINED)
        if any((name, recipe, share) in scores for share in shares)
    ]
    for name, by_share in _sklearn_levels(results).items():
        levels.append(
            {"network": name, "training": "scikit-learn"}
            | {f"r = {share:g}": plus_minus(by_share.get(share, [])) for share in shares}
        )
    label_free, supervised = NETWORKS.values()
    search_effects: list[dict[str, Any]] = [
        {"contrast": f"{a} - {b}, {recipe}"}
        | {f"r = {share:g}": _difference(scores, (a, recipe), (b, recipe), share) for share in shares}
        for a, b in (
            (label_free, supervised),
            (label_free, "random genotype"),
            (supervised, "random genotype"),
            (label_free, "late fusion"),
            (label_free, "text only"),
        )
        for recipe in (SCRATCH, PRETRAINED)
    ]
    whole: list[dict[str, Any]] = [
        {"contrast": f"{a}, pretrained - {b}, from scratch"}
        | {f"r = {share:g}": _difference(scores, (a, PRETRAINED), (b, SCRATCH), share) for share in shares}
        for a, b in ((label_free, supervised), (label_free, "late fusion"))
    ]
    pretraining_effects: list[dict[str, Any]] = [
        {"network": name}
        | {
            f"r = {share:g}": _difference(scores, (name, PRETRAINED), (name, SCRATCH), share)
            for share in shares
        }
        for name in names
    ]
    columns = [f"r = {share:g}" for share in shares]
    seeds = sorted({row["seed"] for row in rows})
    text = "\n".join(
        [
            "# SSL-NAS and BM-NAS on a few thousand posters (our own small-scale study)",
            "",
            "2,401 training movies, frozen EfficientNet-Lite0 and MiniLM features, `scale=cpu`: not MM-IMDB,",
            "not the papers' scale, not to be set beside their figures. Test F1-W (fraction), selected on",
            "val, threshold 0.3.",
            "",
            "Command: `python run.py -m sweep=ssl_nas_posters dataset.path=<movie_posters>`; seeds "
            f"{', '.join(map(str, seeds))} (subset, initialisation, order); hardware "
            f"{rows[-1]['hardware']}; commits "
            f"{', '.join(sorted({str(row['commit'])[:12] for row in rows}))}; data {rows[-1]['data']}.",
            "",
            "## Levels: mean over seeds +- half width of the 95 % interval",
            "",
            markdown_table(levels, ["network", "training", *columns]),
            "",
            "## Effect of the search: paired differences over seeds, in points, with the 95 % interval",
            "",
            markdown_table(search_effects, ["contrast", *columns]),
            "",
            "## The whole label-free pipeline against training on labels alone, in points",
            "",
            "First line: SSL-NAS against BM-NAS, each as its paper runs it, search and pretraining together.",
            "With the 95 % interval.",
            "",
            markdown_table(whole, ["contrast", *columns]),
            "",
            "## Effect of contrastive pretraining, in points, with the 95 % interval",
            "",
            markdown_table(pretraining_effects, ["network", *columns]),
            "",
        ]
    )
    return [
        write_text(results / "ssl_nas_posters.md", text),
        _figure(results / "ssl_nas_posters.png", scores, shares),
    ]


def _sklearn_levels(results: Path) -> dict[str, dict[float, list[float]]]:
    levels: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(results / SKLEARN):
        levels[f"logistic regression, {row['model']}"][row["labelled_share"]].append(row["test"])
    return levels


def plus_minus(values: Sequence[float]) -> str | None:
    """Mean and half width of the 95 % interval, as text; None of no values."""
    if not values:
        return None
    interval = mean_interval(values)
    half = "" if math.isnan(interval.low) else f" ± {interval.mean - interval.low:.3f}"
    return f"{interval.mean:.3f}{half}"


def _difference(
    scores: Mapping[Key, Mapping[int, float]], a: tuple[str, str], b: tuple[str, str], share: float
) -> str | None:
    first, second = scores.get((*a, share), {}), scores.get((*b, share), {})
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    return verdict(paired_interval([100 * first[s] for s in seeds], [100 * second[s] for s in seeds]))


def verdict(points: Interval) -> str:
    """A difference in points with its interval, and what may be said of it.

    An interval off zero is an effect, one inside +-1 point is none, all else is undecided.
    """
    if math.isnan(points.low):
        return f"{points.mean:+.1f} (one seed)"
    if points.low > 0 or points.high < 0:
        said = "effect"
    elif points.low >= -1 and points.high <= 1:
        said = "no effect"
    else:
        said = "undecided"
    return f"{points.mean:+.1f} [{points.low:+.1f}, {points.high:+.1f}] {said}"


def _figure(path: Path, scores: Mapping[Key, Mapping[int, float]], shares: Sequence[float]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = ["#000000", "#D55E00", "#999999", "#E69F00", "#0072B2", "#009E73", "#CC79A7"]
    names = [*NETWORKS.values(), *BASELINES.values()]
    for ax, recipe in zip(axes, (SCRATCH, PRETRAINED), strict=True):
        for k, (name, colour) in enumerate(zip(names, colours, strict=True)):
            values = [list(scores.get((name, recipe, share), {}).values()) for share in shares]
            if not any(values):
                continue
            x = [share * 1.02 ** (k - 3) for share in shares]
            intervals = [mean_interval(v) if v else Interval(math.nan, math.nan, math.nan) for v in values]
            half = [i.mean - i.low if not math.isnan(i.low) else 0.0 for i in intervals]
            bold = name in NETWORKS.values()
            ax.errorbar(
                x,
                [i.mean for i in intervals],
                half,
                label=name,
                color=colour,
                marker="o",
                markersize=4,
                linewidth=2.2 if bold else 1.1,
                capsize=2,
                zorder=3 if bold else 2,
            )
        ax.set_xscale("log")
        ax.set_xticks(shares, [f"{share:g}" for share in shares])
        ax.minorticks_off()
        ax.set_xlabel("labelled share r (of 2,401 training movies)")
        ax.set_title(recipe, fontsize=11)
        ax.grid(axis="y", color="#e5e5e5")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test F1-W (mean, 95 % interval)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a page whole, or not at all."""
    with atomically(path) as file:
        file.write(text.encode())
    return path

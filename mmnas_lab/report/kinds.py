"""The study of SSL-NAS on other kinds of data as a page, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mmnas_lab.report.studies import verdict, write_text
from mmnas_lab.report.tables import markdown_table, mean_interval, paired_interval
from mmnas_lab.study_rows import read_rows

ROWS = "ssl_nas_kinds.jsonl"
PLAIN_ROWS = "ssl_nas_kinds_sklearn.jsonl"
DATASETS = {
    "utd_mhad": "UTD-MHAD (skeleton, inertial sensor, depth; 27 actions)",
    "avmnist": "AV-MNIST (picture, sound; 10 digits), 6,000 / 1,000 / 2,000 pairs",
    "physionet2012": "PhysioNet 2012 (series, descriptors; death in hospital)",
}
NETWORKS = {
    "ssl_nas": "SSL-NAS",
    "supervised_search": "supervised search, pretrained",
    "bm_nas": "BM-NAS (supervised search, from scratch)",
    "random_genotype": "random genotypes, pretrained",
    "late_fusion": "late fusion, pretrained",
    "late_fusion_chosen": "late fusion of the modalities best on val",
}
METRICS = ("accuracy", "f1_macro", "auroc", "auprc", "auroc_macro", "auprc_macro")
PLANNED = {"utd_mhad": (0.1, 0.3), "avmnist": (0.1,), "physionet2012": (0.1,)}
SEEDS = 3
Row = Mapping[str, Any]


def report_kinds(results: Path) -> list[Path]:
    """`ssl_nas_kinds.md`: levels, and the differences that were looked for."""
    rows, plain = read_rows(results / ROWS), read_rows(results / PLAIN_ROWS)
    if not rows:
        return []
    arms = [
        (dataset, share, arm)
        for dataset, shares in PLANNED.items()
        for share in shares
        if (arm := [row for row in rows if (row["dataset"], row["labelled_share"]) == (dataset, share)])
    ]
    parts = [
        "# SSL-NAS on other kinds of data (our own small-scale study)",
        "Small encoders that are trained without labels here, frozen; `scale=cpu`; two random genotypes a "
        "seed. Ours, at this scale; not to be set beside the papers' figures. Every method gets the same "
        "features, training recipe and labelled share r, and selects its checkpoint on val, which is "
        "labelled whole. What was looked for was written down before the first run, in "
        "`scripts/ssl_nas_kinds.py`.",
        "## What was looked for",
        "Paired differences over seeds with 95 % intervals, in points of the metric that selects, on test. "
        "`undecided` unless the interval leaves out 0; `no effect` where it lies within +-1 point.",
        _differences(arms),
        "(a) the single modality is the best one on val, in the mean of the seeds; (b) genotypes drawn "
        "uniformly, pretrained and trained in the same way; (c) the same space, pretraining and labels, "
        "then BM-NAS as published, which has no pretraining; (d) the unimodal networks are pretrained too; "
        "chosen: of the modalities whose fusion is best on val, a baseline that was added when UTD-MHAD was "
        "seen, where depth, which tells little and is sure of itself, spoils the fusion of all.",
        "Plain models beside them: a logistic regression on the same frozen features and labels, its "
        "regularisation chosen on val (`scripts/ssl_nas_kinds_levels.py`). On the features that the found "
        "network reads it says what the training of that network is worth; on all features, of which a "
        "network reads two for each cell, what the choice leaves out.",
        *(_levels(dataset, share, arm, _same(arm, plain)) for dataset, share, arm in arms),
        _provenance(rows),
    ]
    return [write_text(results / "ssl_nas_kinds.md", "\n\n".join(parts) + "\n")]


def best_modality(arm: Sequence[Row]) -> str:
    """The single modality with the highest val mean of the metric that selects."""
    names = [name for name in arm[0]["networks"] if name not in NETWORKS]
    return max(names, key=lambda name: fmean(_of(row, name, "val") for row in arm))


def _of(row: Row, network: str, split: str = "test", metric: str | None = None) -> float:
    scores: Mapping[str, Mapping[str, float]] = row["networks"][network]
    return scores[split][metric or metric_of(row)]


def metric_of(row: Row) -> str:
    """The metric that selects checkpoints, without the split that it was measured on."""
    return str(row["selected_by"]).removeprefix("val_")


def _differences(arms: Sequence[tuple[str, float, Sequence[Row]]]) -> str:
    lines = []
    for dataset, share, arm in arms:
        single = best_modality(arm)
        contrasts = {
            f"(a) SSL-NAS - {single} alone": single,
            "(b) SSL-NAS - random genotypes": "random_genotype",
            "(c) label-free - supervised search": "supervised_search",
            "(c) SSL-NAS - BM-NAS": "bm_nas",
            "(d) SSL-NAS - late fusion": "late_fusion",
            "(d) SSL-NAS - late fusion, chosen": "late_fusion_chosen",
        }
        for contrast, other in contrasts.items():
            ours, theirs = ([100 * _of(row, name) for row in arm] for name in ("ssl_nas", other))
            lines.append(
                {
                    "data": dataset,
                    "r": f"{share:g}",
                    "metric": metric_of(arm[0]),
                    "contrast": contrast,
                    "points": verdict(paired_interval(ours, theirs)),
                }
            )
    return markdown_table(lines, list(lines[0]))


def _same(arm: Sequence[Row], plain: Sequence[Row]) -> list[Row]:
    """The rows of plain models on the runs of an arm; empty unless there is one for each."""
    keys = ("dataset", "labelled_share", "seed")
    runs = [{key: row[key] for key in keys} for row in arm]
    found = [row for run in runs for row in plain if run.items() <= row.items()]
    return found if len(found) == len(runs) else []


def _levels(dataset: str, share: float, arm: Sequence[Row], plain: Sequence[Row]) -> str:
    single = [name for name in arm[0]["networks"] if name not in NETWORKS]
    names = {**NETWORKS, **{name: f"{name} alone, pretrained" for name in single}}
    table = [
        {
            "network": label,
            **{
                metric: _level([_of(row, name, "test", metric) for row in arm])
                for metric in METRICS
                if metric in arm[0]["networks"][name]["test"]
            },
        }
        for name, label in names.items()
    ]
    for name in plain[0]["models"] if plain else ():
        what = {"found": "what SSL-NAS' network reads", "all": "all features"}.get(name, f"all of {name}")
        scores = [row["models"][name]["test"] for row in plain]
        metrics = {metric: _level([score[metric] for score in scores]) for metric in list(table[0])[1:]}
        table.append({"network": f"logistic regression, {what}", **metrics})
    labelled = arm[0]["labelled"]
    least = min(row["labelled"]["least"] for row in arm)
    covered = min(row["labelled"]["classes"] for row in arm)
    searches = [
        f"- seed {row['seed']}: "
        + "; ".join(f"{NETWORKS[name]}: {genotype_told(row['genotypes'][name])}" for name in row["genotypes"])
        for row in arm
    ]
    fused = [f"seed {row['seed']} {' + '.join(row['late_fusion_chosen'])}" for row in arm]
    seconds = {name: fmean(row["search_seconds"][name] for row in arm) for name in arm[0]["search_seconds"]}
    return "\n\n".join(
        [
            f"## {DATASETS[dataset]}, r = {share:g}",
            f"{labelled['rows']} of {labelled['of']} training samples are labelled, of at least {covered} of "
            f"the {labelled['classes_of']} classes, at least {least} of each. Checkpoints are selected by "
            f"{metric_of(arm[0])}. Test, mean over {len(arm)} seeds +- half width of the 95 % interval:",
            markdown_table(table, list(table[0])),
            "Genotypes (inputs and operations of each cell):\n\n" + "\n".join(searches),
            f"Late fusion of the modalities best on val: {', '.join(fused)}.",
            f"A search took {seconds['ssl_nas']:.0f} s without labels and "
            f"{seconds['supervised_search']:.0f} s with them, beside other work on the machine.",
        ]
    )


def genotype_told(genotype: Mapping[str, Any]) -> str:
    """Inputs and operations of each fusion cell as text."""
    return ", ".join(
        f"({' + '.join(map(str, cell['inputs']))} -> {' + '.join(step['op'] for step in cell['steps'])})"
        for cell in genotype["cells"]
    )


def _level(values: Sequence[float]) -> str:
    interval = mean_interval(values)
    half = "" if math.isnan(interval.low) else f" ± {interval.mean - interval.low:.3f}"
    return f"{interval.mean:.3f}{half}"


def _provenance(rows: Sequence[Row]) -> str:
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    hardware = "; ".join(sorted({row["hardware"] for row in rows}))
    planned = SEEDS * sum(len(shares) for shares in PLANNED.values())
    there = sum(row["seed"] < SEEDS for row in rows)
    state = "" if there == planned else f" Not whole yet: {there} of {planned} rows."
    if any(row["seed"] >= SEEDS for row in rows):
        state += (
            " The seeds after these were added when the first had been seen, because intervals of three "
            "seeds are wide."
        )
    return (
        "Command: `python scripts/ssl_nas_kinds.py --utd_mhad <folder> --avmnist <folder> "
        f"--physionet2012 <folder>`. Commit {commits}; {hardware}; seeds 0 to {SEEDS - 1}.{state}"
    )

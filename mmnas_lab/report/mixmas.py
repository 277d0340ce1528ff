"""The study of MixMAS on small real data as a page in the form of its paper's tables, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mmnas_lab.report.studies import verdict, write_text
from mmnas_lab.report.tables import markdown_table, mean_interval, paired_interval
from mmnas_lab.study_rows import read_rows

ROWS = "mixmas.jsonl"
LEVELS = "mixmas_levels.jsonl"
TITLES = {
    "physionet2012": "PhysioNet 2012",
    "utd_mhad": "UTD-MHAD",
    "avmnist": "AV-MNIST",
    "mmimdb": "posters",
}
"""Data sets in the order of the tables; the posters are read as MM-IMDB is."""
METHODS = {
    "found": "MixMAS",
    "m2_mixer": "M2-Mixer",
    "random_genotype": "random pick",
    "late_fusion": "late fusion",
}
BEST_ALONE = "best single modality"
Row = Mapping[str, Any]


def report_mixmas(results: Path) -> list[Path]:
    """`mixmas.md`: scores of every candidate and choice, then methods against each other."""
    rows = sorted(
        (row for row in read_rows(results / ROWS) if "overrides" not in row), key=lambda row: row["seed"]
    )
    datasets = [name for name in TITLES if any(row["dataset"] == name for row in rows)]
    if not datasets:
        return []
    of = {name: [row for row in rows if row["dataset"] == name] for name in datasets}
    parts = [
        "# MixMAS on small real data, in the form of its tables I and II",
        "Ours, at the sizes below; none of it is the paper's data, sizes or training, so nothing here is to "
        "be set beside the paper's figures. What was looked for was written down before the first run, in "
        "`scripts/mixmas_study.py`.",
        _sizes(of),
        "## Micro-benchmarks: the score of each stage's candidates (form of table I)",
        "Each candidate is trained on the sample under three seeds and scored on held rows of val, once for "
        "each seed of the search. A difference within two standard errors is a tie, which the candidate that "
        "computes least wins. Fusion functions are compared in a network of the encoders chosen under that "
        "seed, fusion networks with the function chosen, so their scores differ between seeds by more than "
        "noise. Confidence is that of a paired t-test of the best against the next best.",
        *(part for name in datasets for part in _choices(name, of[name])),
        "## Networks trained in full (form of table II)",
        "Test scores, mean over seeds with the 95 % interval. All have the same arrays, heads, recipe and "
        "budget, and the state is selected on val by the metric of the column.",
        _levels(of),
        "Looked for: MixMAS above the random pick, above M2-Mixer and above the best single modality on "
        "every data set. MixMAS minus each other, in points, paired over seeds, with the 95 % interval; the "
        "best single modality is the best on val under that seed.",
        _differences(of),
        "Parameters without heads, in thousands, mean over seeds:",
        _parameters(of),
        *_plain_levels(results, datasets),
        _provenance(rows, of),
    ]
    return [write_text(results / "mixmas.md", "\n\n".join(parts) + "\n")]


def modalities(row: Row) -> list[str]:
    """The single modalities that a row has networks of."""
    return [name for name in row["test"] if name not in METHODS]


def score_of(row: Row, method: str) -> float | None:
    """Test score of a method under a row's seed, by the metric of its data set; None where it was not run."""
    if method == BEST_ALONE:
        method = max(modalities(row), key=lambda name: row["val"][name][row["metric"]])
    scores = row["test"].get(method)
    return None if scores is None else float(scores[row["metric"]])


def _heading(name: str, rows: Sequence[Row]) -> str:
    return f"{TITLES[name]}, {rows[0]['metric']}"


def _sizes(of: Mapping[str, Sequence[Row]]) -> str:
    table: list[dict[str, Any]] = [
        {
            "data": TITLES[name],
            "train": rows[0]["counts"]["train"],
            "val": rows[0]["counts"]["val"],
            "test": rows[0]["counts"]["test"],
            "micro-benchmarks on": rows[0]["selection"]["sample"]["rows"],
            "of epochs": rows[0]["epochs"]["search"],
            "full training, epochs": rows[0]["epochs"]["train"],
            "metric": rows[0]["metric"],
            "search, minutes": round(fmean(row["search_seconds"] for row in rows) / 60, 1),
            "seeds": ", ".join(str(row["seed"]) for row in rows),
        }
        for name, rows in of.items()
    ]
    return markdown_table(table, list(table[0]))


def _choices(name: str, rows: Sequence[Row]) -> list[str]:
    """A table of the candidates of every stage, and a line of the confidences."""
    table: list[dict[str, Any]] = []
    confidences: list[str] = []
    for stage in rows[0]["selection"]["decisions"]:
        decisions = {row["seed"]: row["selection"]["decisions"][stage] for row in rows}
        options = list(dict.fromkeys(option for made in decisions.values() for option in made["options"]))
        if len(options) < 2:
            continue
        for option in options:
            told = {
                seed: made["options"][option] for seed, made in decisions.items() if option in made["options"]
            }
            table.append(
                {
                    "stage": stage.replace("encoder.", "encoder of ").replace("_", " "),
                    "candidate": option,
                    "score": f"{fmean(one['mean'] for one in told.values()):.3f}",
                    "MFLOP": f"{fmean(one['flops'] for one in told.values()) / 1e6:.2f}",
                }
                | {f"seed {seed}": _told(option, made) for seed, made in decisions.items()}
            )
        sure = [
            "none" if made["confidence"] is None else f"{made['confidence']:.2f}"
            for made in decisions.values()
        ]
        confidences.append(f"{stage} {', '.join(sure)}")
    return [
        f"### {_heading(name, rows)}",
        markdown_table(table, list(table[0])) if table else "No stage had anything to choose.",
        f"Confidence by seed: {'; '.join(confidences)}.",
    ]


def _told(option: str, made: Mapping[str, Any]) -> str | None:
    """Score of a candidate under one seed, and whether it was taken or tied with the best."""
    told = made["options"].get(option)
    if told is None:
        return None
    tied = " tied" if option in made["tie"] else ""
    return f"{told['mean']:.3f}{tied}{' **taken**' if made['option'] == option else ''}"


def _names(of: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Methods of the tables, those of every data set first, then its single modalities."""
    alone = dict.fromkeys(name for rows in of.values() for name in modalities(rows[0]))
    return METHODS | {name: f"{name} alone" for name in alone}


def _levels(of: Mapping[str, Sequence[Row]]) -> str:
    table: list[dict[str, Any]] = [
        {"method": label} | {_heading(name, rows): _mean(rows, method) for name, rows in of.items()}
        for method, label in _names(of).items()
    ]
    return markdown_table(table, list(table[0]))


def _mean(rows: Sequence[Row], method: str) -> str | None:
    values = [score for row in rows if (score := score_of(row, method)) is not None]
    if not values:
        return None
    interval = mean_interval(values)
    end = "" if math.isnan(interval.low) else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{interval.mean:.3f}{end}"


def _differences(of: Mapping[str, Sequence[Row]]) -> str:
    others = {key: label for key, label in METHODS.items() if key != "found"} | {BEST_ALONE: BEST_ALONE}

    def cell(rows: Sequence[Row], method: str) -> str | None:
        pairs = [(score_of(row, "found"), score_of(row, method)) for row in rows]
        whole = [(100 * a, 100 * b) for a, b in pairs if a is not None and b is not None]
        if not whole:
            return None
        return verdict(paired_interval([a for a, _ in whole], [b for _, b in whole]))

    table: list[dict[str, Any]] = [
        {"MixMAS minus": label} | {_heading(name, rows): cell(rows, key) for name, rows in of.items()}
        for key, label in others.items()
    ]
    return markdown_table(table, list(table[0]))


def _parameters(of: Mapping[str, Sequence[Row]]) -> str:
    def cell(rows: Sequence[Row], method: str) -> str | None:
        counts = [row["parameters"][method] for row in rows if method in row["parameters"]]
        return f"{fmean(counts) / 1e3:.1f}" if counts else None

    table: list[dict[str, Any]] = [
        {"method": label} | {TITLES[name]: cell(rows, method) for name, rows in of.items()}
        for method, label in _names(of).items()
        if method != "late_fusion"
    ]
    return markdown_table(table, list(table[0]))


def _plain_levels(results: Path, datasets: Sequence[str]) -> list[str]:
    """What plain models get on the same splits: where a network stays below, the text must say why."""
    own = [row for row in read_rows(results / LEVELS) if row["dataset"] in datasets]
    if not own:
        return []
    table: list[dict[str, Any]] = [
        {
            "data": TITLES[row["dataset"]],
            "inputs": row["inputs"],
            "model": row["model"],
            "metric": row["metric"],
            "val": f"{row['val']:.3f}",
            "test": f"{row['test']:.3f}",
        }
        for row in own
    ]
    return [
        "### Plain models on the same test sets",
        "Scikit-learn on the networks' own splits and arrays, coarsened; regularisation chosen on val "
        "(`scripts/mixmas_levels.py`). A network that stays below has a fault in its training, not in its "
        "architecture. Plain models of the posters, on features of pretrained encoders, are in "
        "[the posters' study](ssl_nas_posters.md).",
        markdown_table(table, list(table[0])),
    ]


def _provenance(rows: Sequence[Row], of: Mapping[str, Sequence[Row]]) -> str:
    commits = ", ".join(sorted({str(row["commit"])[:12] for row in rows}))
    hardware = "; ".join(sorted({row["hardware"] for row in rows}))
    data = ", ".join(f"{TITLES[name]} {of[name][0]['data']}" for name in of)
    missing = [
        f"{title} has {len(of.get(name, ()))} of 3 seeds"
        for name, title in TITLES.items()
        if len(of.get(name, ())) < 3
    ]
    state = f" Not whole yet: {', '.join(missing)}; the command goes on from the rows." if missing else ""
    return (
        "Command: `python scripts/mixmas_study.py --physionet2012 <folder> --utd_mhad <folder> --avmnist "
        f"<folder> --mmimdb <folder>`. Commits {commits}; {hardware}; data {data}.{state}"
    )

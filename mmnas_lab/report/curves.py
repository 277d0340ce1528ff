"""What a run logged over its steps: losses, collapse monitors, validation metrics, architecture weights."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from scipy.optimize import isotonic_regression

FOUND = "found"
"""The run that trains the found network; all others are baselines."""

# Okabe and Ito's palette, which colour-blind readers tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GREY, FAINT = "#22262b", "#5d6670", "#cdd3d9"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e8ebee",
    "axes.axisbelow": True,
}
ROW_WIDTH, ROW_HEIGHT = 14.0, 2.6
"""Inches. A row holds the panels of one stage and is filled by them."""
LABEL_SIZE = 7.0
MONITORS = ("alignment", "uniformity", "embedding_std")
CHOICES = {"alpha": "inputs of cells", "beta": "inputs of steps", "gamma": "operations of steps"}
NAMED_WEIGHTS = 4
"""How many of the architecture weights of a panel, those largest at the end, are coloured and labelled."""


@dataclass
class _Line:
    """One curve: its label stands at its end; without label it is background."""

    label: str
    steps: list[float]
    values: list[float]
    bold: bool = False
    dashed: bool = False


@dataclass
class _Panel:
    title: str
    lines: list[_Line]


Metrics = dict[tuple[str, str], tuple[list[float], list[float]]]
"""Steps and values by name ("train/loss") and run ("found")."""


def draw_curves(metrics_csv: Path, trace_json: Path | None, path: Path) -> None:
    """Write one picture of what a run logged, a row a stage; panels without data are left out.

    Args:
        metrics_csv: columns `stage,run,step,epoch,name,value`, one value a line; it may be absent.
        trace_json: `{"names": {"alpha": [...]}, "records": [{"step": 0, "mixing": {"alpha": [...]}}]}` with
            mixing weights, 0 to 1, in the order of their names; None or absent where a strategy has none.
        path: any format that matplotlib writes by its suffix.

    Raises:
        ValueError: if there is nothing to draw.
    """
    with rc_context(STYLE):
        figure = curves_figure(_read_metrics(metrics_csv), _read_trace(trace_json))
        figure.savefig(path, dpi=150)


def curves_figure(metrics: Metrics, trace: dict[str, Any]) -> Figure:
    """The picture of `draw_curves` as a figure with one titled axes a panel."""
    rows = [_search_row(metrics) + _weights_row(trace), _pretrain_row(metrics), _train_row(metrics)]
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError("draw_curves needs a metric or a trace, got neither")
    width = ROW_WIDTH if max(map(len, rows)) > 1 else ROW_WIDTH / 2
    figure = Figure(figsize=(width, ROW_HEIGHT * len(rows)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    grid = figure.add_gridspec(len(rows), math.lcm(*map(len, rows)))
    for i, row in enumerate(rows):
        span = grid.ncols // len(row)
        for j, panel in enumerate(row):
            _draw_panel(figure.add_subplot(grid[i, j * span : (j + 1) * span]), panel)
    return figure


def _read_metrics(path: Path) -> Metrics:
    """Every series of a metrics file by step; values that are not finite are left out."""
    metrics: Metrics = {}
    if not path.exists():
        return metrics
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["value"] and math.isfinite(float(row["value"]))]
    for row in sorted(rows, key=lambda row: float(row["step"])):
        steps, values = metrics.setdefault((row["name"], row["run"]), ([], []))
        steps.append(float(row["step"]))
        values.append(float(row["value"]))
    return metrics


def _read_trace(path: Path | None) -> dict[str, Any]:
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def _search_row(metrics: Metrics) -> list[_Panel]:
    lines = [
        _Line(_plain(name.removesuffix("_loss")), *series)
        for (name, _), series in metrics.items()
        if name.startswith("search/") and name.endswith("loss")
    ]
    return [_Panel("Search: losses", lines)] if lines else []


def _weights_row(trace: dict[str, Any]) -> list[_Panel]:
    """A panel for each array of mixing weights."""
    panels = []
    records = trace.get("records", [])
    for name in records[0]["mixing"] if records else []:
        weights = np.array([np.ravel(record["mixing"][name]) for record in records])
        labels = np.ravel(trace.get("names", {}).get(name, [])).tolist()
        labels += [f"{name} {i}" for i in range(len(labels), weights.shape[1])]
        largest = np.argsort(-weights[-1], kind="stable")[:NAMED_WEIGHTS].tolist()
        steps = [float(record["step"]) for record in records]
        order = [i for i in range(weights.shape[1]) if i not in largest] + largest
        lines = [_Line(labels[i] if i in largest else "", steps, weights[:, i].tolist()) for i in order]
        panels.append(_Panel(f"Search: {name}" + (f" ({CHOICES[name]})" if name in CHOICES else ""), lines))
    return panels


def _pretrain_row(metrics: Metrics) -> list[_Panel]:
    training, validation = _runs(metrics, "pretrain/loss"), _runs(metrics, "pretrain/val_loss")
    alone = {line.label for line in training + validation} <= {FOUND}
    for line in training if alone else []:
        line.label = "training"
    for line in validation:
        line.label, line.dashed, line.bold = ("" if alone else f"{line.label} ") + "validation", True, False
    panels = [_Panel("Pretraining: losses", training + validation)]
    panels += [
        _Panel(f"Pretraining: {_plain(name)}", _runs(metrics, f"pretrain/{name}")) for name in MONITORS
    ]
    return [panel for panel in panels if panel.lines]


def _train_row(metrics: Metrics) -> list[_Panel]:
    names = list(dict.fromkeys(name for name, _ in metrics if name.startswith("train/val_")))
    panels = [_Panel("Training: loss", _runs(metrics, "train/loss"))]
    panels += [_Panel(f"Training: validation {_plain(name)[4:]}", _runs(metrics, name)) for name in names]
    return [panel for panel in panels if panel.lines]


def _runs(metrics: Metrics, name: str) -> list[_Line]:
    """One line a run, the found network last and so on top."""
    lines = [_Line(run, *series, bold=run == FOUND) for (key, run), series in metrics.items() if key == name]
    return sorted(lines, key=lambda line: line.bold)


def _draw_panel(axes: Axes, panel: _Panel) -> None:
    colours = cycle(PALETTE)
    ends = []
    for line in panel.lines:
        colour = FAINT if not line.label else INK if line.bold else next(colours)
        width = 2.2 if line.bold else 1.2 if line.label else 0.7
        dashes = "--" if line.dashed else "-"
        marker = "o" if len(line.steps) == 1 else None
        smooth = _smoothed(line.values)
        if smooth is not line.values:
            axes.plot(line.steps, line.values, color=colour, linewidth=0.5, alpha=0.25)
        axes.plot(line.steps, smooth, dashes, color=colour, linewidth=width, marker=marker, markersize=4)
        if line.label:
            ends.append((smooth[-1], line.label, colour, "bold" if line.bold else "normal"))
    axes.set_title(panel.title)
    axes.set_xlabel("step", labelpad=1)
    steps = sorted({step for line in panel.lines for step in line.steps})
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True) if len(steps) > 1 else FixedLocator(steps))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02)
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str, str]]) -> None:
    """Write labels right of the axes where their lines end, moved apart where these ends are close."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    line_height = 1.35 * LABEL_SIZE / 72 / (ROW_HEIGHT * 0.72)
    ends = sorted(ends, key=lambda end: end[0])
    offsets = line_height * np.arange(len(ends))
    wanted = (np.array([value for value, *_ in ends]) - bottom) / (top - bottom)
    heights = np.clip(isotonic_regression(wanted - offsets).x, 0.0, max(0.0, 1.0 - offsets[-1])) + offsets
    for height, (_, label, colour, weight) in zip(heights, ends, strict=True):
        text = axes.text(1.015, height, label, transform=axes.transAxes, va="center")
        text.set(color=colour, fontsize=LABEL_SIZE, fontweight=weight)


def _smoothed(values: list[float]) -> list[float]:
    """A centred moving average over a fiftieth of a long series; a short one as it is."""
    half = len(values) // 100
    if half == 0:
        return values
    padded = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(len(values))
    start, stop = np.maximum(last - half, 0), np.minimum(last + half + 1, len(values))
    return ((padded[stop] - padded[start]) / (stop - start)).tolist()


def _plain(name: str) -> str:
    """The words of a metric's name: "arch loss" of "search/arch_loss"."""
    return name.rpartition("/")[2].replace("_", " ")

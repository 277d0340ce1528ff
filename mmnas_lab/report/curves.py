"""What a run logged over its steps: losses, collapse monitors, validation metrics, architecture weights."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, MaxNLocator
from scipy.optimize import isotonic_regression

FOUND = "found"
"""The run that trains the found network; all others are baselines."""
RANDOM = "random_"
"""What the runs of random genotypes begin with."""

# Okabe and Ito's palette, which colour-blind readers tell apart, then three of Tol's.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288")
INK, GREY, PALE, FAINT = "#22262b", "#5d6670", "#a3abb3", "#cdd3d9"
FONT, SMALL = "DejaVu Sans", 7.5
STYLE: dict[Any, Any] = {
    "font.family": FONT,
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

# Inches. Every panel keeps room of its own for ticks and scale (left), labels (right), title and step.
WIDTH, WIDEST_PLOT, PLOT_HEIGHT = 14.0, 6.0, 1.85
TICKS, SCALE, LABEL_GAP, EDGE = 0.62, 0.34, 0.07, 0.2
ABOVE, BELOW, LEGEND_LINE, LEGEND_SAMPLE = 0.36, 0.48, 0.2, 0.7
ROW_PANELS = 4

MONITORS = {
    "embedding_std": ("0 collapsed,\n1 spread over the sphere", (0.0, 1.0)),
    "alignment": ("0 views coincide,\n2 views unrelated", (0.0, 2.0)),
    "uniformity": ("0 collapsed,\nnear −4 spread", (-4.0, 0.0)),  # noqa: RUF001
}
"""The scale of each collapse monitor in words, and the heights that its panel always shows."""
SELECTION = ("accuracy", "f1_weighted")
"""What a checkpoint may be selected by: the first that was logged (multi-class runs log both)."""
CHOICES = {"alpha": "inputs of cells", "beta": "inputs of steps", "gamma": "operations of steps"}
NAMED_WEIGHTS = 4
"""How many of the architecture weights of a panel, those largest at the end, are coloured and labelled."""
LONGEST_LABEL = 40


@dataclass
class _Line:
    """One curve; a label stands right of the panel at the height of its end."""

    steps: list[float]
    values: list[float]
    colour: str = INK
    width: float = 1.4
    dashed: bool = False
    label: str = ""


@dataclass
class _Panel:
    """Lines, the later above the earlier; `scale` is written along the y axis, which always shows `shown`."""

    title: str
    lines: list[_Line]
    scale: str = ""
    shown: tuple[float, ...] = ()

    def sides(self) -> tuple[float, float]:
        """Inches that ticks and scale need on the left, and labels on the right."""
        labels = max((_text_width(line.label) for line in self.lines), default=0.0)
        return TICKS + (SCALE if self.scale else 0.0), (labels + LABEL_GAP if labels else 0.0) + EDGE


Metrics = dict[tuple[str, str], tuple[list[float], list[float]]]
"""Steps and values by name ("train/loss") and run ("found")."""


def draw_curves(metrics_csv: Path, trace_json: Path | None, path: Path, selects: str = "") -> None:
    """Write one picture of what a run logged; panels without data are left out.

    A row of losses and collapse monitors of the search, one of its architecture weights, and one of what
    pretraining and training did with the found network and the baselines, under which their legend stands.

    Args:
        metrics_csv: columns `stage,run,step,epoch,name,value`, one value a line; it may be absent.
        trace_json: `{"names": {"alpha": [...]}, "records": [{"step": 0, "mixing": {"alpha": [...]}}]}` with
            mixing weights, 0 to 1, in the order of their names; None or absent where a strategy has none.
        path: any format that matplotlib writes by its suffix.
        selects: the metric that training selected by, whose curve is shown; empty for the usual one.

    Raises:
        ValueError: if there is nothing to draw.
    """
    figure = curves_figure(_read_metrics(metrics_csv), _read_trace(trace_json), selects)
    with rc_context(STYLE):
        figure.savefig(path, dpi=150)


def drawable(metrics_csv: Path, trace_json: Path | None) -> bool:
    """Whether `draw_curves` has a panel to draw: the scores of micro-benchmarks alone are no curves."""
    metrics, trace = _read_metrics(metrics_csv), _read_trace(trace_json)
    return bool(_search_panels(metrics) or _weight_panels(trace) or _run_panels(metrics))


def curves_figure(metrics: Metrics, trace: dict[str, Any], selects: str = "") -> Figure:
    """The picture of `draw_curves` as a figure with one titled axes a panel."""
    stages = [_search_panels(metrics), _weight_panels(trace), _run_panels(metrics, selects)]
    rows = [row[i : i + ROW_PANELS] for row in stages for i in range(0, len(row), ROW_PANELS)]
    if not rows:
        raise ValueError("draw_curves needs a metric or a trace, got neither")
    entries = _legend(metrics)
    sides = [[panel.sides() for panel in row] for row in rows]
    taken = [sum(map(sum, row)) for row in sides]
    plots = [min(WIDEST_PLOT, (WIDTH - edges) / len(row)) for edges, row in zip(taken, rows, strict=True)]
    width = max(edges + plot * len(row) for edges, plot, row in zip(taken, plots, rows, strict=True))
    widest = max((_text_width(entry.get_label()) for entry in entries), default=0.0) + LEGEND_SAMPLE
    columns = max(1, int((width - TICKS) / widest))
    legend_height = LEGEND_LINE * math.ceil(len(entries) / columns) + (0.1 if entries else 0.0)
    height = (ABOVE + PLOT_HEIGHT + BELOW) * len(rows) + legend_height

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        for i, row in enumerate(rows):
            bottom = height - (ABOVE + PLOT_HEIGHT + BELOW) * (i + 1) + BELOW
            x = 0.0
            for panel, (left, right) in zip(row, sides[i], strict=True):
                place = ((x + left) / width, bottom / height, plots[i] / width, PLOT_HEIGHT / height)
                _draw_panel(figure.add_axes(place), panel, plots[i])
                x += left + plots[i] + right
        if entries:
            figure.legend(
                handles=entries,
                ncols=columns,
                loc="lower left",
                bbox_to_anchor=(TICKS / width, 0.08 / height),
                frameon=False,
                fontsize=SMALL,
                labelcolor=INK,
                handlelength=2.2,
                borderpad=0,
                borderaxespad=0,
            )
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


# What the panels show.


def _search_panels(metrics: Metrics) -> list[_Panel]:
    """Losses and selection metric of the search, and the collapse monitors of search and pretraining."""
    searched = [name for name, run in metrics if name.startswith("search/") and run == FOUND]
    losses = [name for name in searched if name.endswith("_loss")]
    lines = [
        _Line(
            *metrics[name, FOUND], colour=PALETTE[i % len(PALETTE)], label=_plain(name.removesuffix("_loss"))
        )
        for i, name in enumerate(losses)
    ]
    panels = [_Panel("Search: losses", lines)]
    selection = _selection(searched, "search/eval_")
    if selection:
        line = _Line(*metrics[f"search/eval_{selection}", FOUND])
        panels.append(_Panel(f"Search: validation {_plain(selection)}", [line]))
    skips = [name for name in searched if "/skips_" in name]
    lines = [
        _Line(*metrics[name, FOUND], colour=PALETTE[i % len(PALETTE)], label=f"{name.split('_', 1)[1]} cell")
        for i, name in enumerate(skips)
    ]
    panels.append(_Panel("Search: skip connections", lines, shown=(0.0, 2.0)))
    if ("search/eigenvalue", FOUND) in metrics:
        line = _Line(*metrics["search/eigenvalue", FOUND])
        panels.append(_Panel("Search: dominant eigenvalue", [line]))
    for name, (scale, shown) in MONITORS.items():
        stages = {"search": (f"search/eval_{name}", GREY), "pretraining": (f"pretrain/val_{name}", INK)}
        lines = [
            _Line(*metrics[key, FOUND], colour=colour, label=label)
            for label, (key, colour) in stages.items()
            if (key, FOUND) in metrics
        ]
        panels.append(_Panel(f"Collapse: {_plain(name)}", lines, scale, shown))
    return [panel for panel in panels if panel.lines]


def _weight_panels(trace: dict[str, Any]) -> list[_Panel]:
    """A panel for each array of mixing weights; those of `none`, which is never chosen, are left out."""
    panels = []
    records = trace.get("records", [])
    steps = [float(record["step"]) for record in records]
    for name in records[0]["mixing"] if records else []:
        weights = np.array([np.ravel(record["mixing"][name]) for record in records])
        labels = np.ravel(trace.get("names", {}).get(name, [])).tolist()
        labels += [f"{name} {i}" for i in range(len(labels), weights.shape[1])]
        order = np.argsort(-weights[-1], kind="stable").tolist()
        order = [i for i in order if " none:" not in labels[i]]
        lines = [_Line(steps, weights[:, i].tolist(), FAINT, 0.7) for i in order[NAMED_WEIGHTS:]]
        near = 0.02 * np.ptp(weights)
        for place, i in enumerate(named := order[:NAMED_WEIGHTS]):
            # Of lines that coincide the later is dashed, so that both are seen.
            hides = any(np.abs(weights[:, i] - weights[:, j]).max() <= near for j in named[:place])
            values, label = weights[:, i].tolist(), _shortened(labels[i])
            lines.append(_Line(steps, values, PALETTE[place], 1.8, dashed=hides, label=label))
        panels.append(_Panel(f"Search: {name}" + (f" ({CHOICES[name]})" if name in CHOICES else ""), lines))
    return [panel for panel in panels if panel.lines]


def _run_panels(metrics: Metrics, selects: str = "") -> list[_Panel]:
    """Losses and selection metric of the found network and the baselines."""
    selection = selects or _selection([name for name, _ in metrics], "train/val_")
    validation = _runs(metrics, "pretrain/val_loss", dashed=True)
    title = "Pretraining: loss" + (" (dashed: validation)" if validation else "")
    chosen = [] if selection == "loss" else _runs(metrics, f"train/val_{selection}")
    panels = [
        _Panel(title, validation + _runs(metrics, "pretrain/loss")),
        _Panel("Training: loss", _runs(metrics, "train/loss")),
        _Panel("Training: validation loss", _runs(metrics, "train/val_loss")),
        _Panel(f"Training: validation {_plain(selection)}", chosen),
    ]
    return [panel for panel in panels if panel.lines]


def _runs(metrics: Metrics, name: str, dashed: bool = False) -> list[_Line]:
    """One line a run: random genotypes, the named baselines, and on top the found network."""
    lines = []
    for run, (colour, width) in _run_styles(metrics).items():
        if (name, run) in metrics:
            lines.append(_Line(*metrics[name, run], colour, width * (0.75 if dashed else 1.0), dashed))
    return lines


def _run_styles(metrics: Metrics) -> dict[str, tuple[str, float]]:
    """Colour and width of the line of each run, in the order in which they are drawn."""
    runs = list(dict.fromkeys(run for name, run in metrics if name.startswith(("pretrain/", "train/"))))
    named = [run for run in runs if run != FOUND and not run.startswith(RANDOM)]
    styles = {run: (PALE, 0.8) for run in runs if run.startswith(RANDOM)}
    styles |= {run: (PALETTE[i % len(PALETTE)], 1.4) for i, run in enumerate(named)}
    return styles | ({FOUND: (INK, 2.4)} if FOUND in runs else {})


def _legend(metrics: Metrics) -> list[Line2D]:
    """An entry for the found network, each named baseline, and all random genotypes together."""
    entries: dict[str, Line2D] = {}
    for run, (colour, width) in _run_styles(metrics).items():
        label = (
            "random genotypes" if run.startswith(RANDOM) else "found network" if run == FOUND else _plain(run)
        )
        entries[label] = Line2D([], [], color=colour, linewidth=width, label=_shortened(label))
    return sorted(entries.values(), key=lambda entry: (entry.get_color() != INK, entry.get_color() == PALE))


def _selection(logged: list[str], prefix: str) -> str:
    """The metric that selects checkpoints, empty where none was logged."""
    return next((name for name in SELECTION if prefix + name in logged), "")


# What it looks like.


def _draw_panel(axes: Axes, panel: _Panel, width: float) -> None:
    for line in panel.lines:
        dashes = (0, (3, 1.5)) if line.dashed else "-"
        marker = "o" if len(line.steps) == 1 else "None"
        smooth = _smoothed(line.values)
        if smooth is not line.values:
            axes.plot(line.steps, line.values, color=line.colour, linewidth=0.5, alpha=0.25)
        (drawn,) = axes.plot(line.steps, smooth, color=line.colour, linewidth=line.width, linestyle=dashes)
        drawn.set(marker=marker, markersize=2.5 + line.width, fillstyle="none" if line.dashed else "full")
    axes.set_title(panel.title)
    axes.set_xlabel("step", labelpad=1)
    if panel.scale:
        axes.set_ylabel(panel.scale)
    axes.update_datalim([(panel.lines[0].steps[0], value) for value in panel.shown], updatex=False)
    axes.margins(x=0.02)
    axes.autoscale_view()
    steps = sorted({step for line in panel.lines for step in line.steps})
    ticks = min(5, max(1, int(width / 0.5)))
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True) if len(steps) > 1 else FixedLocator(steps))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.5g}".replace("-", "−"))  # noqa: RUF001
    _label_ends(axes, [line for line in panel.lines if line.label])


def _label_ends(axes: Axes, lines: list[_Line]) -> None:
    """Write labels right of the axes where their lines end, moved apart where these ends are close."""
    if not lines:
        return
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    ends = sorted((_smoothed(line.values)[-1], i) for i, line in enumerate(lines))
    line_height = 1.4 * SMALL / 72 / PLOT_HEIGHT
    offsets = line_height * (0.5 + np.arange(len(ends)))
    wanted = (np.array([value for value, _ in ends]) - bottom) / (top - bottom) - offsets
    heights = offsets + np.clip(isotonic_regression(wanted).x, 0.0, max(0.0, 1.0 - line_height * len(ends)))
    for height, (_, i) in zip(heights, ends, strict=True):
        axes.annotate(
            lines[i].label,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(72 * LABEL_GAP, 0.0),
            textcoords="offset points",
            va="center",
            color=lines[i].colour,
            fontsize=SMALL,
        )


def _smoothed(values: list[float]) -> list[float]:
    """A centred moving average over a fiftieth of a long series; a short one as it is."""
    half = len(values) // 100
    if half == 0:
        return values
    padded = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(len(values))
    start, stop = np.maximum(last - half, 0), np.minimum(last + half + 1, len(values))
    return ((padded[stop] - padded[start]) / (stop - start)).tolist()


def _text_width(text: Any) -> float:
    """Width of a small text in inches."""
    if not text:
        return 0.0
    return (
        float(TextPath((0, 0), text, size=SMALL, prop=FontProperties(family=FONT)).get_extents().width) / 72
    )


def _shortened(label: str) -> str:
    """A label without its middle where it is too long for a panel."""
    half = LONGEST_LABEL // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[: half - 1]}…{label[-half:]}"


def _plain(name: str) -> str:
    """The words of a metric's name: "arch loss" of "search/arch_loss"."""
    return name.rpartition("/")[2].replace("_", " ")

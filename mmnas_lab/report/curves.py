"""What a run looked like over its steps: losses, collapse monitors, validation metrics, architecture weights."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

FOUND = "found"
"""Name of the run that trains the found network; all others are baselines."""

# Okabe and Ito's palette, which colour-blind readers tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GREY, FAINT = "#22262b", "#5d6670", "#c3cad1"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
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
    "legend.frameon": False,
    "legend.fontsize": 7,
}
COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 3, 4.0, 2.7
NAMED_WEIGHTS = 3
"""How many of the architecture weights of a panel are coloured and labelled."""

Series = tuple[list[float], list[float]]
"""Steps and values, of the same length."""
Metrics = dict[tuple[str, str], Series]
"""Series by name ("train/loss") and run ("found")."""


@dataclass
class _Panel:
    """One plot: its title, what draws it, and the label below it."""

    title: str
    draw: Callable[[Axes], None]
    x_label: str = "step"


def draw_curves(metrics_csv: Path, trace_json: Path | None, path: Path) -> None:
    """Write one picture of everything that a run logged; panels without data are left out.

    Args:
        metrics_csv: columns `stage,run,step,epoch,name,value`, one value a line; it may be absent.
        trace_json: `{"names": {"alpha": [...]}, "records": [{"step": 0, "mixing": {"alpha": [...]}}]}` with flat
            lists of mixing weights between 0 and 1; None or absent for strategies that have none.
        path: a file of any format that matplotlib writes, `curves.png`.

    Raises:
        ValueError: if there is nothing to draw.
    """
    with rc_context(STYLE):
        figure = curves_figure(read_metrics(metrics_csv), _read_trace(trace_json))
        figure.savefig(path, dpi=150)


def curves_figure(metrics: Metrics, trace: dict[str, Any]) -> Figure:
    """The picture of `draw_curves` as a figure with one axes a panel, titled."""
    panels = _metric_panels(metrics) + _weight_panels(trace)
    if not panels:
        raise ValueError("draw_curves needs a metric or a trace, got neither")
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL_WIDTH * columns, PANEL_HEIGHT * rows), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        panel.draw(axes)
        axes.set(title=panel.title, xlabel=panel.x_label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.02)
    return figure


def read_metrics(path: Path) -> Metrics:
    """Every series of a metrics file, in the order of its steps; values that are not finite are left out."""
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

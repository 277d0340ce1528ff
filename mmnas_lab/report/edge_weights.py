"""The mixing weights of every edge of a cell over the epochs of a search, a small panel an edge."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmnas_lab.report.curves import GREY, INK, PALETTE, STYLE

COLUMNS = 7
PANEL_WIDTH, PANEL_HEIGHT, TITLE, BELOW, LEFT, LEGEND_LINE = 1.6, 1.15, 0.34, 0.5, 0.55, 0.19
SKIP, NONE = "skip_connect", "none"


def edge_series(trace: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Weights over the records, by edge ("normal 0->2") and operation.

    Arrays of weights that belong to no operation of an edge are left out.

    Args:
        trace: as `trace.json` of a search.
    """
    series: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for name, labels in trace.get("names", {}).items():
        for i, label in enumerate(labels):
            edge, colon, op = label.partition(": ")
            if colon and "->" in edge:
                series[edge][op] = [record["mixing"][name][i] for record in trace["records"]]
    return dict(series)


def draw_edge_weights(trace_json: Path, path: Path) -> bool:
    """Write one picture of all edges; False, and nothing written, where the trace has none.

    Skip connections are drawn in ink and thicker, `none` dashed; the other operations have a colour each.

    Args:
        trace_json: of a search.
        path: any format that matplotlib writes by its suffix.
    """
    trace = json.loads(trace_json.read_text())
    series = edge_series(trace)
    if not series:
        return False
    epochs = [record["epoch"] for record in trace["records"]]
    ops = list(dict.fromkeys(op for weights in series.values() for op in weights))
    others = [op for op in ops if op not in (SKIP, NONE)]
    styles: dict[str, dict[str, Any]] = {
        op: {"color": PALETTE[k % len(PALETTE)], "linewidth": 1.1} for k, op in enumerate(others)
    }
    styles |= {
        SKIP: {"color": INK, "linewidth": 1.9},
        NONE: {"color": GREY, "linewidth": 1.0, "linestyle": (0, (3, 1.5))},
    }
    kinds: dict[str, list[str]] = defaultdict(list)
    for edge in series:
        kinds[edge.split(" ")[0]].append(edge)
    lines = [edges[i : i + COLUMNS] for edges in kinds.values() for i in range(0, len(edges), COLUMNS)]
    columns = max(map(len, lines))
    every = [weight for weights in series.values() for values in weights.values() for weight in values]
    room = 0.05 * (max(every) - min(every)) or 0.01
    legend_columns = min(len(ops), columns)
    below = BELOW + LEGEND_LINE * -(-len(ops) // legend_columns)
    width, height = LEFT + columns * PANEL_WIDTH, len(lines) * (PANEL_HEIGHT + TITLE) + below
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        for row, edges in enumerate(lines):
            for column, edge in enumerate(edges):
                bottom = height - (row + 1) * (PANEL_HEIGHT + TITLE)
                place = (
                    (LEFT + column * PANEL_WIDTH) / width,
                    bottom / height,
                    (PANEL_WIDTH - 0.16) / width,
                    PANEL_HEIGHT / height,
                )
                axes = figure.add_axes(place)
                for op, values in series[edge].items():
                    marker = "o" if len(epochs) == 1 else "None"
                    axes.plot(epochs, values, marker=marker, markersize=3, **styles[op])
                axes.set_title(edge.replace("->", " \N{RIGHTWARDS ARROW} "), fontsize=8, pad=3)
                axes.set_ylim(min(every) - room, max(every) + room)
                if row == len(lines) - 1:
                    axes.set_xlabel("epoch", labelpad=1, fontsize=7.5)
                axes.tick_params(labelsize=7, labelleft=column == 0, labelbottom=row == len(lines) - 1)
        handles = [Line2D([], [], label=op, **styles[op]) for op in ops]
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=legend_columns,
            frameon=False,
            fontsize=7.5,
        )
        figure.savefig(path, dpi=150)
    return True

"""The scores of a greedy search: a panel a choice, a row an option, a dot a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from mmnas_lab.report.curves import GREY, INK, PALE, PALETTE, STYLE

WIDTH, ROW, TITLE, BELOW, LEFT, RIGHT = 6.4, 0.26, 0.5, 0.5, 1.5, 1.4


def draw_decisions(decisions_json: Path, path: Path) -> None:
    """Write one picture of all choices that had rivals, each on a scale of its own.

    The option taken is blue, those tied with it orange, others grey; bars are means, and beside them stand
    mean and standard deviation over the seeds.

    Args:
        decisions_json: `decisions.json` of a search.
        path: any format that matplotlib writes by its suffix.
    """
    every: dict[str, Any] = json.loads(decisions_json.read_text())
    decisions = {name: one for name, one in every.items() if len(one["options"]) > 1}
    if not decisions:
        return
    heights = [TITLE + ROW * len(one["options"]) for one in decisions.values()]
    height = sum(heights) + BELOW
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        top = height
        for (name, decision), room in zip(decisions.items(), heights, strict=True):
            inner = room - TITLE
            place = (
                LEFT / WIDTH,
                (top - room + 0.12) / height,
                (WIDTH - LEFT - RIGHT) / WIDTH,
                inner / height,
            )
            _draw(figure.add_axes(place), name, decision)
            top -= room
        figure.savefig(path, dpi=150)


def _draw(axes: Any, name: str, decision: dict[str, Any]) -> None:
    options = decision["options"]
    for row, (option, told) in enumerate(reversed(options.items())):
        tied = option in decision["tie"]
        colour = PALETTE[0] if option == decision["option"] else PALETTE[1] if tied else GREY
        axes.plot(told["scores"], [row] * len(told["scores"]), "o", color=colour, markersize=4, alpha=0.7)
        axes.plot([told["mean"]] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2)
        spread = f" ± {told['std']:.4f}" if told["std"] is not None else ""
        label = f"{told['mean']:.4f}{spread}"
        axes.annotate(
            label,
            (1.02, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=7.5,
            color=INK if option == decision["option"] else GREY,
        )
    axes.set_yticks(range(len(options)), list(reversed(options)))
    axes.set_ylim(-0.6, len(options) - 0.4)
    axes.margins(x=0.08)
    axes.grid(axis="x", color=PALE, linewidth=0.4)
    axes.tick_params(labelsize=7)
    end = "a tie, taken by cost" if decision["tie"] else ""
    if not end and decision["confidence"] is not None:
        end = f"confidence {decision['confidence']:.2f}"
    axes.set_title(name.replace("_", " ") + (f" ({end})" if end else ""), fontsize=8.5)

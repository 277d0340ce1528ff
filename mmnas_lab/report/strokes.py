"""What all drawings of genotypes are made of: boxes, wires and words of one look.

All lengths are inches, y points up; font sizes are points.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath

from mmnas_lab.report.layered_layout import Box, Layout, Wire

# Okabe and Ito's palette, which colour-blind readers tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, GREY, FAINT, CELL_FILL = "#22262b", "#5d6670", "#c3cad1", "#f4f6f8"
FONT, NAME, SMALL = "DejaVu Sans", 10.0, 7.5


def save(figure: Figure, path: Path, caller: str) -> None:
    """Write `.svg`, the same bytes for the same figure and text as text; or `.png`, 200 dots per inch.

    Raises:
        ValueError: if the suffix of `path` is neither; the message begins with the caller's name.
    """
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{caller} writes .svg or .png, got '{path.name}'")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmnas_lab"}):
        if path.suffix == ".svg":
            figure.savefig(path, metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(path)


def draw_wire(axes: Axes, layout: Layout, wire: Wire, colour: str, arrow: bool = True) -> None:
    """Level where it leaves, passes and arrives, curved between columns."""
    points: list[tuple[float, float]] = []
    codes: list[Any] = []
    for before, after in wire.hops():
        (start, end), (y0, y1) = (
            (layout.boxes[before], layout.boxes[after]),
            layout.heights(wire, before, after),
        )
        x0, x1 = start.column_end, end.left
        points += [(start.right, y0), (x0, y0), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1), (x1, y1)]
        codes += [Curve.LINETO if codes else Curve.MOVETO, Curve.LINETO, *[Curve.CURVE4] * 3]
    style = "-|>,head_length=0.32,head_width=0.14" if arrow else "-"
    patch = FancyArrowPatch(path=Curve(points, codes), arrowstyle=style, mutation_scale=14, color=colour)
    patch.set(linewidth=1.3, joinstyle="miter", capstyle="butt", zorder=2)
    axes.add_patch(patch)


def draw_box(
    axes: Axes,
    left: float,
    right: float,
    bottom: float,
    top: float,
    fill: str,
    edge: str,
    rounding: float = 0.06,
    dashed: bool = False,
    zorder: float = 3.0,
) -> None:
    style = f"round,pad=0,rounding_size={rounding}"
    patch = FancyBboxPatch((left, bottom), right - left, top - bottom, boxstyle=style, mutation_aspect=1.0)
    patch.set(facecolor=fill, edgecolor=edge, linewidth=1.0, linestyle="--" if dashed else "-", zorder=zorder)
    axes.add_patch(patch)


def draw_concat(axes: Axes, box: Box) -> None:
    draw_box(axes, box.left, box.right, box.y - box.height / 2, box.y + box.height / 2, "white", INK)
    write(axes, box.x, box.y, "concat", SMALL + 1, INK, rotation=90)


def write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: float,
    colour: str,
    ha: str = "center",
    weight: str = "normal",
    style: Literal["normal", "italic"] = "normal",
    rotation: float = 0.0,
) -> None:
    if text:
        font = FontProperties(family=FONT, size=size, weight=weight, style=style)
        va = "center" if rotation else "center_baseline"
        axes.text(x, y, text, fontproperties=font, color=colour, ha=ha, va=va, rotation=rotation, zorder=5)


def text_width(text: str, size: float) -> float:
    """Width of a text in inches, bold to be on the safe side."""
    if not text:
        return 0.0
    return (
        float(
            TextPath((0, 0), text, size=size, prop=FontProperties(family=FONT, weight="bold"))
            .get_extents()
            .width
        )
        / 72
    )


def margin_text(margins: dict[str, float], key: str) -> str:
    """The text of a margin; empty where none was recorded."""
    if key not in margins:
        return ""
    value = margins[key]
    if value == 0:
        return "tie"
    return f"{value:+.3f}" if abs(value) >= 0.0005 else f"{value:+.0e}".replace("e-0", "e-")


def readable_on(colour: str) -> str:
    """Black or white, whichever stands out more on a colour (relative luminance of WCAG 2)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.3 else INK

"""A drawing of a fusion genotype, from the backbone features on the left to the head on the right.

First the steps are laid out inside each cell, then the cells between features and head, both by
`layered_layout`; so no wire runs through a box or a label. All lengths are inches, y points up; font sizes
are points.
"""

from __future__ import annotations

from itertools import islice, permutations
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmnas_lab.report.layered_layout import Box, Layout, Wire, arrange
from mmnas_lab.report.strokes import (
    CELL_FILL,
    FAINT,
    GREY,
    INK,
    NAME,
    PALETTE,
    SMALL,
    draw_box,
    draw_concat,
    draw_wire,
    margin_text,
    readable_on,
    save,
    text_width,
    write,
)

OP_NAMES = {
    "zero": "Zero",
    "sum": "Sum",
    "attention": "Attention",
    "linear_glu": "LinearGLU",
    "concat_fc": "ConcatFC",
}
# A usual modality has the same colour in all drawings.
USUAL_COLOURS = {"image": 0, "video": 0, "rgb": 0, "text": 1, "skeleton": 1, "depth": 1, "audio": 2}
PORT, TITLE = 0.19, 0.3
MOST_ORDERS = 24
"""Of the orders of modalities tried for few crossings: all of up to four."""


def draw_fusion(genotype: dict[str, Any], margins: dict[str, float], path: Path) -> None:
    """Write a drawing of a fusion genotype, fit for a paper.

    It shows the features that the cells take, coloured by modality, each cell with its inputs x and y and its
    steps, and the cells that reach the head. Beside each choice stands the margin by which it won. The
    residual and the norm at the end of a cell are the same in every genotype and are left out.

    Args:
        genotype: JSON form of a fusion genotype: `cells` (`inputs` and `steps` of each) and `head_cells`.
        margins: by `"cell.0.inputs"`, `"cell.0.step.0.inputs"`, `"cell.0.step.0.op"`; any may be absent.
        path: `.svg`, the same bytes for the same genotype and text as text; or `.png`, 200 dots per inch.

    Raises:
        ValueError: if the genotype is of another space, or the suffix of `path` is neither `.svg` nor `.png`.
    """
    save(fusion_figure(genotype, margins), path, "draw_fusion")


def fusion_figure(genotype: dict[str, Any], margins: dict[str, float]) -> Figure:
    """The drawing of `draw_fusion` as a figure whose single axes measures inches."""
    if genotype.get("space") != "fusion":
        raise ValueError(f"draw_fusion needs a genotype of space 'fusion', got {genotype.get('space')!r}")
    cells = genotype["cells"]
    insides = {f"cell.{i}": _inside(f"cell.{i}", cell, margins) for i, cell in enumerate(cells)}
    features = sorted({name for cell in cells for name in cell["inputs"]} - set(insides), key=_natural_order)
    layout = _outside(cells, int(genotype["head_cells"]), insides, features)
    note = "Small numbers: the margin by which a choice won over its runner-up." if margins else ""

    pad = 0.1
    left, right = -pad, max(layout.right, text_width(note, SMALL)) + pad
    bottom, top = layout.bottom - pad - (TITLE if note else 0.0), layout.top + pad
    top = max(top, max(layout.boxes[name].y for name in features) + 0.16 + TITLE + pad)
    figure = Figure(figsize=(right - left, top - bottom), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(bottom, top))
    axes.set_axis_off()
    colours = _modality_colours(sorted({_modality(name) for name in features}))

    _draw_features(axes, [layout.boxes[name] for name in features], colours)
    for wire in layout.wires:
        draw_wire(axes, layout, wire, colours[_modality(wire.source)] if wire.source in features else INK)
    for i, (key, inside) in enumerate(insides.items()):
        _draw_cell(axes, layout.boxes[key], inside, cells[i], margins)
    if "concat" in layout.boxes:
        draw_concat(axes, layout.boxes["concat"])
    head = layout.boxes["head"]
    draw_box(axes, head.left, head.right, head.y - head.height / 2, head.y + head.height / 2, INK, INK)
    write(axes, head.x, head.y, "head", NAME, "white", weight="bold")
    if note:
        write(axes, 0.0, bottom + pad + 0.06, note, SMALL, GREY, ha="left")
    return figure


# What stands where.


def _outside(
    cells: list[dict[str, Any]], head_cells: int, insides: dict[str, Layout], features: list[str]
) -> Layout:
    """Features, cells, concat and head, and the wires between them."""
    width = max(text_width(name, NAME) for name in features) + 0.26
    boxes = [Box(name, 0, width, 0.32) for name in features]
    depth, wires = dict.fromkeys(features, 0), []
    for (key, inside), cell in zip(insides.items(), cells, strict=True):
        depth[key] = 1 + max(depth[name] for name in cell["inputs"])
        middle = (inside.top + inside.bottom) / 2
        entries = tuple(inside.boxes[port].y - middle for port in "xy")
        exit_height = inside.boxes["out"].y - middle
        boxes.append(Box(key, depth[key], inside.right, inside.top - inside.bottom, entries, exit_height))
        wires += [Wire(name, key, port) for port, name in enumerate(cell["inputs"])]
    boxes.append(Box("head", 2 + max(depth.values()), 0.62, 0.4))
    _join(boxes, wires, list(insides)[-head_cells:], "head")

    def gap(above: Box, below: Box) -> float:
        if above.column:
            return 0.24
        return 0.1 if _modality(above.key) == _modality(below.key) else 0.26 + TITLE

    modalities = list(dict.fromkeys(_modality(name) for name in features))
    orders = [
        [name for modality in order for name in features if _modality(name) == modality]
        for order in islice(permutations(modalities), MOST_ORDERS)
    ]
    return arrange(boxes, wires, orders, gap, column_gap=0.45)


def _inside(cell_key: str, cell: dict[str, Any], margins: dict[str, float]) -> Layout:
    """The inputs, the steps and the output of one cell, and the frame around them."""
    strip = max(0.36, text_width(margin_text(margins, f"{cell_key}.inputs"), SMALL) + 0.14)
    boxes = [Box(port, 0, strip, 0.24) for port in "xy"]
    states, depth, wires = ["x", "y"], {"x": 0, "y": 0}, []
    for m, step in enumerate(cell["steps"]):
        key = f"step.{m}"
        sources = [states[i] for i in step["inputs"]]
        depth[key] = 1 + max(depth[source] for source in sources)
        width = sum(_step_widths(step["op"], margins, f"{cell_key}.{key}"))
        boxes.append(Box(key, depth[key], width, 0.58, (PORT, -PORT)))
        wires += [Wire(source, key, port) for port, source in enumerate(sources)]
        states.append(key)
    boxes.append(Box("out", 2 + max(depth.values()), 0.0, 0.0))
    _join(boxes, wires, states[2:], "out")
    layout = arrange(boxes, wires, [["x", "y"]], lambda above, below: 0.14, column_gap=0.28)
    top, bottom = layout.top + TITLE + 0.04, layout.bottom - 0.12
    layout.boxes["frame"] = Box("frame", 0, 0.0, top - bottom, y=(top + bottom) / 2)
    return layout


def _join(boxes: list[Box], wires: list[Wire], parts: list[str], target: str) -> None:
    """Lead all parts to the target, several of them through a box named concat in the column before it."""
    end = boxes[-1]
    if len(parts) == 1:
        end.column -= 1
        wires.append(Wire(parts[0], target, 0))
        return
    step = max(0.2, 0.5 / len(parts))
    entries = tuple(step * ((len(parts) - 1) / 2 - port) for port in range(len(parts)))
    boxes.append(Box("concat", end.column - 1, 0.26, max(0.72, step * len(parts)), entries, any_order=True))
    wires += [Wire(part, "concat", port) for port, part in enumerate(parts)]
    wires.append(Wire("concat", target, 0))


def _step_widths(op: str, margins: dict[str, float], key: str) -> tuple[float, float]:
    """Widths of the two parts of a step's box: the margin of its inputs, and its operation."""
    inputs = text_width(margin_text(margins, f"{key}.inputs"), SMALL)
    body = max(text_width(OP_NAMES[op], NAME), text_width(margin_text(margins, f"{key}.op"), SMALL))
    return (inputs + 0.16 if inputs else 0.0), body + 0.22


# What it looks like.


def _draw_features(axes: Axes, features: list[Box], colours: dict[str, str]) -> None:
    for modality, colour in colours.items():
        group = [box for box in features if _modality(box.key) == modality]
        top = max(box.y + box.height / 2 for box in group)
        write(axes, group[0].x, top + 0.15, modality, SMALL + 1, colour)
        for box in group:
            bottom, top = box.y - box.height / 2, box.y + box.height / 2
            draw_box(axes, box.left, box.right, bottom, top, colour, colour)
            write(axes, box.x, box.y, box.key, NAME, readable_on(colour), weight="bold")


def _draw_cell(axes: Axes, box: Box, inside: Layout, cell: dict[str, Any], margins: dict[str, float]) -> None:
    """The frame of a cell and everything in it."""
    frame = inside.boxes.pop("frame")
    for part in inside.boxes.values():
        part.x, part.y = part.x + box.left, part.y + box.y - frame.y
        part.column_end += box.left
    bottom, top = box.y - box.height / 2, box.y + box.height / 2
    draw_box(axes, box.left, box.right, bottom, top, CELL_FILL, FAINT, rounding=0.1, zorder=0.5)
    write(axes, box.left + 0.12, top - 0.17, f"Cell {box.key.split('.')[1]}", NAME, INK, "left", "bold")
    for wire in inside.wires:
        draw_wire(axes, inside, wire, INK, arrow=wire.target != "out")
    x, y = inside.boxes["x"], inside.boxes["y"]
    for port in (x, y):
        write(axes, port.x + 0.02, port.y, port.key, NAME, INK, style="italic")
    write(axes, x.x + 0.02, (x.y + y.y) / 2, margin_text(margins, f"{box.key}.inputs"), SMALL, GREY)
    for m, step in enumerate(cell["steps"]):
        _draw_step(axes, inside.boxes[f"step.{m}"], step["op"], margins, f"{box.key}.step.{m}")
    if "concat" in inside.boxes:
        draw_concat(axes, inside.boxes["concat"])


def _draw_step(axes: Axes, box: Box, op: str, margins: dict[str, float], key: str) -> None:
    strip, body = _step_widths(op, margins, key)
    bottom, top = box.y - box.height / 2, box.y + box.height / 2
    zero = op == "zero"
    draw_box(axes, box.left, box.right, bottom, top, "white", GREY if zero else INK, dashed=zero)
    write(axes, box.left + strip / 2, box.y, margin_text(margins, f"{key}.inputs"), SMALL, GREY)
    if strip:
        axes.plot([box.left + strip] * 2, [bottom + 0.08, top - 0.08], color=FAINT, linewidth=0.8, zorder=3)
    margin = margin_text(margins, f"{key}.op")
    x = box.right - body / 2
    write(axes, x, box.y + (0.1 if margin else 0.0), OP_NAMES[op], NAME, GREY if zero else INK)
    write(axes, x, box.y - 0.12, margin, SMALL, GREY)


def _modality(name: str) -> str:
    return name.partition(".")[0]


def _natural_order(name: str) -> tuple[str, int, str]:
    """Sort key of features: by modality, then by level, where "image.10" follows "image.9"."""
    modality, _, level = name.partition(".")
    return modality, int(level) if level.isdigit() else -1, level


def _modality_colours(modalities: list[str]) -> dict[str, str]:
    colours: dict[str, str] = {}
    for modality in sorted(modalities, key=lambda name: name not in USUAL_COLOURS):
        free = [colour for colour in PALETTE if colour not in colours.values()] or list(PALETTE)
        usual = PALETTE[USUAL_COLOURS[modality]] if modality in USUAL_COLOURS else free[0]
        colours[modality] = usual if usual in free else free[0]
    return colours

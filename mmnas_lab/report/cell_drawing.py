"""A drawing of the cells of a CNN genotype, one below the other, from a cell's inputs to its output.

A node is a box with a row for each of its edges: the wire of the source ends at the operation that it meets,
and the node is the sum of its rows. Places come from `layered_layout`. All lengths are inches, y points up.
"""

from __future__ import annotations

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
from mmnas_lab.search_space.cnn_cells.genotype import CellGenotype, EdgeGenotype

TITLES = {"normal": "Normal cell", "reduce": "Reduction cell", "cell": "Cell"}
INPUTS = {"normal": ("cell k - 2", "cell k - 1"), "reduce": ("cell k - 2", "cell k - 1"), "cell": ("input",)}
# One colour a family of operations; what has no weights is warm.
COLOURS = {
    "sep": PALETTE[0],
    "nor": PALETTE[0],
    "dil": PALETTE[2],
    "max": PALETTE[4],
    "avg": PALETTE[4],
    "skip": PALETTE[1],
    "noise": GREY,
}
ROW, HEAD, STRIP, TITLE, PAD = 0.27, 0.25, 0.09, 0.3, 0.1


def draw_cells(genotype: dict[str, Any], margins: dict[str, float], path: Path) -> None:
    """Write a drawing of the cells of a CNN genotype, fit for a paper.

    Nodes that are absent, and edges from them, are left out, as the network leaves them out; so is `none`.
    Beside each choice stands the margin by which it won: in the head of a node that of its edges, in each row
    that of the operation.

    Args:
        genotype: JSON form of a genotype of `cnn_cells`.
        margins: by `"normal.node.2.edges"`, `"normal.node.2.edge.0.op"`; any may be absent.
        path: `.svg`, the same bytes for the same genotype and text as text; or `.png`, 200 dots per inch.

    Raises:
        ValueError: if the genotype is of another space, or the suffix of `path` is neither `.svg` nor `.png`.
    """
    save(cells_figure(genotype, margins), path, "draw_cells")


def cells_figure(genotype: dict[str, Any], margins: dict[str, float]) -> Figure:
    """The drawing of `draw_cells` as a figure whose single axes measures inches."""
    if genotype.get("space") != "cnn_cells":
        raise ValueError(f"draw_cells needs a genotype of space 'cnn_cells', got {genotype.get('space')!r}")
    cells = [_cell(cell) for cell in genotype["cells"]]
    layouts = [_layout(cell, margins) for cell in cells]
    note = "Small numbers: the margin by which a choice won over its runner-up." if margins else ""

    heights = [layout.top - layout.bottom + TITLE + 3 * PAD for layout in layouts]
    width = max(*(layout.right + 2 * PAD for layout in layouts), text_width(note, SMALL))
    height = sum(heights) + 1.5 * PAD * (len(cells) - 1) + (TITLE if note else 0.0)
    figure = Figure(figsize=(width + 2 * PAD, height + 2 * PAD), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-PAD, width + PAD), ylim=(-height - PAD, PAD))
    axes.set_axis_off()
    top = 0.0
    for cell, layout, cell_height in zip(cells, layouts, heights, strict=True):
        draw_box(axes, 0.0, width, top - cell_height, top, CELL_FILL, FAINT, rounding=0.1, zorder=0.5)
        write(axes, PAD + 0.02, top - 0.17, TITLES[cell.kind], NAME, INK, "left", "bold")
        rise = top - TITLE - PAD - layout.top
        for box in layout.boxes.values():
            box.x, box.y, box.column_end = box.x + PAD, box.y + rise, box.column_end + PAD
        _draw_cell(axes, layout, cell, margins)
        top -= cell_height + 1.5 * PAD
    if note:
        write(axes, 0.0, -height + 0.06, note, SMALL, GREY, ha="left")
    return figure


# What stands where.


def _cell(cell: dict[str, Any]) -> CellGenotype:
    """A cell from its JSON form, without `none`."""
    nodes = (
        tuple(EdgeGenotype(edge["op"], edge["input"]) for edge in node if edge["op"] != "none")
        for node in cell["nodes"]
    )
    return CellGenotype(cell["kind"], tuple(nodes))


def _layout(cell: CellGenotype, margins: dict[str, float]) -> Layout:
    """Inputs, nodes and output of one cell, and the wires between them."""
    inputs = INPUTS[cell.kind]
    live = cell.live_nodes(len(inputs))
    boxes = [Box(_key(j), 0, text_width(name, NAME) + 0.24, 0.34) for j, name in enumerate(inputs)]
    depth = dict.fromkeys(range(len(inputs)), 0)
    wires: list[Wire] = []
    for state, node in live.items():
        depth[state] = 1 + max(depth[edge.input] for edge in node)
        height = HEAD + ROW * len(node)
        entries = tuple(height / 2 - HEAD - ROW * (row + 0.5) for row in range(len(node)))
        boxes.append(Box(_key(state), depth[state], _node_width(cell, state, margins), height, entries))
        wires += [Wire(_key(edge.input), _key(state), row) for row, edge in enumerate(node)]
    outputs = [state for state in live if cell.kind != "cell" or state == len(cell.nodes)]
    last = max(depth.values())
    if len(outputs) == 1:
        boxes.append(Box("out", last + 1, 0.52, 0.34))
        wires.append(Wire(_key(outputs[0]), "out", 0))
    elif outputs:
        step = 0.2
        entries = tuple(step * ((len(outputs) - 1) / 2 - port) for port in range(len(outputs)))
        height = max(0.72, step * len(outputs))
        boxes.append(Box("concat", last + 1, 0.26, height, entries, any_order=True))
        boxes.append(Box("out", last + 2, 0.52, 0.34))
        wires += [Wire(_key(state), "concat", port) for port, state in enumerate(outputs)]
        wires.append(Wire("concat", "out", 0))
    order = [_key(j) for j in range(len(inputs))]
    return arrange(boxes, wires, [order], lambda above, below: 0.2, column_gap=0.4)


def _key(state: int) -> str:
    return f"state.{state}"


def _node_width(cell: CellGenotype, state: int, margins: dict[str, float]) -> float:
    name = f"{cell.kind}.node.{state}"
    edges = cell.nodes[state - len(INPUTS[cell.kind])]
    rows = [(_op_name(edge.op), NAME, margin_text(margins, f"{name}.edge.{edge.input}.op")) for edge in edges]
    rows.append((f"node {state}", SMALL + 1, margin_text(margins, f"{name}.edges")))
    return max(
        STRIP + 0.16 + text_width(text, size) + (text_width(note, SMALL) + 0.14 if note else 0.0)
        for text, size, note in rows
    )


def _op_name(op: str) -> str:
    words = op.removesuffix("_connect").removeprefix("nor_").replace("_", " ")
    return words.replace("1x1", "1\u00d71").replace("3x3", "3\u00d73").replace("5x5", "5\u00d75")


# What it looks like.


def _draw_cell(axes: Axes, layout: Layout, cell: CellGenotype, margins: dict[str, float]) -> None:
    inputs = INPUTS[cell.kind]
    for wire in layout.wires:
        draw_wire(axes, layout, wire, INK)
    for j, name in enumerate(inputs):
        box = layout.boxes[_key(j)]
        _draw_label(axes, box, name, "white", INK)
    for state, node in cell.live_nodes(len(inputs)).items():
        _draw_node(axes, layout.boxes[_key(state)], f"{cell.kind}.node.{state}", node, margins)
    if "concat" in layout.boxes:
        draw_concat(axes, layout.boxes["concat"])
    if "out" in layout.boxes:
        _draw_label(axes, layout.boxes["out"], "out", INK, INK)


def _draw_label(axes: Axes, box: Box, text: str, fill: str, edge: str) -> None:
    draw_box(axes, box.left, box.right, box.y - box.height / 2, box.y + box.height / 2, fill, edge)
    colour = INK if fill == "white" else readable_on(fill)
    write(axes, box.x, box.y, text, NAME, colour, weight="bold" if fill != "white" else "normal")


def _draw_node(
    axes: Axes, box: Box, name: str, node: tuple[EdgeGenotype, ...], margins: dict[str, float]
) -> None:
    bottom, top = box.y - box.height / 2, box.y + box.height / 2
    draw_box(axes, box.left, box.right, bottom, top, "white", INK)
    height = top - HEAD / 2 - 0.01
    write(axes, box.left + STRIP + 0.07, height, f"node {name.split('.')[2]}", SMALL + 1, GREY, ha="left")
    write(axes, box.right - 0.08, height, margin_text(margins, f"{name}.edges"), SMALL, GREY, ha="right")
    for edge, entry in zip(node, box.entries, strict=True):
        y = box.y + entry
        axes.plot([box.left, box.right], [y + ROW / 2] * 2, color=FAINT, linewidth=0.8, zorder=3.5)
        colour = COLOURS[edge.op.split("_")[0]]
        left, half = box.left + 0.05, ROW / 2 - 0.05
        draw_box(axes, left, left + STRIP - 0.03, y - half, y + half, colour, colour, rounding=0.02, zorder=4)
        write(axes, box.left + STRIP + 0.07, y, _op_name(edge.op), NAME, INK, ha="left")
        note = margin_text(margins, f"{name}.edge.{edge.input}.op")
        write(axes, box.right - 0.08, y, note, SMALL, GREY, ha="right")

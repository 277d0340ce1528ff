"""A drawing of a genotype of mixers: modalities, their encoders, the fusion, the head, from left to right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmnas_lab.report.layered_layout import Box, Wire, arrange
from mmnas_lab.report.strokes import (
    GREY,
    INK,
    NAME,
    PALETTE,
    SMALL,
    draw_box,
    draw_wire,
    margin_text,
    readable_on,
    save,
    text_width,
    write,
)

NAMES = {
    "mlp_mixer": "MLP-Mixer",
    "hyper_mixer": "HyperMixer",
    "monarch_mixer": "Monarch Mixer",
    "ramlp": "RaMLP",
    "feed_forward": "feed-forward",
}
PAD, NOTE = 0.1, 0.3


def draw_mixers(genotype: dict[str, Any], margins: dict[str, float], path: Path) -> None:
    """Write a drawing of a genotype of mixers, fit for a paper.

    Under each choice stands the margin by which it won.

    Args:
        genotype: JSON form of a genotype of mixers.
        margins: by `"encoder.<modality>"`, `"fusion_function"`, `"fusion_network"`; any may be absent.
        path: `.svg`, the same bytes for the same genotype and text as text; or `.png`, 200 dots per inch.

    Raises:
        ValueError: if the genotype is of another space, or the suffix of `path` is neither `.svg` nor `.png`.
    """
    save(mixers_figure(genotype, margins), path, "draw_mixers")


def mixers_figure(genotype: dict[str, Any], margins: dict[str, float]) -> Figure:
    """The drawing of `draw_mixers` as a figure whose single axes measures inches."""
    if genotype.get("space") != "mixers":
        raise ValueError(f"draw_mixers needs a genotype of space 'mixers', got {genotype.get('space')!r}")
    encoders: dict[str, str] = genotype["encoders"]
    columns = [{f"encoder.{modality}": name for modality, name in encoders.items()}]
    columns += [{choice: genotype[choice]} for choice in ("fusion_function", "fusion_network")]
    columns = [{key: str(name) for key, name in column.items() if name is not None} for column in columns]
    labels = {key: NAMES.get(name, name) for column in columns for key, name in column.items()}

    boxes = [Box(modality, 0, text_width(modality, NAME) + 0.26, 0.32) for modality in encoders]
    boxes += [
        Box(key, depth, max(text_width(labels[key], NAME), _width(margins, key)) + 0.26, 0.5)
        for depth, column in enumerate(columns, 1)
        for key in column
    ]
    boxes.append(Box("head", boxes[-1].column + 1, 0.62, 0.4))
    wires = [Wire(modality, f"encoder.{modality}", 0) for modality in encoders]
    ends = [f"encoder.{modality}" for modality in encoders]
    for key in (*(key for column in columns[1:] for key in column), "head"):
        wires += [Wire(end, key, 0) for end in ends]
        ends = [key]
    layout = arrange(boxes, wires, [list(encoders)], lambda above, below: 0.24, column_gap=0.45)

    note = "Small numbers: the margin by which a choice won over its runner-up." if margins else ""
    left, right = -PAD, max(layout.right, text_width(note, SMALL)) + PAD
    bottom, top = layout.bottom - PAD - (NOTE if note else 0.0), layout.top + PAD
    figure = Figure(figsize=(right - left, top - bottom), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(bottom, top))
    axes.set_axis_off()
    colours = {modality: PALETTE[k % len(PALETTE)] for k, modality in enumerate(encoders)}
    for wire in layout.wires:
        draw_wire(axes, layout, wire, colours.get(wire.source, INK))
    for box in boxes:
        filled = colours.get(box.key, INK if box.key == "head" else "white")
        edge = INK if filled == "white" else filled
        draw_box(axes, box.left, box.right, box.y - box.height / 2, box.y + box.height / 2, filled, edge)
        margin = margin_text(margins, box.key)
        weight = "normal" if box.key in labels else "bold"
        height = box.y + (0.09 if margin else 0.0)
        write(axes, box.x, height, labels.get(box.key, box.key), NAME, readable_on(filled), weight=weight)
        write(axes, box.x, box.y - 0.12, margin, SMALL, GREY)
    if note:
        write(axes, 0.0, bottom + PAD + 0.06, note, SMALL, GREY, ha="left")
    return figure


def _width(margins: dict[str, float], key: str) -> float:
    return text_width(margin_text(margins, key), SMALL)

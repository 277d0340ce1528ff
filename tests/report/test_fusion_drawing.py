import xml.etree.ElementTree as ElementTree
from itertools import combinations

import matplotlib.pyplot
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from mmnas_lab.report.fusion_drawing import OP_NAMES, draw_fusion, fusion_figure


def step(first, second, op):
    return {"inputs": [first, second], "op": op}


def genotype(*cells, head_cells=None):
    cells = [{"inputs": list(inputs), "steps": list(steps)} for inputs, *steps in cells]
    return {"space": "fusion", "schema": 1, "cells": cells, "head_cells": head_cells or len(cells)}


def margins_of(genotype):
    """A different margin for each choice, but a tie for the operation of each first step."""
    margins, count = {}, 0
    for i, cell in enumerate(genotype["cells"]):
        keys = [f"cell.{i}.inputs"]
        for m in range(len(cell["steps"])):
            keys += [f"cell.{i}.step.{m}.inputs", f"cell.{i}.step.{m}.op"]
        for key in keys:
            count += 1
            margins[key] = 0.0 if key.endswith("step.0.op") else 0.02 + count / 1000
    return margins


GENOTYPES = {
    "one cell, one step": genotype((("text.1", "image.3"), step(0, 1, "sum"))),
    "two cells, one step": genotype(
        (("text.1", "image.3"), step(0, 1, "linear_glu")),
        (("image.1", "text.1"), step(1, 0, "attention")),
    ),
    "a cell takes a cell": genotype(
        (("text.0", "image.2"), step(0, 1, "concat_fc")),
        (("cell.0", "text.0"), step(0, 1, "linear_glu")),
    ),
    "two cells, two steps": genotype(
        (("text.1", "image.3"), step(0, 1, "sum"), step(2, 0, "attention")),
        (("image.1", "cell.0"), step(1, 0, "linear_glu"), step(2, 1, "zero")),
    ),
    "two cells, three steps": genotype(
        (("text.1", "image.3"), step(0, 1, "sum"), step(2, 0, "attention"), step(3, 1, "concat_fc")),
        (("image.1", "text.0"), step(1, 0, "linear_glu"), step(2, 1, "zero"), step(2, 3, "linear_glu")),
    ),
    "one modality": genotype(
        (("image.1", "image.3"), step(0, 1, "sum"), step(0, 1, "attention")),
        (("image.2", "image.2"), step(0, 0, "linear_glu"), step(0, 2, "sum")),
    ),
    "a head of some cells": genotype(
        (("rgb.1", "depth.3"), step(0, 1, "sum")),
        (("skeleton.0", "eeg.2"), step(0, 1, "linear_glu")),
        (("cell.0", "cell.1"), step(0, 1, "concat_fc")),
        (("cell.0", "rgb.10"), step(1, 0, "attention")),
        head_cells=2,
    ),
}
every_genotype = pytest.mark.parametrize("name", GENOTYPES)


def texts(figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


@every_genotype
@pytest.mark.parametrize("with_margins", [True, False])
def test_no_label_is_clipped_or_overlaps_another(name, with_margins):
    margins = margins_of(GENOTYPES[name]) if with_margins else {}
    figure = fusion_figure(GENOTYPES[name], margins)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
    width, height = figure.bbox.width, figure.bbox.height
    for label, box in boxes:
        assert box.x0 >= 0, label
        assert box.y0 >= 0, label
        assert box.x1 <= width, label
        assert box.y1 <= height, label
    for (label, box), (other, other_box) in combinations(boxes, 2):
        assert not box.overlaps(other_box), (label, other)


@every_genotype
def test_no_label_crosses_the_outline_of_a_box(name):
    figure = fusion_figure(GENOTYPES[name], margins_of(GENOTYPES[name]))
    renderer = FigureCanvasAgg(figure).get_renderer()
    outlines = [patch for patch in figure.axes[0].patches if hasattr(patch, "get_boxstyle")]
    assert outlines
    for text in texts(figure):
        box = text.get_window_extent(renderer)
        for outline in (patch.get_window_extent(renderer) for patch in outlines):
            inside = outline.contains(box.x0, box.y0) and outline.contains(box.x1, box.y1)
            assert inside or not outline.overlaps(box), text.get_text()


@every_genotype
def test_no_wire_runs_through_a_label_or_a_step(name):
    figure = fusion_figure(GENOTYPES[name], margins_of(GENOTYPES[name]))
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    wires = [patch for patch in axes.patches if hasattr(patch, "get_arrowstyle")]
    small = [box for box in axes.patches if hasattr(box, "get_boxstyle") and box.get_height() < 0.8]
    forbidden = [text.get_window_extent(renderer) for text in texts(figure)]
    forbidden += [box.get_window_extent(renderer).padded(-2) for box in small]
    assert wires
    for wire in wires:
        path = axes.transData.transform_path(wire._path_original)
        for box in forbidden:
            assert not path.intersects_bbox(box, filled=False)


@every_genotype
def test_svg_names_every_feature_op_and_margin(name, tmp_path):
    margins = margins_of(GENOTYPES[name])
    draw_fusion(GENOTYPES[name], margins, tmp_path / "genotype.svg")
    root = ElementTree.parse(tmp_path / "genotype.svg").getroot()
    written = [text for element in root.iter() if (text := (element.text or "").strip())]
    for i, cell in enumerate(GENOTYPES[name]["cells"]):
        assert f"Cell {i}" in written
        assert {feature for feature in cell["inputs"] if not feature.startswith("cell.")} <= set(written)
        assert {OP_NAMES[step["op"]] for step in cell["steps"]} <= set(written)
    for margin in margins.values():
        assert (f"+{margin:.3f}" if margin else "tie") in written
    assert "head" in written


def test_files_are_the_same_bytes_each_time(tmp_path):
    example = GENOTYPES["two cells, three steps"]
    for suffix in ("svg", "png"):
        for name in ("a", "b"):
            draw_fusion(example, margins_of(example), tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert matplotlib.pyplot.get_fignums() == []


def test_png_has_200_dots_per_inch(tmp_path):
    draw_fusion(GENOTYPES["one cell, one step"], {}, tmp_path / "genotype.png")
    assert Image.open(tmp_path / "genotype.png").info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_a_margin_too_small_for_three_decimals_is_not_shown_as_zero():
    example = GENOTYPES["one cell, one step"]
    figure = fusion_figure(example, {"cell.0.inputs": 0.00012, "cell.0.step.0.op": -0.25})
    assert {"+1e-4", "-0.250"} <= {text.get_text() for text in texts(figure)}


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"writes \.svg or \.png, got 'genotype\.pdf'"):
        draw_fusion(GENOTYPES["one cell, one step"], {}, tmp_path / "genotype.pdf")
    with pytest.raises(ValueError, match="space 'fusion', got 'mixers'"):
        draw_fusion({"space": "mixers", "cells": []}, {}, tmp_path / "genotype.svg")

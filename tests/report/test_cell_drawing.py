"""Drawings of cells: nothing overlaps, nothing is cut off, and all that was found is named."""

from itertools import combinations
from xml.etree import ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mmnas_lab.report.cell_drawing import cells_figure, draw_cells
from mmnas_lab.search_space.cnn_cells.genotype import bench_201_genotype
from mmnas_lab.search_space.cnn_cells.published import PUBLISHED, published

GENOTYPES = {name: published(name).to_json() for name in PUBLISHED} | {
    "nas_bench_201": bench_201_genotype(
        "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|"
    ).to_json(),
    "nas_bench_201, nothing": bench_201_genotype("|none~0|+|none~0|none~1|+|none~0|none~1|none~2|").to_json(),
}
every_genotype = pytest.mark.parametrize("name", GENOTYPES)


def margins_of(genotype):
    """A margin for each choice, all different but every fourth a tie."""
    names = []
    for cell in genotype["cells"]:
        for state, node in enumerate(cell["nodes"], 1 if cell["kind"] == "cell" else 2):
            names.append(f"{cell['kind']}.node.{state}.edges")
            names += [f"{cell['kind']}.node.{state}.edge.{edge['input']}.op" for edge in node]
    return {name: 0.0 if i % 4 == 3 else 0.01 * (i + 1) for i, name in enumerate(names)}


def texts(figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


@every_genotype
@pytest.mark.parametrize("with_margins", [True, False])
def test_no_label_is_clipped_or_overlaps_another(name, with_margins):
    figure = cells_figure(GENOTYPES[name], margins_of(GENOTYPES[name]) if with_margins else {})
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
    for label, box in boxes:
        assert box.x0 >= 0, label
        assert box.y0 >= 0, label
        assert box.x1 <= figure.bbox.width, label
        assert box.y1 <= figure.bbox.height, label
    for (label, box), (other, other_box) in combinations(boxes, 2):
        assert not box.overlaps(other_box), (label, other)


@every_genotype
def test_no_label_crosses_the_outline_of_a_box(name):
    figure = cells_figure(GENOTYPES[name], margins_of(GENOTYPES[name]))
    renderer = FigureCanvasAgg(figure).get_renderer()
    outlines = [patch for patch in figure.axes[0].patches if hasattr(patch, "get_boxstyle")]
    assert outlines
    for text in texts(figure):
        box = text.get_window_extent(renderer)
        for outline in (patch.get_window_extent(renderer) for patch in outlines):
            inside = outline.contains(box.x0, box.y0) and outline.contains(box.x1, box.y1)
            assert inside or not outline.overlaps(box), text.get_text()


@every_genotype
def test_no_wire_runs_through_a_label_or_a_node(name):
    figure = cells_figure(GENOTYPES[name], margins_of(GENOTYPES[name]))
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[0]
    frame = max(box.get_width() for box in axes.patches if hasattr(box, "get_boxstyle"))
    boxes = [box for box in axes.patches if hasattr(box, "get_boxstyle") and box.get_width() < frame]
    wires = [patch for patch in axes.patches if hasattr(patch, "get_arrowstyle")]
    forbidden = [text.get_window_extent(renderer) for text in texts(figure)]
    forbidden += [box.get_window_extent(renderer).padded(-2) for box in boxes]
    assert wires or "nothing" in name
    for wire in wires:
        path = axes.transData.transform_path(wire._path_original)
        for box in forbidden:
            assert not path.intersects_bbox(box, filled=False)


def test_svg_names_nodes_operations_and_margins(tmp_path):
    genotype = GENOTYPES["DARTS_V2"]
    margins = margins_of(genotype)
    draw_cells(genotype, margins, tmp_path / "genotype.svg")
    root = ElementTree.parse(tmp_path / "genotype.svg").getroot()
    written = [text for element in root.iter() if (text := (element.text or "").strip())]
    assert {"Normal cell", "Reduction cell", "node 2", "node 5", "cell k - 2", "out"} <= set(written)
    assert written.count("sep conv 3\u00d73") == 5
    assert written.count("skip") == 2 + 3
    for margin in margins.values():
        assert (f"+{margin:.3f}" if margin else "tie") in written


def test_absent_nodes_and_edges_from_them_are_left_out():
    written = [text.get_text() for text in texts(cells_figure(GENOTYPES["FairDARTS_c"], {}))]
    assert written.count("node 3") == 1  # in the reduction cell alone
    assert written.count("skip") == 1  # the normal cell's skip leaves the absent node


def test_files_are_the_same_bytes_each_time(tmp_path):
    genotype = GENOTYPES["PDARTS"]
    for suffix in ("svg", "png"):
        for name in ("a", "b"):
            draw_cells(genotype, margins_of(genotype), tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"draw_cells writes \.svg or \.png, got 'genotype\.pdf'"):
        draw_cells(GENOTYPES["DARTS_V1"], {}, tmp_path / "genotype.pdf")
    with pytest.raises(ValueError, match="space 'cnn_cells', got 'fusion'"):
        draw_cells({"space": "fusion", "cells": []}, {}, tmp_path / "genotype.svg")

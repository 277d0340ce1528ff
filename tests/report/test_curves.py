import csv
import json
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from mmnas_lab.report.curves import (
    INK,
    LONGEST_LABEL,
    NAMED_WEIGHTS,
    PALE,
    RANDOM,
    _read_metrics,
    _smoothed,
    curves_figure,
    draw_curves,
)

BASELINES = ["text", "image", "two_stream", "late_fusion"]
RUNS = ["found", *BASELINES, *(f"random_{i}" for i in range(5))]
MONITORS = ["alignment", "uniformity", "embedding_std"]
SCORES = ["f1_weighted", "f1_micro", "f1_macro", "f1_samples"]
SSL = {
    "search": ["weight_loss", "eval_loss", *(f"eval_{name}" for name in MONITORS), "arch_loss"],
    "pretrain": ["loss", "val_loss", *(f"val_{name}" for name in MONITORS)],
    "train": ["loss", "val_loss", *(f"val_{name}" for name in SCORES)],
}
SUPERVISED = {
    "search": ["weight_loss", "arch_loss", "eval_loss", *(f"eval_{name}" for name in SCORES)],
    "train": SSL["train"],
}
FEATURES = [f"{modality}.{level}" for modality in ("image", "text") for level in range(5)]
OPS = ["sum", "attention", "linear_glu", "concat_fc"]
NAMES = {
    "alpha": [f"cell.{i} {op}: {name}" for i in range(2) for name in FEATURES for op in ("none", "skip")],
    "beta": [
        f"cell.1 step 0 {op}: {name}" for name in ("image.4", "text.4", "cell.0") for op in ("none", "skip")
    ],
    "gamma": [f"cell.{i} step 0: {op}" for i in range(2) for op in OPS],
}
WEIGHTS = [
    "Search: alpha (inputs of cells)",
    "Search: beta (inputs of steps)",
    "Search: gamma (operations of steps)",
]
COLLAPSE = ["Collapse: embedding std", "Collapse: alignment", "Collapse: uniformity"]
TRAINING = ["Training: loss", "Training: validation loss", "Training: validation f1 weighted"]


def metric_rows(names, steps, runs=RUNS):
    return [
        (stage, run, 700 * step, step, f"{stage}/{name}", 1 / (step + 1) + number / 100)
        for stage in names
        for number, run in enumerate(["found"] if stage == "search" else runs)
        for name in names[stage]
        for step in range(steps)
    ]


def write_metrics(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("stage", "run", "step", "epoch", "name", "value"), *rows])
    return path


def trace(records, names=NAMES):
    """Weights that grow apart; the last two of each array coincide."""

    def weight(place, count, step):
        return 0.5 + step * min(place, count - 2) / 100

    mixing = [
        {name: [weight(i, len(labels), step) for i in range(len(labels))] for name, labels in names.items()}
        for step in range(records)
    ]
    return {"names": names, "records": [{"step": 500 * i, "mixing": m} for i, m in enumerate(mixing)]}


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def panel(figure, title):
    return figure.axes[titles(figure).index(title)]


def labels(axes):
    return [text.get_text() for text in axes.texts]


def visible_texts(figure):
    """Every text that is drawn: titles, scales, labels of lines, of ticks in view, and of the legend."""
    found = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_text()]


def check_texts(figure):
    """No text overlaps another or a plot, or leaves the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [(text, text.get_window_extent(canvas.get_renderer())) for text in visible_texts(figure)]
    for text, box in boxes:
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert inside, text.get_text()
        assert not any(axes.bbox.overlaps(box) for axes in figure.axes), text.get_text()
    for (text, box), (other, other_box) in combinations(boxes, 2):
        assert not box.overlaps(other_box), (text.get_text(), other.get_text())


@pytest.fixture
def metrics(tmp_path):
    return _read_metrics(write_metrics(tmp_path / "metrics.csv", metric_rows(SSL, 4)))


def test_every_kind_of_data_has_its_panel(metrics):
    pretraining = "Pretraining: loss (dashed: validation)"
    assert titles(curves_figure(metrics, trace(3))) == [
        "Search: losses",
        *COLLAPSE,
        *WEIGHTS,
        pretraining,
        *TRAINING,
    ]


def test_a_supervised_search_has_a_metric_and_no_monitors(tmp_path):
    metrics = _read_metrics(write_metrics(tmp_path / "metrics.csv", metric_rows(SUPERVISED, 4)))
    search = ["Search: losses", "Search: validation f1 weighted"]
    assert titles(curves_figure(metrics, trace(3))) == [*search, *WEIGHTS, *TRAINING]


def test_of_the_metrics_only_that_of_the_selection_is_shown(tmp_path):
    rows = metric_rows({"train": ["val_f1_macro", "val_f1_weighted", "val_accuracy"]}, 2)
    metrics = _read_metrics(write_metrics(tmp_path / "metrics.csv", rows))
    assert titles(curves_figure(metrics, {})) == ["Training: validation accuracy"]


def test_panels_without_data_are_left_out(metrics):
    training = {key: series for key, series in metrics.items() if key[0] == "train/loss"}
    assert titles(curves_figure(training, {})) == ["Training: loss"]
    searching = {key: series for key, series in metrics.items() if key[0].startswith("search/")}
    figure = curves_figure(searching, trace(1))
    assert titles(figure) == ["Search: losses", *COLLAPSE, *WEIGHTS]
    assert not figure.legends
    assert titles(curves_figure({}, trace(1))) == WEIGHTS


def test_nothing_to_draw_is_refused():
    for empty in ({}, {"names": {}, "records": []}):
        with pytest.raises(ValueError, match="a metric or a trace, got neither"):
            curves_figure({}, empty)


def test_one_legend_names_found_network_baselines_and_random_genotypes(metrics):
    figure = curves_figure(metrics, {})
    (legend,) = figure.legends
    entries = [text.get_text() for text in legend.get_texts()]
    assert entries == ["found network", "text", "image", "two stream", "late fusion", "random genotypes"]
    colours = [line.get_color() for line in legend.get_lines()]
    assert colours[0] == INK
    assert colours[-1] == PALE
    assert len(set(colours)) == len(colours)
    assert not panel(figure, "Training: loss").texts


def test_the_found_network_is_bold_and_random_genotypes_are_thin(metrics):
    lines = panel(curves_figure(metrics, {}), "Training: loss").lines
    assert len(lines) == len(RUNS)
    random = len([run for run in RUNS if run.startswith(RANDOM)])
    widths = [line.get_linewidth() for line in lines]
    assert {line.get_color() for line in lines[:random]} == {PALE}
    assert max(widths[:random]) < min(widths[random:])
    assert widths[-1] > max(widths[:-1])
    assert lines[-1].get_color() == INK
    assert lines[-1].get_ydata()[0] == 1.0


def test_validation_is_dashed_in_the_colour_of_its_run(metrics):
    lines = panel(curves_figure(metrics, {}), "Pretraining: loss (dashed: validation)").lines
    solid = [line.get_color() for line in lines if line.get_linestyle() == "-"]
    dashed = [line.get_color() for line in lines if line.get_linestyle() != "-"]
    assert len(solid) == len(RUNS)
    assert solid == dashed


def test_collapse_monitors_are_of_the_found_network_and_show_their_scale(metrics):
    figure = curves_figure(metrics, {})
    for title, low, high in zip(COLLAPSE, (0, 0, -4), (1, 2, 0), strict=True):
        axes = panel(figure, title)
        assert labels(axes) == ["search", "pretraining"]
        assert len(axes.lines) == 2
        assert axes.get_ylabel().startswith("0 ")
        assert axes.get_ylim()[0] <= low
        assert axes.get_ylim()[1] >= high


def test_the_largest_final_weights_are_named_and_none_is_left_out():
    axes = panel(curves_figure({}, trace(3)), WEIGHTS[0])
    skips = [name for name in NAMES["alpha"] if " skip:" in name]
    assert len(axes.lines) == len(skips)
    assert set(labels(axes)) == set(skips[-NAMED_WEIGHTS:])


def test_of_weights_that_coincide_both_are_seen():
    lines = panel(curves_figure({}, trace(3)), WEIGHTS[2]).lines
    assert [line.get_linestyle() for line in lines[-NAMED_WEIGHTS:]] == ["-", "--", "-", "-"]


def test_weights_without_names_are_numbered():
    figure = curves_figure({}, {"records": [{"step": 0, "mixing": {"reduce": [[0.25, 0.75]]}}]})
    assert titles(figure) == ["Search: reduce"]
    assert labels(figure.axes[0]) == ["reduce 0", "reduce 1"]


@pytest.mark.parametrize("steps", [1, 2, 40])
@pytest.mark.parametrize("names", [SSL, SUPERVISED], ids=["ssl", "supervised"])
def test_texts_stay_in_the_figure_and_apart(tmp_path, names, steps):
    metrics = _read_metrics(write_metrics(tmp_path / "metrics.csv", metric_rows(names, steps)))
    check_texts(curves_figure(metrics, trace(steps)))


@pytest.mark.parametrize("stage", ["search", "pretrain", "train"])
def test_texts_of_one_stage_alone_stay_in_the_figure_and_apart(tmp_path, stage):
    metrics = _read_metrics(write_metrics(tmp_path / "metrics.csv", metric_rows({stage: SSL[stage]}, 4)))
    check_texts(curves_figure(metrics, {}))


def test_many_baselines_and_very_long_names_stay_in_the_figure_and_apart(tmp_path):
    runs = ["found", *(f"a_baseline_of_{'long_' * i}name_{i}" for i in range(12))]
    metrics = _read_metrics(write_metrics(tmp_path / "metrics.csv", metric_rows(SSL, 4, runs)))
    names = {name: [f"{label} {'and more ' * 9}{label}" for label in NAMES[name]] for name in NAMES}
    figure = curves_figure(metrics, trace(4, names))
    check_texts(figure)
    assert max(len(label) for axes in figure.axes for label in labels(axes)) == LONGEST_LABEL


@pytest.mark.parametrize("steps", [1, 4])
def test_draws_a_file(tmp_path, steps):
    write_metrics(tmp_path / "metrics.csv", metric_rows(SSL, steps))
    (tmp_path / "trace.json").write_text(json.dumps(trace(steps)))
    draw_curves(tmp_path / "metrics.csv", tmp_path / "trace.json", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_absent_files_and_values_that_are_not_finite_are_left_out(tmp_path):
    rows = [
        ("train", "found", step, 0, "train/loss", value) for step, value in [(2, 0.5), (1, "nan"), (0, 0.75)]
    ]
    rows.append(("train", "text", 0, 0, "train/loss", "inf"))
    write_metrics(tmp_path / "metrics.csv", rows)
    assert _read_metrics(tmp_path / "metrics.csv") == {("train/loss", "found"): ([0.0, 2.0], [0.75, 0.5])}
    draw_curves(tmp_path / "metrics.csv", tmp_path / "absent.json", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_long_series_are_smoothed_by_a_centred_mean():
    values = [float(i % 7) for i in range(250)]
    expected = [sum(near) / len(near) for i in range(250) if (near := values[max(0, i - 2) : i + 3])]
    assert _smoothed(values) == pytest.approx(expected)
    assert _smoothed(values[:99]) == values[:99]

import csv
import json
from itertools import combinations

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from mmnas_lab.report.curves import (
    NAMED_WEIGHTS,
    STYLE,
    _read_metrics,
    _smoothed,
    curves_figure,
    draw_curves,
)

RUNS = ["found", "text", "image", "late_fusion"]
NAMES = {
    "alpha": [
        f"cell.{i} {port}: {name}" for i in range(2) for port in "xy" for name in ("image.0", "text.1")
    ],
    "beta": ["cell.0 step.0: x", "cell.0 step.0: y"],
    "gamma": ["Zero", "Sum", "Attention"],
}


def metric_rows(steps):
    names = {
        "search": ["weight_loss", "arch_loss", "eval_loss"],
        "pretrain": ["loss", "val_loss", "alignment", "uniformity", "embedding_std"],
        "train": ["loss", "val_f1_weighted"],
    }
    return [
        (stage, run, step, step // 2, f"{stage}/{name}", 1 / (step + 1) + number)
        for stage in names
        for number, run in enumerate(RUNS if stage == "train" else ["found"])
        for name in names[stage]
        for step in range(steps)
    ]


def write_metrics(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("stage", "run", "step", "epoch", "name", "value"), *rows])
    return path


def trace(records):
    mixing = {name: [i / 10 for i in range(len(labels))] for name, labels in NAMES.items()}
    return {"names": NAMES, "records": [{"step": 5 * i, "mixing": mixing} for i in range(records)]}


def titles(figure):
    return [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]


@pytest.fixture
def metrics(tmp_path):
    return _read_metrics(write_metrics(tmp_path / "metrics.csv", metric_rows(4)))


def test_every_kind_of_data_has_its_panel(metrics):
    assert titles(curves_figure(metrics, trace(3))) == [
        "Search: losses",
        "Search: alpha (inputs of cells)",
        "Search: beta (inputs of steps)",
        "Search: gamma (operations of steps)",
        "Pretraining: losses",
        "Pretraining: alignment",
        "Pretraining: uniformity",
        "Pretraining: embedding std",
        "Training: loss",
        "Training: validation f1 weighted",
    ]


def test_panels_without_data_are_left_out(metrics):
    training = {key: series for key, series in metrics.items() if key[0] == "train/loss"}
    assert titles(curves_figure(training, {})) == ["Training: loss"]
    assert titles(curves_figure({}, {"names": {}, "records": []} | trace(1)))[0].startswith("Search: alpha")
    with pytest.raises(ValueError, match="a metric or a trace, got neither"):
        curves_figure({}, {})


def test_the_found_network_is_bold_and_baselines_are_thin(metrics):
    axes = curves_figure(metrics, {}).axes[-1]
    widths = [line.get_linewidth() for line in axes.lines]
    assert len(widths) == len(RUNS)
    assert widths[-1] > max(widths[:-1])
    assert axes.lines[-1].get_ydata()[0] == 1.0
    assert sorted(text.get_text() for text in axes.texts) == sorted(RUNS)
    assert [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"] == ["found"]


def test_the_largest_final_weights_are_named(metrics):
    axes = curves_figure({}, trace(3)).axes[0]
    assert len(axes.lines) == len(NAMES["alpha"])
    assert {text.get_text() for text in axes.texts} == set(NAMES["alpha"][-NAMED_WEIGHTS:])


def test_weights_without_names_are_numbered():
    figure = curves_figure({}, {"records": [{"step": 0, "mixing": {"reduce": [[0.25, 0.75]]}}]})
    assert titles(figure) == ["Search: reduce"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["reduce 0", "reduce 1"]


@pytest.mark.parametrize("steps", [1, 4])
def test_labels_stay_in_the_figure_and_apart(tmp_path, steps):
    rows = metric_rows(steps)
    rows += [("train", f"baseline {i}", 0, 0, "train/loss", 1.0) for i in range(6)]  # all end at one height
    with rc_context(STYLE):
        figure = curves_figure(_read_metrics(write_metrics(tmp_path / "metrics.csv", rows)), trace(steps))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
        assert all(box.y0 >= 0 and box.y1 <= figure.bbox.height for box in boxes)
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


@pytest.mark.parametrize("steps", [1, 4])
def test_draws_a_file(tmp_path, steps):
    write_metrics(tmp_path / "metrics.csv", metric_rows(steps))
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

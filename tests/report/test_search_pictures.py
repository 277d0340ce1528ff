import json

import numpy as np
from PIL import Image

from mmnas_lab.report.edge_weights import draw_edge_weights, edge_series
from mmnas_lab.report.reconstructions import draw_reconstructions, picture_names

TRACE = {
    "names": {
        "alpha_normal": [f"normal 0->2: {op}" for op in ("none", "skip_connect", "sep_conv_3x3")],
        "beta_normal": ["normal 0->2"],
    },
    "records": [
        {"epoch": epoch, "mixing": {"alpha_normal": [0.2, 0.3 + epoch / 10, 0.1], "beta_normal": [1.0]}}
        for epoch in range(3)
    ],
}


def test_series_hold_the_weights_of_an_edge_by_operation():
    series = edge_series(TRACE)
    assert list(series) == ["normal 0->2"]
    assert series["normal 0->2"]["skip_connect"] == [0.3, 0.4, 0.5]
    assert "gamma" not in edge_series({"names": {"gamma": ["cell.0 step 0: sum"]}, "records": []})


def test_edges_are_drawn_and_traces_without_them_are_not(tmp_path):
    (tmp_path / "trace.json").write_text(json.dumps(TRACE))
    assert draw_edge_weights(tmp_path / "trace.json", tmp_path / "edges.png")
    assert Image.open(tmp_path / "edges.png").convert("L").getextrema()[0] < 100
    (tmp_path / "other.json").write_text(json.dumps({}))
    assert not draw_edge_weights(tmp_path / "other.json", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_reconstructions_stand_in_their_columns(tmp_path):
    colours = {"input": 1.0, "masked": 0.0, "output": 0.5}
    snapshots = {
        f"{epoch}/image/{kind}": np.full((2, 3, 8, 8), (value - 0.5) / 0.25, np.float32)
        for epoch in (1, 3)
        for kind, value in colours.items()
    }
    snapshots |= {"1/text/input": np.zeros((2, 5, 4)), "3/text/input": np.zeros((2, 5, 4))}
    assert picture_names(snapshots) == ["image"]
    draw_reconstructions(
        snapshots, "image", np.full(3, 0.5), np.full(3, 0.25), tmp_path / "reconstructions.png"
    )
    picture = np.asarray(Image.open(tmp_path / "reconstructions.png").convert("L")) / 255
    row = picture[picture.shape[0] - 60]
    middles = [row[round((k + 0.5) * len(row) / 4)] for k in range(4)]
    assert np.allclose(middles, [1.0, 0.0, 0.5, 0.5], atol=0.01)


def test_there_is_no_picture_without_pictures():
    assert picture_names({"0/text.1/input": np.zeros((2, 5, 4))}) == []
    assert picture_names({}) == []

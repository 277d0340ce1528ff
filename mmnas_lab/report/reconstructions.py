"""What a masked reconstruction made of a few pictures, over the epochs of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mmnas_lab.report.curves import GREY, STYLE

CELL, GAP, TITLE = 0.8, 0.06, 0.28
"""Inches: side of a picture, space between two, height of the titles."""

Arrays = dict[str, NDArray[Any]]


def picture_names(snapshots: Arrays) -> list[str]:
    """Inputs among the snapshots that can be shown: pictures of one or three channels."""
    names = {name.split("/")[1] for name in snapshots if name.count("/") == 2 and name.endswith("/input")}
    epochs = _epochs(snapshots)
    return sorted(
        name
        for name in names
        if epochs
        and (shape := snapshots[f"{epochs[0]}/{name}/input"].shape)[1:2] in ((1,), (3,))
        and len(shape) == 4
    )


def draw_reconstructions(snapshots: Arrays, name: str, mean: Any, std: Any, path: Path) -> None:
    """Write one picture: a row a sample, with the input, what the network saw, and its output by epoch.

    Args:
        snapshots: `<epoch>/<name>/<input | masked | output>` (B, C, H, W), standardised.
        name: of the input that is shown.
        mean: (C,) of the values in [0, 1].
        std: (C,) of these.
        path: any format that matplotlib writes by its suffix.
    """
    epochs = _epochs(snapshots)
    first = epochs[0]
    columns = [("input", snapshots[f"{first}/{name}/input"]), ("masked", snapshots[f"{first}/{name}/masked"])]
    columns += [(f"epoch {epoch}", snapshots[f"{epoch}/{name}/output"]) for epoch in epochs]
    rows = len(columns[0][1])
    width, height = len(columns) * (CELL + GAP) + GAP, rows * (CELL + GAP) + GAP + TITLE
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        for k, (title, pictures) in enumerate(columns):
            for row, picture in enumerate(pictures):
                left, top = GAP + k * (CELL + GAP), height - TITLE - row * (CELL + GAP)
                place = (left / width, (top - CELL) / height, CELL / width, CELL / height)
                axes = figure.add_axes(place)
                axes.imshow(_shown(picture, mean, std), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.axis("off")
                if row == 0:
                    axes.set_title(title, fontsize=8, fontweight="normal", loc="center", color=GREY, pad=3)
        figure.savefig(path, dpi=150)


def _shown(picture: NDArray[Any], mean: Any, std: Any) -> NDArray[Any]:
    """(H, W, 3) or (H, W) in [0, 1]."""
    values = picture * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
    return np.clip(values, 0, 1).transpose(1, 2, 0).squeeze()


def _epochs(snapshots: Arrays) -> list[int]:
    return sorted({int(name.split("/")[0]) for name in snapshots})

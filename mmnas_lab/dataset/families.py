"""The family of views of each kind of modality."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from mmnas_lab.dataset.views import ImageViews, TextViews, ViewFamily
from mmnas_lab.types import InputError

SIGNALS = {
    "audio": "AudioViews",
    "series": "SeriesViews",
    "skeleton": "SkeletonViews",
    "tabular": "TabularViews",
    "video": "VideoViews",
}
"""Kinds whose samples are arrays, and their families in `dataset.signal_views`."""

KINDS = ("image", "text", *SIGNALS)


def view_families(
    kinds: Iterable[str], image: float = 1.0, text: float = 1.0, signal: float = 1.0
) -> dict[str, ViewFamily]:
    """Views of raw samples by kind.

    Args:
        kinds: of the dataset's modalities.
        image: strength of views of pictures.
        text: strength of views of texts.
        signal: strength of views of arrays.

    Raises:
        InputError: a kind that there is no family of.
    """
    families: dict[str, ViewFamily] = {}
    for kind in dict.fromkeys(kinds):
        if kind == "image":
            families[kind] = ImageViews(image)
        elif kind == "text":
            families[kind] = TextViews(text)
        elif kind in SIGNALS:
            module = importlib.import_module("mmnas_lab.dataset.signal_views")
            families[kind] = getattr(module, SIGNALS[kind])(signal)
        else:
            raise InputError(f"no family of views for kind '{kind}'; the kinds are {', '.join(KINDS)}")
    return families

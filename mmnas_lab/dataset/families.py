"""The family of views of each modality, by its kind."""

from __future__ import annotations

from collections.abc import Callable

from mmnas_lab.dataset.base import LabelFree, training_samples
from mmnas_lab.dataset.signal_views import (
    AudioViews,
    SeriesViews,
    SkeletonViews,
    TabularViews,
    VideoViews,
)
from mmnas_lab.dataset.views import ImageViews, TextViews, ViewFamily
from mmnas_lab.types import InputError

SIGNALS: dict[str, Callable[[float], ViewFamily]] = {
    "audio": AudioViews,
    "series": SeriesViews,
    "skeleton": SkeletonViews,
    "tabular": TabularViews,
    "video": VideoViews,
}
"""Kinds whose samples are arrays, and their families in `dataset.signal_views`."""

KINDS = ("image", "text", *SIGNALS)


def view_families(
    dataset: LabelFree, image: float = 1.0, text: float = 1.0, signal: float = 1.0
) -> dict[str, ViewFamily]:
    """Views of raw samples by modality, each by its kind.

    A family with a method `fit` (features replaced by those of other samples) is given the training samples.

    Args:
        dataset: an opened dataset.
        image: strength of views of pictures.
        text: strength of views of texts.
        signal: strength of views of arrays.

    Raises:
        InputError: a kind that there is no family of.
    """
    families: dict[str, ViewFamily] = {}
    for name, kind in dataset.modalities.items():
        if kind == "image":
            families[name] = ImageViews(image)
        elif kind == "text":
            families[name] = TextViews(text)
        elif kind in SIGNALS:
            family = SIGNALS[kind](signal)
            fit = getattr(family, "fit", None)
            if fit is not None:
                fit(training_samples(dataset, name))
            families[name] = family
        else:
            raise InputError(
                f"no family of views for kind '{kind}' of modality '{name}'; the kinds are {', '.join(KINDS)}"
            )
    return families

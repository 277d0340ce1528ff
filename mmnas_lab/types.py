"""The few types that every room shares.

One letter per dimension: B batch, C channels, L length (positions), D embedding, Y classes, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Inputs = dict[str, "Tensor"]
"""What a network reads, by name: `"image.2"` (B, C_i, L_i) pooled features, `"image"` (B, 3, H, W) pixels."""

Split = Literal["train", "val", "test"]
Task = Literal["multilabel", "multiclass"]


class InputError(Exception):
    """Bad input or configuration; the message names the thing and the remedy. Exit code 2."""


class TrainingError(Exception):
    """A computation that went wrong on good input (a NaN loss, say). Exit code 1."""


@dataclass(frozen=True)
class InputInfo:
    """What is known of one named input before any data is read.

    Attributes:
        shape: shape of one sample, without the batch dimension; `(C_i, L_i)` for pooled features.
        modality: name of the modality that it comes from, as in `dataset.modalities`.
        kind: of a raw modality: image, text, audio, series, skeleton, tabular or video; "" for features.
    """

    shape: tuple[int, ...]
    modality: str
    kind: str = ""


InputInfos = dict[str, InputInfo]


class Batch(NamedTuple):
    """One step's data.

    Attributes:
        views: one or two differently drawn views of the same B samples.
        labels: (B, Y) float multi-hot or (B,) long class indices; None where labels are hidden.
    """

    views: tuple[Inputs, ...]
    labels: Tensor | None = None


class Output(NamedTuple):
    """What a network gives: `embedding` (B, D), and named intermediate tensors."""

    embedding: Tensor
    taps: dict[str, Tensor]


@dataclass(frozen=True)
class OutputInfo:
    """Shapes of an `Output` without the batch dimension, known when the network is built."""

    embedding: int
    taps: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Losses(NamedTuple):
    """The value to minimise, a () tensor, and detached quantities worth logging beside it."""

    total: Tensor
    parts: dict[str, Tensor]


Settings = dict[str, Any]
"""Plain values (numbers, strings, lists, dicts) that a stage's result depends on."""

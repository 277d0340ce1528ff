"""What an encoder is, and how one input of any kind becomes tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmnas_lab.types import InputError

Protocol = Literal["intended", "released_code"]
MAPS = ("image", "audio", "video")
"""Kinds that are cut into patches; the frames of a video (T, H, W) are its channels."""
SEQUENCES = ("text", "series", "skeleton")
KINDS = (*MAPS, *SEQUENCES, "tabular")
FUSED = "fused"
"""The kind of a fusion network's input: tokens (N, D)."""


class Encoder(nn.Module, ABC):
    """A module from one input to tokens.

    Attributes:
        size: (N, D) of its tokens.
    """

    size: tuple[int, int]

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, *shape) to (B, N, D); input tokens where `mask` (B, N) bool is false reach no other token."""


class ForeignEncoder(Encoder):
    """Any module as an encoder: a vector (B, D) is one token, a map (B, D, H, W) is HW of them.

    A mask changes nothing: masked tokens come as zeros.

    Args:
        module: reads (B, *shape), gives (B, D), (B, N, D) or (B, D, H, W).
        shape: of one sample; the module is run once on zeros, to see how large its output is.
        name: of the module in messages.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], name: str) -> None:
        super().__init__()
        self.module = module
        module.eval()
        try:
            with torch.no_grad():
                output: Any = module(torch.zeros(1, *shape))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise InputError(f"{name} cannot read an input of shape {shape}: {error}") from error
        finally:
            module.train()
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise InputError(f"{name} must give (B, D), (B, N, D) or (B, D, H, W), it gives {got}")
        _, count, width = _tokens(output).shape
        self.size = (count, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return _tokens(self.module(x))


def _tokens(output: Tensor) -> Tensor:
    if output.ndim == 2:
        return output[:, None]
    return output.flatten(2).transpose(1, 2) if output.ndim == 4 else output


class Stem(nn.Module):
    """An input of any kind as tokens: (B, *shape) to (B, N, D).

    Maps (C, H, W) are cut into patches, row by row. Sequences (T, ...) have a token a step, whose values are
    projected where they are not D already. Of a table (F,) each feature is a token, its value times a learned
    vector plus another.

    Args:
        shape: of one sample.
        kind: of the input.
        width: D.
        patch: side of a patch, or height and width; null for inputs that are no maps.

    Raises:
        InputError: a shape that is not the kind's, or patches that do not divide the map.
    """

    def __init__(
        self, shape: tuple[int, ...], kind: str, width: int, patch: int | list[int] | None = None
    ) -> None:
        super().__init__()
        self.layer: nn.Module
        self.is_map = kind in MAPS
        if self.is_map:
            channels, height, side = map_shape(shape, kind)
            if patch is None:
                raise InputError(
                    f"an input of kind {kind} is cut into patches; set search_space.encoders.{kind}."
                    "<candidate>.patch"
                )
            rows, columns = patch if isinstance(patch, list) else (patch, patch)
            if min(rows, columns) < 1 or height % rows or side % columns:
                raise InputError(
                    f"{kind} of {height} x {side} cannot be cut into patches of {rows} x {columns}; set "
                    f"search_space.encoders.{kind}.<candidate>.patch to a divisor of both sides"
                )
            self.count = (height // rows) * (side // columns)
            self.layer = nn.Conv2d(channels, width, (rows, columns), (rows, columns))
        elif kind == "tabular":
            if len(shape) != 1:
                raise InputError(f"an input of kind tabular has shape (F,), got {shape}")
            self.count = shape[0]
            self.layer = FeatureTokens(shape[0], width)
        elif kind in SEQUENCES or kind == FUSED:
            if len(shape) < 2:
                raise InputError(f"an input of kind {kind} has shape (T, ...), got {shape}")
            self.count = shape[0]
            values = torch.Size(shape[1:]).numel()
            self.layer = nn.Identity() if values == width else nn.Linear(values, width)
        else:
            raise InputError(
                f"there are no tokens of kind '{kind}', only of {', '.join((*MAPS, *SEQUENCES, 'tabular'))}; "
                f"name in search_space.encoders.{kind} modules that read it"
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.is_map:
            return self.layer(x).flatten(2).transpose(1, 2)
        return self.layer(x.flatten(2) if x.ndim > 2 else x)


class FeatureTokens(nn.Module):
    """(B, F) to (B, F, D): each value times a vector of its feature, plus another (FT-Transformer)."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(features, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(features, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return x[..., None] * self.weight + self.bias


def map_shape(shape: tuple[int, ...], kind: str) -> tuple[int, int, int]:
    """(C, H, W) of a map. Raises InputError where the input is none."""
    if kind not in MAPS or len(shape) != 3:
        raise InputError(
            f"a map (C, H, W) of kind {' or '.join(MAPS)} is needed, got shape {shape} of kind '{kind}'"
        )
    return shape


def at_least_one(**settings: int) -> None:
    """Refuse sizes below 1. Raises InputError."""
    for name, value in settings.items():
        if value < 1:
            raise InputError(f"an encoder's {name} must be at least 1, got {value}")

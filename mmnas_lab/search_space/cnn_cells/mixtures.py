"""Several weighted sums of the same tensors: on a CPU each tensor is read once, by `mixtures.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mmnas_lab.native import REALS, library, pointer, pointers, threads_for


def mixtures(weights: Tensor, terms: Sequence[Tensor], plus: Tensor | None = None) -> Sequence[Tensor]:
    """The sums of T tensors with weights.

    Args:
        weights: (n, T).
        terms: T tensors (B, C, H, W).
        plus: (B, n C, H, W), or none; its n parts are added to the sums.

    Returns:
        n tensors (B, C, H, W).
    """
    compiled = _compiled_for(weights, [*terms, *([] if plus is None else [plus])])
    if compiled is not None:
        found: tuple[Tensor, ...] = Mixtures.apply(compiled, weights, plus, *terms)
        return found
    last = terms[0].is_contiguous(memory_format=torch.channels_last)  # the order in memory is kept
    rows = torch.stack([term.permute(0, 2, 3, 1) if last else term for term in terms])
    mixed = (weights @ rows.flatten(1)).view(-1, *rows.shape[1:])
    sums = [part.permute(0, 3, 1, 2) if last else part for part in mixed.unbind()]
    if plus is None:
        return sums
    return [part + each for part, each in zip(plus.chunk(len(sums), 1), sums, strict=True)]


def _compiled_for(weights: Tensor, tensors: Sequence[Tensor]) -> ctypes.CDLL | None:
    """The compiled functions, if they can stand for torch's here."""
    if weights.device.type != "cpu" or weights.dtype not in REALS or torch.is_autocast_enabled("cpu"):
        return None
    if any(each.dtype != weights.dtype for each in tensors):
        return None
    if not all(each.is_contiguous(memory_format=torch.channels_last) for each in tensors):
        return None
    return library(Path(__file__).with_name("mixtures.c"), f"-DREAL={REALS[weights.dtype]}")


class Mixtures(Function):
    """As `mixtures`, of tensors whose channels lie last in memory."""

    @staticmethod
    def forward(
        ctx: Any, compiled: ctypes.CDLL, weights: Tensor, plus: Tensor | None, *terms: Tensor
    ) -> tuple[Tensor, ...]:
        factors, channels = weights.contiguous(), terms[0].shape[1]
        out = [torch.empty_like(terms[0]) for _ in range(len(weights))]
        compiled.forward(
            *(c_int64(terms[0].numel() // channels), c_int64(channels), len(out), len(terms)),
            *(pointers(terms), pointer(factors), pointer(plus), pointers(out), threads_for(terms[0])),
        )
        ctx.save_for_backward(weights, *(terms if ctx.needs_input_grad[1] else ()))
        ctx.compiled, ctx.shape = compiled, terms[0].shape
        ctx.plus = None if plus is None else plus.shape
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        weights, *terms = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated too
            rows = torch.stack([each.reshape(-1) for each in g])
            dots = rows @ torch.stack([term.reshape(-1) for term in terms]).T if terms else None
            by_term = [each.view(ctx.shape) for each in (weights.T @ rows).unbind()]
            return None, dots, None if ctx.plus is None else torch.cat(g, 1), *by_term
        factors, channels, needed = weights.contiguous(), ctx.shape[1], ctx.needs_input_grad[3:]
        given = [each.contiguous(memory_format=torch.channels_last) for each in g]
        gx = [torch.empty_like(given[0]) if wanted else None for wanted in needed]
        gplus = None
        if ctx.plus is not None and ctx.needs_input_grad[2]:
            gplus = torch.empty(ctx.plus, dtype=factors.dtype, memory_format=torch.channels_last)
        threads = threads_for(given[0])
        dots = torch.zeros(threads, len(given), len(needed), dtype=torch.float64)
        ctx.compiled.backward(
            *(c_int64(given[0].numel() // channels), c_int64(channels), len(given), len(needed)),
            *(pointers(terms) if terms else None, pointer(factors), pointers(given), pointers(gx)),
            *(pointer(gplus), pointer(dots), threads),
        )
        return None, dots.sum(0).to(factors.dtype) if terms else None, gplus, *gx

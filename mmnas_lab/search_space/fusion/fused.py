"""What a fusion cell does beside matrix products, in one pass over the tensors each way on a CPU.

torch reads and writes whole tensors for each addition, BatchNorm, activation and dropout, which on a CPU
costs as much as the matrix products between them. `fused.c` does the same with the same gradients, `native`
compiles it; other devices and types, and machines without a C compiler, get it from torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_double, c_int64
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab.native import REALS, library, pointer, pointers, threads_for

Activation = Literal["relu", "glu"]


def compiled_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The compiled functions, if they can stand for torch's on these tensors."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype not in REALS or torch.is_autocast_enabled("cpu"):
        return None
    if any(each.dtype != first.dtype or each.device != first.device for each in tensors):
        return None
    if any(each.numel() == 0 for each in tensors):
        return None
    return library(Path(__file__).with_name("fused.c"), f"-DREAL={REALS[first.dtype]}")


# ---- projection, BatchNorm, activation, dropout -----------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A linear map and the norm behind it."""

    matrix: Tensor  # (C_out, C_in)
    bias: Tensor  # (C_out,)
    norm: nn.BatchNorm1d


def project(
    inputs: Sequence[Tensor],
    projections: Sequence[Projection],
    length: int,
    activation: Activation,
    p: float,
    scale: Tensor | None = None,
) -> Tensor:
    """dropout(activation(scale * norm(matrix x + bias))) of each input, stacked.

    Args:
        inputs: n tensors (B, L or 1, C_in); one position becomes L equal ones before the norm.
        projections: one for each input, to equal C_out.
        length: L.
        activation: `glu` halves the channels.
        p: probability that an entry is dropped, where the norm is in training.
        scale: (C_out,), or none.

    Returns:
        (n, B, L, C), C = C_out or with `glu` C_out / 2.
    """
    passes = list(zip(inputs, projections, strict=True))
    affines = [
        (each.norm.weight, each.norm.bias)
        if scale is None
        else (each.norm.weight * scale, each.norm.bias * scale)
        for each in projections
    ]
    matrices = [each.matrix for each in projections]
    compiled = compiled_for(*inputs, *matrices, *(tensor for affine in affines for tensor in affine))
    training = all(each.norm.training for each in projections)
    if compiled is None or not training or len(inputs[0]) * length == 1:
        outs = [
            plain(_rows(F.linear(x, each.matrix, each.bias), length), each.norm, *affine, activation, p)
            for (x, each), affine in zip(passes, affines, strict=True)
        ]
        out = torch.stack(outs) if len(outs) > 1 else outs[0]
    else:
        # Batch statistics take the bias away again: it is left out, and lives on in the running mean.
        products = [_rows(F.linear(x, each.matrix), length) for x, each in passes]
        settings = [
            Pass(compiled, h.new_empty(5, h.shape[1]), each.norm.eps, activation, Draw(p))
            for h, each in zip(products, projections, strict=True)
        ]
        flat = [
            tensor
            for h, affine, each in zip(products, affines, projections, strict=True)
            for tensor in (h, *affine, each.bias)
        ]
        out = NormActivateDrop.apply(settings, *flat)
        for each, setting in zip(projections, settings, strict=True):
            _track(each, setting.statistics, len(inputs[0]) * length)
    return out.view(len(inputs), len(inputs[0]), length, -1)


def plain(
    rows: Tensor, norm: nn.BatchNorm1d, weight: Tensor, bias: Tensor, activation: Activation, p: float
) -> Tensor:
    """BatchNorm with the affine given, activation and dropout of (rows, C_out), in torch."""
    if norm.training:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    momentum, training = norm.momentum or 0.0, norm.training
    normed = F.batch_norm(
        rows, norm.running_mean, norm.running_var, weight, bias, training, momentum, norm.eps
    )
    return F.dropout(_activated(normed, activation), p, training)


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of (..., C)."""
    if p == 0 or not training:
        return x
    compiled = compiled_for(x)
    return F.dropout(x, p) if compiled is None else Drop.apply(compiled, x, Draw(p))


class Draw(ctypes.Structure):
    """Which entries are dropped: with probability p, by two numbers from torch's generator."""

    _fields_ = (
        ("key", ctypes.c_uint32),
        ("salt", ctypes.c_uint32),
        ("dropped", ctypes.c_uint32),
        ("scale", ctypes.c_double),
    )

    def __init__(self, p: float) -> None:
        number = int(torch.randint(2**63 - 1, ())) if p else 0
        scale = 1 / (1 - p) if p < 1 else 0.0
        super().__init__(number & 0xFFFFFFFF, number >> 32, min(round(p * 2**32), 2**32 - 1), scale)


@dataclass(frozen=True)
class Pass:
    """One tensor's way through `NormActivateDrop`; (5, C_out) statistics are written by it."""

    compiled: ctypes.CDLL
    statistics: Tensor
    eps: float
    activation: Activation
    draw: Draw


class NormActivateDrop(torch.autograd.Function):
    """For each pass a product (rows, C_out), weight and bias of the norm, and the product's missing bias.

    The result is (passes, rows, C). Nothing depends on the missing bias; it is here to get its gradient, 0.
    """

    @staticmethod
    def forward(ctx: Any, passes: Sequence[Pass], *tensors: Tensor) -> Tensor:
        gated = passes[0].activation == "glu"
        rows, channels = tensors[0].shape
        shape = (len(passes), rows, channels // 2 if gated else channels)
        out = tensors[0].new_empty(shape)
        kept = tensors[0].new_empty(shape) if gated else out
        for i, each in enumerate(passes):
            x, weight, bias = (tensor.contiguous() for tensor in tensors[4 * i : 4 * i + 3])
            failed = each.compiled.forward(
                *(c_int64(rows), c_int64(channels), int(gated), pointer(x), pointer(weight), pointer(bias)),
                *(c_double(each.eps), byref(each.draw), pointer(each.statistics)),
                *(pointer(kept[i]), pointer(out[i]), threads_for(x)),
            )
            _check(failed, x)
        ctx.save_for_backward(kept, *tensors)
        ctx.passes = passes
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept, *tensors = ctx.saved_tensors
        gradients: list[Tensor | None] = []
        for i, each in enumerate(ctx.passes):
            *inputs, missing = tensors[4 * i : 4 * i + 4]
            if torch.is_grad_enabled():  # the gradient is to be differentiated too
                gradients += _differentiable(each, inputs, g[i])
            else:
                gradients += _gradients(each, inputs[0], kept[i], g[i])
            gradients.append(torch.zeros_like(missing))
        return None, *gradients


def _gradients(each: Pass, x: Tensor, kept: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of product, weight and bias."""
    x, g = x.contiguous(), g.contiguous()
    rows, channels = x.shape
    gx, affine = torch.empty_like(x), x.new_empty(2, channels)
    failed = each.compiled.backward(
        *(c_int64(rows), c_int64(channels), int(each.activation == "glu")),
        *(pointer(x), pointer(kept), pointer(g), pointer(each.statistics), c_double(each.draw.scale)),
        *(pointer(gx), pointer(affine), threads_for(x)),
    )
    _check(failed, x)
    return gx, affine[0], affine[1]


def _differentiable(each: Pass, inputs: Sequence[Tensor], g: Tensor) -> list[Tensor | None]:
    """As `_gradients`, by torch's own operations, so that the results have gradients of their own."""
    # Views, so that what x was made of is not differentiated: that is not for this function to do.
    inputs = [tensor.view_as(tensor) for tensor in inputs]
    x, weight, bias = inputs
    normed = F.batch_norm(x, None, None, weight, bias, True, 0.0, each.eps)
    activated = _activated(normed, each.activation)
    result = activated * Drop.apply(each.compiled, torch.ones_like(activated), each.draw)
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    if not needed:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(result, needed, g, create_graph=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


class Drop(torch.autograd.Function):
    """Dropout by a draw, of (..., C)."""

    @staticmethod
    def forward(ctx: Any, compiled: ctypes.CDLL, x: Tensor, draw: Draw) -> Tensor:
        x = x.contiguous()
        out, channels = torch.empty_like(x), x.shape[-1]
        rows = c_int64(x.numel() // channels)
        compiled.drop(rows, c_int64(channels), pointer(x), byref(draw), pointer(out), threads_for(x))
        ctx.compiled, ctx.draw = compiled, draw
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        return None, Drop.apply(ctx.compiled, g, ctx.draw), None


# ---- weighted sums ----------------------------------------------------------------------------------


def weighted_sum(weights: Tensor, tensors: Sequence[Tensor], plus: Sequence[Tensor] = ()) -> Tensor:
    """The sum of weights[k] tensors[k] and of `plus`; all are of one shape, `weights` is (K,)."""
    compiled = compiled_for(weights, *tensors, *plus)
    if compiled is not None and len({each.shape for each in (*tensors, *plus)}) == 1:
        return WeightedSum.apply(compiled, weights, len(tensors), *tensors, *plus)
    return sum([w * tensor for w, tensor in zip(weights, tensors, strict=True)], start=sum(plus))  # type: ignore[return-value]


class WeightedSum(torch.autograd.Function):
    """`weights` (K,) are those of the first K tensors; the others are added as they are."""

    @staticmethod
    def forward(ctx: Any, compiled: ctypes.CDLL, weights: Tensor, count: int, *tensors: Tensor) -> Tensor:
        parts = [tensor.contiguous() for tensor in tensors]
        factors = torch.cat([weights, weights.new_ones(len(parts) - count)])
        out = torch.empty_like(parts[0])
        compiled.total(
            *(c_int64(out.numel()), len(parts), pointers(parts), pointer(factors)),
            *(pointer(out), threads_for(out)),
        )
        ctx.save_for_backward(weights, *tensors[:count])
        ctx.compiled, ctx.count = compiled, len(parts)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weights, *parts = ctx.saved_tensors
        rest = [g] * (ctx.count - len(parts))
        if torch.is_grad_enabled():
            dots = torch.stack([(g * part).sum() for part in parts])
            return None, dots, None, *(weight * g for weight in weights), *rest
        g, factors, parts = g.contiguous(), weights.contiguous(), [part.contiguous() for part in parts]
        needed = ctx.needs_input_grad[3 : 3 + len(parts)]
        gradients = [torch.empty_like(g) if wanted else None for wanted in needed]
        threads = threads_for(g)
        dots = torch.zeros(threads, len(parts), dtype=torch.float64)
        ctx.compiled.total_gradient(
            *(c_int64(g.numel()), len(parts), pointers(parts), pointer(factors), pointer(g)),
            *(pointers(gradients), pointer(dots), threads),
        )
        return None, dots.sum(0).to(g.dtype), None, *gradients, *rest


# ---- scores of attention ----------------------------------------------------------------------------


def scores(x: Tensor, y: Tensor) -> Tensor:
    """X y^T of (B, L, C): (B, L, L)."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.bmm(x, y.transpose(1, 2))
    return Scores.apply(x, y)


class Scores(torch.autograd.Function):
    """x y^T of (B, L, C); the gradients are contiguous, and x x^T has one instead of two to be added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.same = x is y
        ctx.save_for_backward(x, y)
        return torch.bmm(x, y.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None]:
        x, y = ctx.saved_tensors
        if ctx.same:
            return torch.bmm(g + g.transpose(1, 2), x), None
        return torch.bmm(g, y), torch.bmm(g.transpose(1, 2), x)


# ---- ReLU of a transposed tensor --------------------------------------------------------------------


def relu_transposed(x: Tensor) -> Tensor:
    """ReLU of (B, L, C) as (B, C, L), contiguous."""
    compiled = compiled_for(x)
    if compiled is None:
        # ReLU last: its gradient is slow where result and gradient differ in their order in memory.
        return torch.relu(x.transpose(1, 2).contiguous())
    return ReluTransposed.apply(compiled, x)


class ReluTransposed(torch.autograd.Function):
    """As `relu_transposed`."""

    @staticmethod
    def forward(ctx: Any, compiled: ctypes.CDLL, x: Tensor) -> Tensor:
        x = x.contiguous()
        samples, length, channels = x.shape
        out = x.new_empty(samples, channels, length)
        compiled.relu_transposed(
            *(c_int64(samples), c_int64(length), c_int64(channels), pointer(x), pointer(out), threads_for(x))
        )
        ctx.save_for_backward(out)
        ctx.compiled = compiled
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        (out,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, (g * (out != 0)).transpose(1, 2)
        g = g.contiguous()
        samples, channels, length = out.shape
        gx = out.new_empty(samples, length, channels)
        sizes = (c_int64(samples), c_int64(length), c_int64(channels))
        ctx.compiled.relu_transposed_gradient(*sizes, pointer(out), pointer(g), pointer(gx), threads_for(g))
        return None, gx


# ---- small parts ------------------------------------------------------------------------------------


def _rows(product: Tensor, length: int) -> Tensor:
    """(B, L or 1, C) as (B L, C)."""
    return product.expand(-1, length, -1).flatten(0, 1)


def _activated(x: Tensor, activation: Activation) -> Tensor:
    return F.glu(x, -1) if activation == "glu" else torch.relu(x)


def _track(projection: Projection, statistics: Tensor, rows: int) -> None:
    """Running statistics, as torch keeps them."""
    norm = projection.norm
    mean, variance = statistics[0], statistics[1]
    momentum = norm.momentum or 0.0
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    norm.running_mean.lerp_(mean + projection.bias.detach(), momentum)  # type: ignore[union-attr]
    norm.running_var.lerp_(variance * (rows / (rows - 1)), momentum)  # type: ignore[union-attr]


def _check(failed: int, x: Tensor) -> None:
    if failed:
        raise MemoryError(f"no memory for the sums of a tensor {tuple(x.shape)}; lower the batch size")

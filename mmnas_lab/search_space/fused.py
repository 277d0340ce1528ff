"""What cells do beside products and convolutions, in one pass over the tensors each way on a CPU.

torch reads and writes whole tensors for each addition, BatchNorm, activation and dropout, which on a CPU
costs as much as what lies between them. `fused.c` does the same with the same gradients, `native`
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

Activation = Literal["none", "relu", "glu"]
ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "glu")  # as in fused.c


def compiled_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The compiled functions, if they can stand for torch's on these tensors."""
    first = tensors[0]
    if first.device.type != "cpu" or first.dtype not in REALS or first.numel() == 0:
        return None
    if torch.is_autocast_enabled("cpu") or any(tensor.dtype != first.dtype for tensor in tensors):
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
        p: probability that an entry is dropped.
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
    norm = projections[0].norm
    compiled = compiled_for(inputs[0], projections[0].matrix)
    if compiled is None or not norm.training or len(inputs[0]) * length == 1:
        outs = [
            plain(_rows(F.linear(x, each.matrix, each.bias), length), each.norm, *affine, activation, p)
            for (x, each), affine in zip(passes, affines, strict=True)
        ]
        out = torch.stack(outs) if len(outs) > 1 else outs[0]
    else:
        # Batch statistics take the bias away again: it is left out, and lives on in the running mean.
        products = [_rows(F.linear(x, each.matrix), length) for x, each in passes]
        settings = [
            Pass(compiled, h.new_empty(5, h.shape[1]), each.norm.eps, activation, Draw(p) if p else None)
            for h, each in zip(products, projections, strict=True)
        ]
        flat = [
            tensor
            for h, affine, each in zip(products, affines, projections, strict=True)
            for tensor in (h, *affine, each.bias)
        ]
        out = NormActivateDrop.apply(settings, *flat)
        for each, setting in zip(projections, settings, strict=True):
            _track(each.norm, setting.statistics, len(inputs[0]) * length, each.bias)
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


def normalise(x: Tensor, norm: nn.BatchNorm2d, scale: Tensor | None, activation: Activation) -> Tensor:
    """activation(scale * norm(x)) of (B, C, H, W) with a norm that has no affine map; `scale` is (C,).

    Compiled where channels lie last in memory; x is not changed.
    """
    last = x.is_contiguous(memory_format=torch.channels_last)
    compiled = compiled_for(x) if norm.training and last and x.numel() > x.shape[1] else None
    if compiled is None:
        if norm.training:
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        statistics, momentum = (norm.running_mean, norm.running_var), norm.momentum or 0.0
        out = F.batch_norm(x, *statistics, scale, None, norm.training, momentum, norm.eps)
        return torch.relu_(out) if activation == "relu" else out
    setting = Pass(compiled, x.new_empty(5, x.shape[1]), norm.eps, activation, None)
    out = NormActivateLast.apply(setting, x, scale)
    _track(norm, setting.statistics, x.numel() // x.shape[1], None)
    return out


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
        number = int(torch.randint(2**63 - 1, ()))
        scale = 1 / (1 - p) if p < 1 else 0.0
        super().__init__(number & 0xFFFFFFFF, number >> 32, min(round(p * 2**32), 2**32 - 1), scale)


@dataclass(frozen=True)
class Pass:
    """One tensor's way through `NormActivateDrop`; (5, C_out) statistics are written by it."""

    compiled: ctypes.CDLL
    statistics: Tensor
    eps: float
    activation: Activation
    draw: Draw | None


class NormActivateDrop(torch.autograd.Function):
    """For each pass x (rows, C_out), weight and bias of the norm, and the bias that was not added to x.

    The result is (passes, rows, C). Nothing depends on the last; it is here to get its gradient, 0.
    """

    @staticmethod
    def forward(ctx: Any, passes: Sequence[Pass], *tensors: Tensor) -> Tensor:
        first, activation = tensors[0], passes[0].activation
        rows, channels = first.shape
        shape = (len(passes), rows, channels // 2 if activation == "glu" else channels)
        out = first.new_empty(shape)
        kept = out if activation == "relu" else first.new_empty(shape if activation == "glu" else (0, 0))
        for i, each in enumerate(passes):
            x, weight, bias = tensors[4 * i : 4 * i + 3]
            _forward(each, x, weight, bias, kept[i] if len(kept) else None, out[i])
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
                gradients += _gradients(each, inputs[0], kept[i] if len(kept) else None, g[i])
            gradients.append(torch.zeros_like(missing))
        return None, *gradients


class NormActivateLast(torch.autograd.Function):
    """`NormActivateDrop` without dropout of one (B, C, H, W) whose channels lie last in memory, as it is.

    Its result is no view, so that others may add to it.
    """

    @staticmethod
    def forward(ctx: Any, setting: Pass, x: Tensor, scale: Tensor | None) -> Tensor:
        result = torch.empty_like(x)
        _forward(setting, _channels_last_rows(x), scale, None, None, result)
        ctx.setting = setting
        ctx.save_for_backward(x, scale, result if setting.activation == "relu" else None)
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        x, scale, kept = ctx.saved_tensors
        rows, g_rows = _channels_last_rows(x), _channels_last_rows(g)
        if torch.is_grad_enabled():
            gx, d_scale, _ = _differentiable(ctx.setting, (rows, scale, None), g_rows)
        else:
            kept = None if kept is None else _channels_last_rows(kept)
            gx, d_scale, _ = _gradients(ctx.setting, rows, kept, g_rows)
        return (
            None,
            None if gx is None else _of_rows(gx, x.shape),
            None if scale is None else d_scale,
        )


def _channels_last_rows(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B H W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _of_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """(B H W, C) as (B, C, H, W)."""
    batch, channels, height, width = shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _forward(
    each: Pass, x: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor | None, out: Tensor
) -> None:
    """Write the result, the statistics and what is kept."""
    x, weight, bias = x.contiguous(), _contiguous(weight), _contiguous(bias)
    failed = each.compiled.forward(
        *(c_int64(size) for size in x.shape),
        *(ACTIVATIONS.index(each.activation), pointer(x), pointer(weight), pointer(bias)),
        *(c_double(each.eps), None if each.draw is None else byref(each.draw), pointer(each.statistics)),
        *(pointer(kept), pointer(out), threads_for(x)),
    )
    _check(failed, x)


def _gradients(each: Pass, x: Tensor, kept: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    x, g = x.contiguous(), g.contiguous()
    rows, channels = x.shape
    gx, affine = torch.empty_like(x), x.new_empty(2, channels)
    failed = each.compiled.backward(
        *(c_int64(rows), c_int64(channels), ACTIVATIONS.index(each.activation), pointer(x)),
        *(pointer(kept), pointer(g), pointer(each.statistics)),
        *(c_double(1 if each.draw is None else each.draw.scale), pointer(gx), pointer(affine)),
        threads_for(x),
    )
    _check(failed, x)
    return gx, affine[0], affine[1]


def _differentiable(each: Pass, inputs: Sequence[Tensor | None], g: Tensor) -> list[Tensor | None]:
    """As `_gradients`, by torch's own operations, so that the results have gradients of their own."""
    x, weight, bias = inputs
    assert x is not None
    normed = F.batch_norm(x, None, None, weight, bias, True, 0.0, each.eps)
    activated = _activated(normed, each.activation)
    if each.draw is not None:
        activated = activated * Drop.apply(each.compiled, torch.ones_like(activated), each.draw)
    needed = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(activated, needed, g, create_graph=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]


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
    if compiled is not None:
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
    if activation == "none":
        return x
    return F.glu(x, -1) if activation == "glu" else torch.relu(x)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _track(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, statistics: Tensor, rows: int, missing: Tensor | None
) -> None:
    """Running statistics, as torch keeps them; `missing` is a bias that the rows should have had."""
    mean, variance = statistics[0], statistics[1]
    mean = mean if missing is None else mean + missing.detach()
    momentum = norm.momentum or 0.0
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    norm.running_mean.lerp_(mean, momentum)  # type: ignore[union-attr]
    norm.running_var.lerp_(variance * (rows / (rows - 1)), momentum)  # type: ignore[union-attr]


def _check(failed: int, x: Tensor) -> None:
    if failed:
        raise MemoryError(f"no memory for the sums of a tensor {tuple(x.shape)}; lower the batch size")

"""A grouped 1x1 convolution with the BatchNorm and the ReLU behind it, in fewer passes on a CPU.

Of few channels such a convolution costs no more than reading and writing its tensors; `pointwise.c` computes
the batch statistics while it writes the result, and the gradients of weights and input while it forms that of
BatchNorm. Other devices, types, layouts and widths, and machines without a C compiler, get it from torch.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mmnas_lab.native import REALS, library, pointer

WIDTHS = (8, 16, 32, 64)  # channels of a group for which there is compiled code


def pointwise_norm(
    x: Tensor, weight: Tensor, norm: nn.BatchNorm2d, scale: Tensor | None, relu: bool, groups: int
) -> Tensor:
    """Scale * norm(convolution of x), perhaps rectified.

    Args:
        x: (B, n C, H, W).
        weight: (n C, C, 1, 1).
        norm: BatchNorm without affine map.
        scale: (n C,), or none.
        relu: whether a ReLU follows.
        groups: n.
    """
    compiled = _compiled_for(x, weight) if norm.training else None
    if compiled is None:
        return _by_torch(F.conv2d(x, weight, groups=groups), norm, scale, relu)
    statistics = x.new_empty(5, x.shape[1])
    out: Tensor = PointwiseNorm.apply(compiled, statistics, x, weight, scale, relu, groups, norm.eps)
    rows, momentum = x.numel() // x.shape[1], norm.momentum or 0.0
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    norm.running_mean.lerp_(statistics[0], momentum)  # type: ignore[union-attr]
    norm.running_var.lerp_(statistics[1] * (rows / (rows - 1)), momentum)  # type: ignore[union-attr]
    return out


def _by_torch(y: Tensor, norm: nn.BatchNorm2d, scale: Tensor | None, relu: bool) -> Tensor:
    if norm.training:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    momentum = norm.momentum or 0.0
    out = F.batch_norm(y, norm.running_mean, norm.running_var, scale, None, norm.training, momentum, norm.eps)
    return torch.relu_(out) if relu else out


def _compiled_for(x: Tensor, weight: Tensor) -> ctypes.CDLL | None:
    """The compiled functions, if they can stand for torch's here."""
    if x.device.type != "cpu" or x.dtype not in REALS or weight.dtype != x.dtype:
        return None
    if weight.shape[1] not in WIDTHS or torch.is_autocast_enabled("cpu"):
        return None
    if not x.is_contiguous(memory_format=torch.channels_last) or x.numel() <= x.shape[1]:
        return None
    defines = f"-DREAL={REALS[x.dtype]} -DCHANNELS={weight.shape[1]}"
    return library(Path(__file__).with_name("pointwise.c"), defines)


class PointwiseNorm(Function):
    """As `pointwise_norm`; (5, n C) statistics are written."""

    @staticmethod
    def forward(
        ctx: Any,
        compiled: ctypes.CDLL,
        statistics: Tensor,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        relu: bool,
        groups: int,
        eps: float,
    ) -> Tensor:
        y, out = torch.empty_like(x), torch.empty_like(x)
        weights = weight.contiguous()
        factors = None if scale is None else scale.contiguous()
        failed = compiled.forward(
            *(c_int64(x.numel() // x.shape[1]), c_int64(groups), pointer(x), pointer(weights)),
            *(pointer(factors), int(relu), c_double(eps), pointer(y), pointer(statistics), pointer(out)),
            torch.get_num_threads(),
        )
        _check(failed, x)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, scale, y)
        ctx.compiled, ctx.statistics, ctx.relu, ctx.groups, ctx.eps = compiled, statistics, relu, groups, eps
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, y = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        by_input, by_weight = ctx.needs_input_grad[2:4]
        weights = weight.contiguous()
        gx = torch.empty_like(y) if by_input else None
        dw = torch.empty_like(weights) if by_weight else None
        ds = y.new_empty(y.shape[1])
        failed = ctx.compiled.backward(
            *(c_int64(y.numel() // y.shape[1]), c_int64(ctx.groups), pointer(x), pointer(weights)),
            *(pointer(y), pointer(g), pointer(ctx.statistics), int(ctx.relu)),
            *(pointer(gx), pointer(dw), pointer(ds), torch.get_num_threads()),
        )
        _check(failed, y)
        return None, None, gx, dw, None if scale is None else ds, None, None, None


def _check(failed: int, x: Tensor) -> None:
    if failed:
        raise MemoryError(f"no memory for the sums of a tensor {tuple(x.shape)}; lower the batch size")

"""A grouped 1x1 convolution with the BatchNorm and the ReLU behind it, in fewer passes on a CPU.

Of few channels such a convolution costs no more than reading and writing its tensors; `pointwise.c` computes
the batch statistics while it writes the result, and the gradients of weights and input while it forms that of
BatchNorm. Other devices, types, layouts and widths, and machines without a C compiler, get it from torch.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mmnas_lab.native import REALS, library, pointer

WIDTHS = (8, 16, 32, 64)  # channels of a group for which there is compiled code


def pointwise_norm(
    x: Tensor,
    weight: Tensor,
    norm: nn.BatchNorm2d,
    scale: Tensor | None,
    relu: bool,
    groups: int,
    total: Tensor | None = None,
) -> Tensor:
    """The convolution of x, normalised, times `scale`, perhaps rectified.

    Args:
        x: (B, n C, H, W).
        weight: (n C, C, 1, 1).
        norm: BatchNorm without affine map.
        scale: (n C,), or none.
        relu: whether a ReLU follows.
        groups: n.
        total: where the result is added to, in place; the sum is returned.
    """
    compiled = _compiled_for(x, weight, scale, total) if norm.training else None
    if compiled is None:
        h = _by_torch(F.conv2d(x, weight, groups=groups), norm, scale, relu)
        return h if total is None else total.add_(h)
    setting = _Setting(compiled, x.new_empty(5, x.shape[1]), relu, groups, norm.eps)
    out: Tensor = PointwiseNorm.apply(setting, x, weight, scale, total)
    mean, variance = setting.statistics[:2]
    rows, momentum = x.numel() // x.shape[1], norm.momentum or 0.0
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    norm.running_mean.lerp_(mean, momentum)  # type: ignore[union-attr]
    norm.running_var.lerp_(variance * (rows / (rows - 1)), momentum)  # type: ignore[union-attr]
    return out


def _by_torch(y: Tensor, norm: nn.BatchNorm2d, scale: Tensor | None, relu: bool) -> Tensor:
    if norm.training:
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    momentum = norm.momentum or 0.0
    out = F.batch_norm(y, norm.running_mean, norm.running_var, scale, None, norm.training, momentum, norm.eps)
    return torch.relu_(out) if relu else out


def _compiled_for(
    x: Tensor, weight: Tensor, scale: Tensor | None, total: Tensor | None
) -> ctypes.CDLL | None:
    """The compiled functions, if they can stand for torch's here."""
    if x.device.type != "cpu" or x.dtype not in REALS or torch.is_autocast_enabled("cpu"):
        return None
    others = [each for each in (weight, scale, total) if each is not None]
    if any(each.dtype != x.dtype or each.device != x.device for each in others):
        return None
    maps = [x] if total is None else [x, total]
    if not all(each.is_contiguous(memory_format=torch.channels_last) for each in maps):
        return None
    fits = total is None or total.shape == x.shape
    if weight.shape[1] not in WIDTHS or x.numel() <= x.shape[1] or not fits:
        return None
    defines = f"-DREAL={REALS[x.dtype]} -DCHANNELS={weight.shape[1]}"
    return library(Path(__file__).with_name("pointwise.c"), defines)


@dataclass(frozen=True)
class _Setting:
    """What is done; (5, n C) statistics are written by it."""

    compiled: ctypes.CDLL
    statistics: Tensor
    relu: bool
    groups: int
    eps: float


class PointwiseNorm(Function):
    """As `pointwise_norm`."""

    @staticmethod
    def forward(
        ctx: Any, setting: _Setting, x: Tensor, weight: Tensor, scale: Tensor | None, total: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(x)
        out = torch.empty_like(x) if total is None else total
        weights, factors = weight.contiguous(), None if scale is None else scale.contiguous()
        failed = setting.compiled.forward(
            *(c_int64(x.numel() // x.shape[1]), c_int64(setting.groups), pointer(x), pointer(weights)),
            *(pointer(factors), int(setting.relu), int(total is not None), c_double(setting.eps)),
            *(pointer(y), pointer(setting.statistics), pointer(out), torch.get_num_threads()),
        )
        _check(failed, x)
        if total is not None:
            ctx.mark_dirty(total)
        ctx.save_for_backward(x, weight, scale, y)
        ctx.setting, ctx.adds = setting, total is not None
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, y = ctx.saved_tensors
        setting: _Setting = ctx.setting
        through = g if ctx.adds else None
        if torch.is_grad_enabled():  # the gradient is to be differentiated too
            return None, *_differentiable(setting, (x, weight, scale), g), through
        by_input, by_weight = ctx.needs_input_grad[1:3]
        g, weights = g.contiguous(memory_format=torch.channels_last), weight.contiguous()
        gx = torch.empty_like(y) if by_input else None
        dw = torch.empty_like(weights) if by_weight else None
        ds = y.new_empty(y.shape[1])
        failed = setting.compiled.backward(
            *(c_int64(y.numel() // y.shape[1]), c_int64(setting.groups), pointer(x), pointer(weights)),
            *(pointer(y), pointer(g), pointer(setting.statistics), int(setting.relu)),
            *(pointer(gx), pointer(dw), pointer(ds), torch.get_num_threads()),
        )
        _check(failed, y)
        return None, gx, dw, None if scale is None else ds, through


def _differentiable(
    setting: _Setting, inputs: tuple[Tensor, Tensor, Tensor | None], g: Tensor
) -> list[Tensor | None]:
    """Gradients of x, weight and scale by torch's operations, so that they have gradients too."""
    # Views, so that what x was made of is not differentiated: that is not for this function to do.
    x, weight = inputs[0].view_as(inputs[0]), inputs[1].view_as(inputs[1])
    scale = None if inputs[2] is None else inputs[2].view_as(inputs[2])
    y = F.conv2d(x, weight, groups=setting.groups)
    out = F.batch_norm(y, None, None, scale, None, True, 0.0, setting.eps)
    out = torch.relu(out) if setting.relu else out
    views = (x, weight, scale)
    needed = [tensor for tensor in views if tensor is not None and tensor.requires_grad]
    if not needed:
        return [None] * len(views)
    found = iter(torch.autograd.grad(out, needed, g, create_graph=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in views]


def _check(failed: int, x: Tensor) -> None:
    if failed:
        raise MemoryError(f"no memory for the sums of a tensor {tuple(x.shape)}; lower the batch size")

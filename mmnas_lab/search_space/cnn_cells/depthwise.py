"""Depthwise convolutions whose gradients are fast on a CPU, too.

There torch's gradients of a depthwise convolution cost up to fifty times its forward, except for 3x3 kernels
without stride and dilation. So the gradient by the input is taken as the convolution that it is, with the
kernel turned round; a stride of 2 is one of 1 whose result is read at every second position. The gradient by
the kernel is that of `depthwise.c` where channels lie last. Without a C compiler it is put together from 3x3
pieces without dilation: a dilation of 2 is none among every second row and column, and a 5x5 kernel is four
overlapping 3x3 ones.

The gradient by the kernel is computed only where the kernel asks for one, which in an architecture half-step
it does not. All can be differentiated again.
"""

from __future__ import annotations

from ctypes import c_int64
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from mmnas_lab.native import REALS, library, pointer


class Depthwise(nn.Conv2d):
    """A depthwise convolution (B, C, H, W) -> (B, C, H / stride, W / stride) without bias."""

    def __init__(self, channels: int, size: int, stride: int, dilation: int) -> None:
        padding = dilation * (size // 2)
        super().__init__(channels, channels, size, stride, padding, dilation, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.weight, int(self.stride[0]), int(self.dilation[0]))


def depthwise(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    """The depthwise convolution of x (B, C, H, W) with an odd kernel (C, 1, k, k), padded to its size."""
    fast = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if not fast:
        return _forward(x, weight, stride, dilation)
    result: Tensor = Convolution.apply(x, weight, stride, dilation)
    return result


def _forward(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1])


class Convolution(Function):
    """The convolution, with its gradients by the input and by the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        by_input, by_kernel = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if by_kernel else None, weight if by_input else None)
        ctx.shape, ctx.size, ctx.stride, ctx.dilation = x.shape, weight.shape[-1], stride, dilation
        return _forward(x, weight, stride, dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        by_kernel = None if x is None else compiled_gradient(x, gradient, ctx.size, ctx.stride, ctx.dilation)
        if weight is None and by_kernel is not None:
            return None, by_kernel, None, None
        spread = spread_out(gradient, ctx.shape, ctx.stride)
        if by_kernel is None and x is not None:
            by_kernel = kernel_gradient(x, spread, ctx.size, ctx.dilation)
        by_input = None if weight is None else depthwise(spread, weight.flip(2, 3), 1, ctx.dilation)
        return by_input, by_kernel, None, None


def compiled_gradient(x: Tensor, gradient: Tensor, size: int, stride: int, dilation: int) -> Tensor | None:
    """As `kernel_gradient`, by `depthwise.c`; None where that is not to be had or not the faster one.

    `gradient` is that of the strided result.
    """
    if torch.is_grad_enabled() or (size, stride, dilation) == (3, 1, 1):
        return None
    if x.dtype not in REALS or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    compiled = library(Path(__file__).with_name("depthwise.c"), f"-DREAL={REALS[x.dtype]}")
    if compiled is None:
        return None
    batch, channels, height, width = x.shape
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    out = x.new_empty(channels, 1, size, size)
    failed = compiled.kernel_gradient(
        *(c_int64(each) for each in (batch, height, width, channels, *gradient.shape[2:])),
        *(size, stride, dilation, pointer(x), pointer(gradient), pointer(out), torch.get_num_threads()),
    )
    if failed:
        raise MemoryError(f"no memory for the kernel's gradient of {tuple(x.shape)}; lower the batch size")
    return out


def spread_out(gradient: Tensor, shape: torch.Size, stride: int) -> Tensor:
    """The gradient at the positions of the input that the stride visits, and 0 between them."""
    if stride == 1:
        return gradient
    batch, channels, height, width = shape
    if gradient.is_contiguous(memory_format=torch.channels_last):
        spread = gradient.new_zeros(batch, height, width, channels).permute(0, 3, 1, 2)
    else:
        spread = gradient.new_zeros(shape)
    spread[:, :, ::stride, ::stride] = gradient
    return spread


def kernel_gradient(x: Tensor, gradient: Tensor, size: int, dilation: int) -> Tensor:
    """(C, 1, size, size): entry (u, v) sums gradient times x moved by (u, v), over samples and positions."""
    if dilation == 2 and x.shape[2] % 2 == x.shape[3] % 2 == 0:
        return kernel_gradient(phases(x), phases(gradient), size, 1)
    if size != 5 or dilation != 1:
        return _kernel_gradient(x, gradient, size, dilation, dilation * (size // 2))
    height, width = x.shape[2:]
    padded = F.pad(x, (2, 2, 2, 2))
    (top_left, top_right), (bottom_left, bottom_right) = (
        [
            _kernel_gradient(padded[:, :, i : i + height + 2, j : j + width + 2], gradient, 3, 1, 0)
            for j in (0, 2)
        ]
        for i in (0, 2)
    )
    top = torch.cat([top_left, top_right[..., 1:]], 3)
    bottom = torch.cat([bottom_left, bottom_right[..., 1:]], 3)
    return torch.cat([top, bottom[:, :, 1:]], 2)


def phases(x: Tensor) -> Tensor:
    """(4 B, C, H / 2, W / 2): every second row and column, from each of the four corners."""
    return torch.cat([x[:, :, i::2, j::2] for i, j in product(range(2), repeat=2)])


def _kernel_gradient(x: Tensor, gradient: Tensor, size: int, dilation: int, padding: int) -> Tensor:
    channels = x.shape[1]
    like = x.new_zeros(channels, 1, size, size)
    arguments = ([1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], channels, [False, True, False])
    return torch.ops.aten.convolution_backward(gradient, x, like, None, *arguments)[1]

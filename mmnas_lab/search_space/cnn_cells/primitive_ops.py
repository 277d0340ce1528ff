"""The operations of cells as plain modules: what a found network is built of, and the ends of every cell.

All take (B, C, H, W) to (B, C, H / stride, W / stride). Sources: DARTS (arXiv 1806.09055) for the operations
of its vocabulary, RobustDARTS (arXiv 1909.09656) for `noise`, NAS-Bench-201 (arXiv 2001.00326) for the rest.
No ReLU works in place: the input of an operation is also that of others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmnas_lab.search_space.cnn_cells.depthwise import Depthwise


class ReLUConvNorm(nn.Sequential):
    """ReLU, convolution without bias, BatchNorm."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int = 1, affine: bool = True
    ) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(channels, affine=affine),
        )


class FactorizedReduce(nn.Module):
    """Half the height and width: ReLU, two 1x1 convolutions that read alternate positions, BatchNorm.

    Height and width must be even, `channels` too.
    """

    def __init__(self, in_channels: int, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, channels // 2, 1, stride=2, bias=False)
        self.second = nn.Conv2d(in_channels, channels // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x)
        return self.norm(torch.cat([self.first(h), self.second(h[:, :, 1:, 1:])], 1))


class SepConv(nn.Sequential):
    """A depthwise separable convolution, twice; the first has the stride."""

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__(
            DilConv(channels, kernel, stride, dilation=1), DilConv(channels, kernel, 1, dilation=1)
        )


class DilConv(nn.Sequential):
    """ReLU, a depthwise (dilated) convolution, a 1x1 convolution, BatchNorm."""

    def __init__(self, channels: int, kernel: int, stride: int, dilation: int = 2) -> None:
        super().__init__(
            nn.ReLU(),
            Depthwise(channels, kernel, stride, dilation),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )


class Noise(nn.Module):
    """N(0, 1) of the (strided) input's shape: fresh each call, in evaluation too, and blind to the input."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn_like(x[:, :, :: self.stride, :: self.stride])


def avg_pool(stride: int) -> nn.AvgPool2d:
    """3x3 average pooling over the positions that exist."""
    return nn.AvgPool2d(3, stride, 1, count_include_pad=False)


def max_pool(stride: int) -> nn.MaxPool2d:
    """3x3 max pooling."""
    return nn.MaxPool2d(3, stride, 1)


def skip(channels: int, stride: int) -> nn.Module:
    """The identity; at stride 2 a `FactorizedReduce`."""
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)


DARTS_OPS: dict[str, Callable[[int, int], nn.Module]] = {
    "max_pool_3x3": lambda channels, stride: max_pool(stride),
    "avg_pool_3x3": lambda channels, stride: avg_pool(stride),
    "skip_connect": skip,
    "sep_conv_3x3": lambda channels, stride: SepConv(channels, 3, stride),
    "sep_conv_5x5": lambda channels, stride: SepConv(channels, 5, stride),
    "dil_conv_3x3": lambda channels, stride: DilConv(channels, 3, stride),
    "dil_conv_5x5": lambda channels, stride: DilConv(channels, 5, stride),
    "noise": lambda channels, stride: Noise(stride),
}
"""(channels, stride) -> module, for found networks of normal and reduction cells."""

BENCH_201_OPS: dict[str, Callable[[int, int], nn.Module]] = {
    "skip_connect": skip,
    "nor_conv_1x1": lambda channels, stride: ReLUConvNorm(channels, channels, 1, stride),
    "nor_conv_3x3": lambda channels, stride: ReLUConvNorm(channels, channels, 3, stride),
    "avg_pool_3x3": lambda channels, stride: avg_pool(stride),
}
"""The same for NAS-Bench-201; its `none` is an edge that is not there."""

"""BatchNorm over the batch of all ranks, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab import distributed


class SyncedBatchNorm(nn.Module):
    """BatchNorm whose statistics are those of the whole batch on W ranks: outputs and gradients are exact.

    torch's SyncBatchNorm needs a GPU; heads and decoders need exactness on every device. On one process it is
    torch's BatchNorm.

    Args:
        channels: C.
        eps: added to the variance.
        momentum: of the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape; every rank holds B samples."""
        if not self.training or distributed.world_size() == 1:
            return F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
        standardised, mean, variance, count = standardise(x, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return standardised * self.weight.view(shape) + self.bias.view(shape)


def standardise(x: Tensor, eps: float, over_ranks: bool = True) -> tuple[Tensor, Tensor, Tensor, int]:
    """A batch (B, C, ...) with mean 0 and biased variance 1 in each channel.

    Args:
        x: the batch, at least float32 in what follows; every rank holds as many samples.
        eps: added to the variance.
        over_ranks: statistics of the batches of all ranks, not of this rank's alone.

    Returns:
        The standardised batch, the mean and the biased variance (C,), and how many values each is of.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    others = [dim for dim in range(x.ndim) if dim != 1]
    ranks = distributed.world_size() if over_ranks else 1
    count = ranks * x.numel() // x.shape[1]
    mean = _total(x, others, over_ranks) / count
    centred = x - mean
    variance = _total(centred.square(), others, over_ranks) / count
    return centred / (variance + eps).sqrt(), mean.flatten(), variance.flatten(), count


def _total(x: Tensor, dims: list[int], over_ranks: bool) -> Tensor:
    total = x.sum(dims, keepdim=True)
    return distributed.sum_with_grad(total) if over_ranks else total

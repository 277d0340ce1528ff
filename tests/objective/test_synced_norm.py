"""BatchNorm over ranks is torch's BatchNorm of the whole batch."""

import pytest
import torch
from conftest import on_ranks
from torch import nn

from mmnas_lab import distributed
from mmnas_lab.objective.synced_norm import SyncedBatchNorm


def passed(norm, x, upstream):
    """Output, gradients and buffers of two training passes, and the output in eval mode."""
    for value in norm.parameters():
        value.data.copy_(torch.linspace(0.5, 1.5, len(value)))
    x = x.clone().requires_grad_()
    norm(x.detach() + 1)
    y = norm(x)
    (y * upstream).sum().backward()
    evaluated = norm.eval()(x.detach()).detach()
    return (
        y.detach(),
        x.grad,
        norm.weight.grad,
        norm.bias.grad,
        norm.running_mean,
        norm.running_var,
        evaluated,
    )


def synced(x, upstream):
    rows = slice(distributed.rank(), None, distributed.world_size())
    return passed(SyncedBatchNorm(x.shape[1]), x[rows], upstream[rows])


@pytest.mark.ddp
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 2, 5)])
def test_it_is_batch_norm_of_the_whole_batch(shape, generator):
    x, upstream = torch.randn(2, *shape, generator=generator)
    reference = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    expected = passed(reference(shape[1]), x, upstream)
    for one, other in zip(synced(x, upstream), expected, strict=True):
        torch.testing.assert_close(one, other)
    first, second = on_ranks(synced, x, upstream)
    for k in (0, 1, 6):  # rows of the batch
        for rank, its in enumerate((first, second)):
            torch.testing.assert_close(its[k], expected[k][rank::2], rtol=1e-5, atol=1e-6)
    for k in (2, 3):  # gradients of the parameters: each rank has its rows' part
        torch.testing.assert_close(first[k] + second[k], expected[k], rtol=1e-5, atol=1e-5)
    for k in (4, 5):
        torch.testing.assert_close(first[k], expected[k], rtol=1e-5, atol=1e-6)
        assert torch.equal(first[k], second[k])

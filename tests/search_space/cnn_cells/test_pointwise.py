"""A grouped 1x1 convolution with its BatchNorm and ReLU is torch's three, compiled or not."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from mmnas_lab.search_space.cnn_cells import pointwise
from mmnas_lab.search_space.cnn_cells.pointwise import WIDTHS, PointwiseNorm, pointwise_norm

SOURCE = Path(pointwise.__file__).with_name("pointwise.c")
pytestmark = pytest.mark.skipif(
    pointwise.library(SOURCE, "-DREAL=float -DCHANNELS=16") is None,
    reason="needs a C compiler: cc, gcc, clang or $CC",
)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def close(actual, expected, dtype):
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1e-3))


def inputs(groups, channels, size, dtype, generator):
    """x, weight, scale and what a sum begins with."""
    shape = (size[0], groups * channels, *size[1:])
    x, total = (
        torch.randn(shape, generator=generator, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight = torch.randn(groups * channels, channels, 1, 1, generator=generator, dtype=dtype)
    scale = torch.rand(groups * channels, generator=generator, dtype=dtype)
    return [each.requires_grad_() for each in (x, weight, scale, total)]


def by_torch(x, weight, norm, scale, relu, groups):
    """Line by line, with torch's own running statistics."""
    out = norm(F.conv2d(x, weight, groups=groups))
    out = out if scale is None else out * scale[:, None, None]
    return torch.relu(out) if relu else out


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("relu", "scaled", "adds"), [(True, False, False), (False, True, False), (False, True, True)]
)
@pytest.mark.parametrize("size", [(2, 3, 5), (3, 11, 13)])  # rows that fill no block, and several
@pytest.mark.parametrize("channels", WIDTHS)
def test_it_is_what_torch_computes(channels, size, relu, scaled, adds, dtype, generator):
    groups = 3
    x, weight, scale, start = inputs(groups, channels, size, dtype, generator)
    scale = scale if scaled else None
    mine, theirs = (nn.BatchNorm2d(groups * channels, affine=False).to(dtype) for _ in range(2))
    expected = by_torch(x, weight, theirs, scale, relu, groups) + (start if adds else 0)
    actual = pointwise_norm(x, weight, mine, scale, relu, groups, start * 1 if adds else None)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    close(actual, expected, dtype)
    wanted = [x, weight, *([scale] if scaled else []), *([start] if adds else [])]
    direction = torch.randn(expected.shape, generator=generator, dtype=dtype)
    direction = direction * ((expected.detach() == 0) == (actual.detach() == 0))  # the bend of the ReLU
    for ours, other in zip(
        torch.autograd.grad(actual, wanted, direction),
        torch.autograd.grad(expected, wanted, direction),
        strict=True,
    ):
        close(ours, other, dtype)
    close(mine.running_mean, theirs.running_mean, dtype)
    close(mine.running_var, theirs.running_var, dtype)
    assert mine.num_batches_tracked == 1


@pytest.mark.parametrize("relu", [False, True])
def test_it_can_be_differentiated_twice(relu, generator):
    x, weight, scale, start = inputs(2, 8, (2, 2, 2), torch.float64, generator)
    norm = nn.BatchNorm2d(16, affine=False)

    def run(x, weight, scale, start):
        return pointwise_norm(x, weight, norm.double(), scale, relu, 2, start * 1)

    assert gradcheck(run, (x, weight, scale, start), fast_mode=True)
    assert gradgradcheck(run, (x, weight, scale, start), fast_mode=True)


def test_a_weight_used_twice_has_the_same_gradient_with_a_graph_of_its_own(generator):
    x, weight, scale, _ = inputs(2, 8, (2, 3, 3), torch.float64, generator)
    norm = nn.BatchNorm2d(16, affine=False).double()
    once = pointwise_norm(x, weight, norm, scale, True, 2)
    loss = pointwise_norm(once, weight, norm, scale, False, 2).relu().square().sum()
    plainly, twice = (
        torch.autograd.grad(loss, (x, weight, scale), create_graph=graph, retain_graph=True)
        for graph in (False, True)
    )
    for mine, theirs in zip(twice, plainly, strict=True):
        close(mine, theirs, torch.float64)


def test_another_type_is_refused_by_torch(generator):
    x, weight, scale, _ = inputs(2, 16, (2, 4, 4), torch.float32, generator)
    with pytest.raises(RuntimeError):
        pointwise_norm(x, weight, nn.BatchNorm2d(32, affine=False), scale.double(), False, 2)


def test_what_is_held_gets_no_gradient(generator):
    x, weight, scale, _ = inputs(2, 16, (2, 4, 4), torch.float32, generator)
    norm = nn.BatchNorm2d(32, affine=False)
    (only,) = torch.autograd.grad(
        pointwise_norm(x.detach(), weight.detach(), norm, scale, False, 2).square().sum(), scale
    )
    every = torch.autograd.grad(
        pointwise_norm(x, weight, norm, scale, False, 2).square().sum(), (x, weight, scale)
    )
    torch.testing.assert_close(only, every[2])


def test_other_widths_layouts_and_evaluation_are_left_to_torch(monkeypatch, generator):
    monkeypatch.setattr(PointwiseNorm, "forward", lambda *arguments: pytest.fail("compiled code was used"))
    x, weight, scale, _ = inputs(2, 16, (2, 4, 4), torch.float32, generator)
    norm = nn.BatchNorm2d(32, affine=False)
    plain = x.detach().contiguous()
    twin = copy.deepcopy(norm)
    torch.testing.assert_close(
        pointwise_norm(plain, weight, norm, scale, False, 2), by_torch(plain, weight, twin, scale, False, 2)
    )
    pointwise_norm(x, weight, norm.eval(), scale, True, 2)
    x, weight, scale, start = inputs(2, 6, (2, 4, 4), torch.float32, generator)
    pointwise_norm(x, weight, nn.BatchNorm2d(12, affine=False), scale, False, 2, start * 1)


def test_nan_stays(generator):
    x, weight, scale, _ = inputs(2, 16, (2, 4, 4), torch.float32, generator)
    x = x.detach().clone(memory_format=torch.preserve_format)
    x[1, 20, 2, 1] = torch.nan
    out = pointwise_norm(x, weight, nn.BatchNorm2d(32, affine=False), scale, True, 2)
    assert out[:, 16:].isnan().all()
    assert not out[:, :16].isnan().any()

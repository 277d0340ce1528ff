"""Our gradients of depthwise convolutions are torch's, and each is computed only where it is needed."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from mmnas_lab.search_space.cnn_cells import depthwise as depthwise_module
from mmnas_lab.search_space.cnn_cells.depthwise import depthwise

SOURCE = Path(depthwise_module.__file__).with_name("depthwise.c")
KERNELS = [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)]


@pytest.fixture(params=["compiled", "pieces"])
def form(request, monkeypatch):
    """How the gradient by the kernel is computed where there is a choice."""
    if request.param == "pieces":
        monkeypatch.setattr(depthwise_module, "library", lambda *arguments: None)
    elif depthwise_module.library(SOURCE, "-DREAL=float") is None:
        pytest.skip("needs a C compiler: cc, gcc, clang or $CC")
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "dilation"), KERNELS)
@pytest.mark.parametrize("shape", [(3, 16, 8, 6), (1, 16, 2, 4), (2, 16, 5, 3), (5, 37, 9, 7)])
@pytest.mark.usefixtures("form")
def test_gradients_are_those_of_torch(shape, size, dilation, stride, layout, dtype, tolerance, generator):
    x = torch.randn(shape, generator=generator, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(shape[1], 1, size, size, generator=generator, dtype=dtype)
    x.requires_grad_()
    weight.requires_grad_()
    ours = depthwise(x, weight, stride, dilation)
    plain = F.conv2d(x, weight, None, stride, dilation * (size // 2), dilation, groups=shape[1])
    direction = torch.randn(plain.shape, generator=generator, dtype=dtype)
    torch.testing.assert_close(ours, plain, rtol=0, atol=tolerance * float(plain.detach().abs().max()))
    for mine, theirs in zip(
        torch.autograd.grad(ours, (x, weight), direction),
        torch.autograd.grad(plain, (x, weight), direction),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "dilation"), KERNELS)
def test_it_can_be_differentiated_twice(size, dilation, stride, generator):
    x = torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, size, size, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *tensors: depthwise(*tensors, stride, dilation), (x, weight))
    assert gradgradcheck(lambda *tensors: depthwise(*tensors, stride, dilation), (x, weight))


def test_the_gradient_of_a_held_kernel_is_not_computed(monkeypatch, generator):
    calls = []
    real = depthwise_module.kernel_gradient
    monkeypatch.setattr(depthwise_module, "kernel_gradient", lambda *a: calls.append(a) or real(*a))
    x = torch.randn(2, 4, 6, 6, generator=generator, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, generator=generator, requires_grad=True)
    torch.autograd.grad(depthwise(x, weight.detach(), 1, 1).sum(), x)
    assert not calls
    depthwise(x, weight, 1, 1).sum().backward()
    assert len(calls) == 1
    assert weight.grad is not None


@pytest.mark.parametrize("stride", [1, 2])
def test_threads_change_nothing(stride, generator):
    x = torch.randn(4, 130, 12, 12, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(130, 1, 5, 5, generator=generator, requires_grad=True)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(depthwise(x, weight, stride, 2).square().sum(), weight)[0])
    torch.set_num_threads(before)
    assert all(torch.allclose(each, found[0], rtol=1e-5, atol=1e-3) for each in found)

"""Several weighted sums of the same tensors are what torch's products give, compiled or not."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mmnas_lab.search_space.cnn_cells import mixtures as module
from mmnas_lab.search_space.cnn_cells.mixtures import Mixtures, mixtures

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def draw(generator, *shape, dtype=torch.float64):
    x = torch.randn(shape, generator=generator, dtype=dtype)
    return (x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x).requires_grad_()


def by_torch(weights, terms, plus):
    """Term by term."""
    sums = [sum(w * x for w, x in zip(row, terms, strict=True)) for row in weights]
    return sums if plus is None else [s + p for s, p in zip(sums, plus.chunk(len(sums), 1), strict=True)]


@pytest.fixture(params=["compiled", "torch"])
def form(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "library", lambda *arguments: None)
    elif module._compiled_for(torch.zeros(1, 1), []) is None:
        pytest.skip("needs a C compiler: cc, gcc, clang or $CC")


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (3, 16, 9, 11), (1, 700, 3, 2)])
@pytest.mark.parametrize(("sums", "terms"), [(1, 1), (5, 3)])
def test_sums_and_gradients_are_those_of_torch(sums, terms, shape, adds, dtype, threads, generator):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    weights = draw(generator, sums, terms, dtype=dtype)
    tensors = [draw(generator, *shape, dtype=dtype) for _ in range(terms)]
    plus = draw(generator, shape[0], sums * shape[1], *shape[2:], dtype=dtype) if adds else None
    actual, expected = mixtures(weights, tensors, plus), by_torch(weights, tensors, plus)
    directions = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(sums)]
    wanted = [weights, *tensors, *([plus] if adds else [])]
    pairs = [
        *zip(actual, expected, strict=True),
        *zip(
            torch.autograd.grad(actual, wanted, directions),
            torch.autograd.grad(expected, wanted, directions),
            strict=True,
        ),
    ]
    torch.set_num_threads(before)
    for mine, theirs in pairs:
        size = float(theirs.detach().abs().max())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE[dtype] * max(size, 1))


@pytest.mark.usefixtures("form")
def test_they_can_be_differentiated_twice(generator):
    weights, plus = draw(generator, 2, 3), draw(generator, 2, 4, 2, 2)
    terms = [draw(generator, 2, 2, 2, 2) for _ in range(3)]
    run = lambda weights, plus, *terms: tuple(mixtures(weights, terms, plus))  # noqa: E731
    assert gradcheck(run, (weights, plus, *terms))
    assert gradgradcheck(run, (weights, plus, *terms))


@pytest.mark.usefixtures("form")
def test_what_is_held_gets_no_gradient(generator):
    weights, plus = draw(generator, 2, 2), draw(generator, 2, 4, 2, 2)
    terms = [draw(generator, 2, 2, 2, 2) for _ in range(2)]
    every = torch.autograd.grad(
        sum(x.square().sum() for x in mixtures(weights, terms, plus)), (weights, plus, *terms)
    )
    held = mixtures(weights.detach(), [terms[0], terms[1].detach()], plus.detach())
    (only,) = torch.autograd.grad(sum(x.square().sum() for x in held), terms[0])
    torch.testing.assert_close(only, every[2])
    held = mixtures(weights, [term.detach() for term in terms], plus.detach())
    (only,) = torch.autograd.grad(sum(x.square().sum() for x in held), weights)
    torch.testing.assert_close(only, every[0])


def test_other_layouts_are_left_to_torch(monkeypatch, generator):
    monkeypatch.setattr(Mixtures, "forward", lambda *arguments: pytest.fail("compiled code was used"))
    terms = [torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2)]
    weights = torch.rand(2, 2, generator=generator)
    for mine, theirs in zip(mixtures(weights, terms), by_torch(weights, terms, None), strict=True):
        torch.testing.assert_close(mine, theirs)

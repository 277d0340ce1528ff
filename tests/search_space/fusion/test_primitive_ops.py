"""Sizes, shapes and gradients of the candidate operations, and the dropout that is cheap on a CPU."""

import pytest
import torch
from torch import nn

from mmnas_lab.search_space.fusion.primitive_ops import Attention, BatchNorm, Dropout, op_names, step_ops

B, L, C = 3, 4, 5
EVERY_OP = [(protocol, name) for protocol in ("released_code", "paper") for name in op_names(protocol)]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("channels", "length", "counts"),
    [(192, 16, (0, 6144, 148_608, 74_304)), (128, 8, (0, 2048, 66_304, 33_152))],
)
def test_released_ops_have_the_published_sizes(channels, length, counts):
    ops = step_ops("released_code", channels, length, 0.1, 0.1)
    assert tuple(parameters(make()) for make in ops.values()) == counts


@pytest.mark.parametrize(("channels", "length"), [(192, 16), (7, 4)])
def test_paper_ops_have_the_sizes_of_its_equations(channels, length):
    ops = step_ops("paper", channels, length, 0.1, 0.1)
    sizes = {name: parameters(make()) for name, make in ops.items()}
    assert sizes == {
        "zero": 0,
        "sum": 0,
        "attention": 0,
        "linear_glu": 2 * channels**2,
        "concat_fc": 2 * channels**2 + channels,
    }


@pytest.mark.parametrize(("protocol", "name"), EVERY_OP)
def test_every_op_keeps_the_shape_and_weighs_its_result(protocol, name, generator):
    op = step_ops(protocol, C, L, 0.0, 0.0)[name]().double()
    x, y = (torch.randn(B, L, C, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    out = op(x, y)
    assert out.shape == (B, L, C)
    if name != "zero":
        out.square().sum().backward()
        assert x.grad.isfinite().all()
        assert y.grad.isfinite().all()
    weight = torch.tensor(0.3, dtype=torch.float64)
    for first, second in ((x, y), (x, x)):
        expected = weight * op(first, second)
        if hasattr(op, "of_joined"):
            actual = op.of_joined(first if first is second else torch.cat([first, second], -1), weight)
        else:
            actual = op.weighted(first, second, weight)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_attention_asks_with_x(generator):
    x, y = torch.randn(2, B, L, C, generator=generator)
    op = Attention(C, L, 0.0, norm=False)
    expected = nn.functional.scaled_dot_product_attention(x, y, y)
    torch.testing.assert_close(op(x, y), expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_is_over_samples_and_positions(generator):
    x = torch.randn(B, L, C, generator=generator)
    torch.testing.assert_close(BatchNorm(C)(x), nn.BatchNorm1d(C)(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_the_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(40_001, requires_grad=True)  # no multiple of the entries of one draw
    out = Dropout(p)(x)
    assert float((out == 0).float().mean()) == pytest.approx(p, abs=0.01)
    assert set(out.tolist()) == {0.0, out.max().item()}
    assert out.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    neighbours = (out[:-1] == 0) & (out[1:] == 0)
    assert float(neighbours.float().mean()) == pytest.approx(p * p, abs=0.01)


def test_dropout_is_a_function_of_the_seed_and_absent_where_it_should_be():
    x = torch.ones(B, L, C)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(Dropout(0.5)(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].shape == x.shape
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(1.0)(x).eq(0).all()

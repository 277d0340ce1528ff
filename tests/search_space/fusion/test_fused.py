"""The compiled passes give what torch gives: values, gradients, second gradients, running statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from mmnas_lab.search_space.fusion import fused
from mmnas_lab.search_space.fusion.fused import (
    Projection,
    Scores,
    compiled_for,
    drop,
    plain,
    project,
    relu_transposed,
    weighted_sum,
)
from mmnas_lab.search_space.fusion.primitive_ops import Attention

pytestmark = pytest.mark.skipif(
    compiled_for(torch.zeros(1)) is None, reason="needs a C compiler: cc, gcc, clang or $CC"
)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
SIZES = [(9, 1, 3, 4), (5, 3, 7, 6), (24, 16, 10, 64), (3, 70, 5, 130)]  # B, L, C_in, C_out


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def close(actual, expected, dtype):
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * max(scale, 1e-3))


def random_projection(inputs, outputs, dtype, generator):
    norm = nn.BatchNorm1d(outputs).to(dtype)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(outputs, generator=generator))
    matrix = torch.randn(outputs, inputs, generator=generator, dtype=dtype).requires_grad_()
    return Projection(matrix, torch.randn(outputs, generator=generator, dtype=dtype).requires_grad_(), norm)


def by_torch(inputs, projections, length, activation, p, scale):
    """`project` line by line."""
    outs = []
    for x, each in zip(inputs, projections, strict=True):
        rows = F.linear(x, each.matrix, each.bias).expand(-1, length, -1).flatten(0, 1)
        factor = 1 if scale is None else scale
        outs.append(plain(rows, each.norm, each.norm.weight * factor, each.norm.bias * factor, activation, p))
    return torch.stack(outs).view(len(inputs), len(inputs[0]), length, -1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", ["relu", "glu"])
@pytest.mark.parametrize("size", SIZES)
def test_projections_are_those_of_torch(size, activation, scaled, dtype, generator):
    batch, length, channels, outputs = size

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    inputs = [draw(batch, length, channels), draw(batch, 1, channels)]
    ours = [random_projection(channels, outputs, dtype, generator) for _ in inputs]
    theirs = [Projection(each.matrix, each.bias, copy.deepcopy(each.norm)) for each in ours]
    scale = torch.rand(outputs, generator=generator, dtype=dtype).requires_grad_() if scaled else None
    actual = project(inputs, ours, length, activation, 0.0, scale)
    expected = by_torch(inputs, theirs, length, activation, 0.0, scale)
    close(actual, expected, dtype)

    def gradients(out, projections, direction):
        wanted = [*inputs, *([scale] if scaled else [])]
        for each in projections:
            wanted += [each.matrix, each.norm.weight, each.norm.bias]
        return torch.autograd.grad(out, wanted, direction, retain_graph=True)

    direction = torch.randn(actual.shape, generator=generator, dtype=dtype)
    # Away from the bend of the ReLU, where rounding decides.
    direction = direction * ((expected.detach() == 0) == (actual.detach() == 0))
    for mine, other in zip(
        gradients(actual, ours, direction), gradients(expected, theirs, direction), strict=True
    ):
        close(mine, other, dtype)
    for each, other in zip(ours, theirs, strict=True):
        (bias_gradient,) = torch.autograd.grad(actual, each.bias, direction, retain_graph=True)
        assert bias_gradient.eq(0).all()  # batch statistics take the bias away
        close(each.norm.running_mean, other.norm.running_mean, dtype)
        close(each.norm.running_var, other.norm.running_var, dtype)
        assert each.norm.num_batches_tracked == other.norm.num_batches_tracked == 1


def test_statistics_keep_their_digits_far_from_zero(generator):
    x = 1000 + torch.randn(512, 4, 8, generator=generator)
    projection = Projection(torch.eye(8), torch.zeros(8), nn.BatchNorm1d(8))
    actual = project([x], [projection], 4, "relu", 0.0)[0]
    expected = F.batch_norm(x.double().flatten(0, 1), None, None, training=True).relu().view(512, 4, 8)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-4)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("activation", ["relu", "glu"])
def test_dropout_hides_the_same_entries_from_result_and_gradient(activation, generator):
    x = torch.randn(40, 16, 9, generator=generator, dtype=torch.float64).requires_grad_()
    mine = random_projection(9, 32, torch.float64, generator)
    theirs = Projection(mine.matrix, mine.bias, copy.deepcopy(mine.norm))
    torch.manual_seed(3)
    actual = project([x], [mine], 16, activation, 0.3)[0]
    torch.manual_seed(3)
    mask = drop(torch.ones(640, actual.shape[-1], dtype=torch.float64), 0.3, training=True)
    expected = by_torch([x], [theirs], 16, activation, 0.0, None)[0] * mask.view(actual.shape)
    close(actual, expected, torch.float64)
    direction = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
    for mine_, other in zip(
        torch.autograd.grad(actual, (x, mine.matrix, mine.norm.weight), direction),
        torch.autograd.grad(expected, (x, mine.matrix, theirs.norm.weight), direction),
        strict=True,
    ):
        close(mine_, other, torch.float64)


@pytest.mark.parametrize("activation", ["relu", "glu"])
def test_projections_can_be_differentiated_twice(activation, generator):
    x = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    each = random_projection(3, 4, torch.float64, generator)

    def run(*tensors):
        torch.manual_seed(0)
        x, matrix, weight, scale = tensors
        each.norm.weight = None
        del each.norm.weight
        each.norm.weight = weight
        return project([x], [Projection(matrix, each.bias, each.norm)], 2, activation, 0.3, scale)

    weight = each.norm.weight.detach().clone().requires_grad_()
    scale = torch.rand(4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (x, each.matrix, weight, scale))
    assert gradgradcheck(run, (x, each.matrix, weight, scale))


def first_order(loss, tensors, twice):
    return torch.autograd.grad(loss, tensors, create_graph=twice, retain_graph=True)


def test_what_is_used_twice_or_held_has_the_same_gradient_with_a_graph_of_its_own(generator):
    x = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    each = random_projection(4, 4, torch.float64, generator)
    held = Projection(
        each.matrix.detach(), each.bias.detach(), copy.deepcopy(each.norm).requires_grad_(False)
    )
    once = project([x], [each], 3, "relu", 0.0)[0]
    again = project([once, x], [each, held], 3, "glu", 0.0).square().sum()
    wanted = (each.matrix, each.norm.weight)
    for plainly, twice in zip(
        first_order(again, wanted, False), first_order(again, wanted, True), strict=True
    ):
        close(twice, plainly, torch.float64)


def test_a_norm_in_evaluation_keeps_its_statistics(generator):
    x = torch.randn(5, 3, 4, generator=generator)
    pair = [random_projection(4, 6, torch.float32, generator) for _ in range(2)]
    pair[1].norm.eval()
    before = pair[1].norm.running_mean.clone()
    out = project([x, x], pair, 3, "relu", 0.0)
    assert torch.equal(pair[1].norm.running_mean, before)
    rows = F.linear(x, pair[1].matrix, pair[1].bias).flatten(0, 1)
    torch.testing.assert_close(out[1], F.relu(pair[1].norm(rows)).view(5, 3, 6))


def test_attention_can_be_trained_in_mixed_precision(generator):
    attention = Attention(8, 4, 0.1, norm=True)
    x, y = (torch.randn(2, 4, 8, generator=generator).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x, y)
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert x.grad.isfinite().all()


def test_evaluation_uses_running_statistics_and_drops_nothing(generator):
    each = random_projection(6, 8, torch.float32, generator)
    each.norm.eval()
    x = torch.randn(4, 3, 6, generator=generator)
    expected = F.relu(each.norm(F.linear(x, each.matrix, each.bias).flatten(0, 1))).view(4, 3, 8)
    torch.testing.assert_close(project([x], [each], 3, "relu", 0.5)[0], expected)


@pytest.mark.parametrize("activation", ["relu", "glu"])
def test_nan_stays(activation, generator):
    each = random_projection(3, 4, torch.float32, generator)
    x = torch.randn(5, 2, 3, generator=generator)
    x[1, 1, 2] = torch.nan
    assert project([x], [each], 2, activation, 0.0).isnan().all()
    assert relu_transposed(x).isnan().sum() == 1
    assert weighted_sum(torch.ones(1), [x]).isnan().sum() == 1


@pytest.mark.usefixtures("threads")
def test_dropped_entries_are_independent(generator):
    torch.manual_seed(1)
    p, rows, columns = 0.2, 2000, 200
    first, second = (drop(torch.ones(rows, columns), p, training=True) == 0 for _ in range(2))

    def share(x):
        return float(x.float().mean())

    error = 5 * (p * (1 - p) / (rows * columns)) ** 0.5
    assert share(first) == pytest.approx(p, abs=error)
    for shift in (1, 2, 16, 64):
        assert share(first[shift:] & first[:-shift]) == pytest.approx(p * p, abs=error)
        assert share(first[:, shift:] & first[:, :-shift]) == pytest.approx(p * p, abs=error)
        assert share(first[shift:, shift:] & first[:-shift, :-shift]) == pytest.approx(p * p, abs=error)
    assert share(first & second) == pytest.approx(p * p, abs=error)
    for each, size in ((first.float().mean(0), rows), (first.float().mean(1), columns)):
        deviation = (p * (1 - p) / size) ** 0.5
        assert float(each.std()) == pytest.approx(deviation, rel=0.2)


def test_the_number_of_threads_changes_no_dropped_entry():
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        found.append(drop(torch.ones(97, 301), 0.4, training=True))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("count", "plus"), [(1, 0), (1, 3), (3, 1), (6, 0)])
def test_weighted_sums_are_those_of_torch(count, plus, dtype, generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    weights, tensors = draw(count), [draw(7, 31, 123) for _ in range(count + plus)]
    tensors[0] = draw(7, 123, 31).transpose(1, 2)
    actual = weighted_sum(weights, tensors[:count], tensors[count:])
    expected = sum(w * x for w, x in zip(weights, tensors[:count], strict=True)) + sum(tensors[count:])
    close(actual, expected, dtype)
    direction = torch.randn(actual.shape, generator=generator, dtype=dtype)
    for mine, theirs in zip(
        torch.autograd.grad(actual, (weights, *tensors), direction),
        torch.autograd.grad(expected, (weights, *tensors), direction),
        strict=True,
    ):
        close(mine, theirs, dtype)


def test_the_other_passes_can_be_differentiated_twice(generator):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    def weighted(weights, x, y, z):
        return weighted_sum(weights, [x, y], [z])

    x, y, z = draw(2, 3, 4), draw(2, 3, 4), draw(2, 3, 4)
    for function, inputs in (
        (weighted, (draw(2), x, y, z)),
        (relu_transposed, (x,)),
        (Scores.apply, (x, y)),
        (lambda x: Scores.apply(x, x), (x,)),
    ):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (64, 16, 48)])
def test_transposed_relu_is_that_of_torch(shape, generator):
    x = torch.randn(shape, generator=generator).requires_grad_()
    actual, expected = relu_transposed(x), torch.relu(x).transpose(1, 2)
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)
    direction = torch.randn(actual.shape, generator=generator)
    mine, theirs = (torch.autograd.grad(out, x, direction)[0] for out in (actual, expected))
    assert torch.equal(mine, theirs)


def test_without_a_compiler_torch_computes_the_same(monkeypatch, generator):
    x = torch.randn(6, 3, 5, generator=generator)
    each = random_projection(5, 8, torch.float32, generator)
    tensors = torch.randn(3, 6, 3, 5, generator=generator).unbind()
    weights = torch.rand(2, generator=generator)

    def results():
        return (
            project([x], [each], 3, "glu", 0.0),
            weighted_sum(weights, tensors[:2], tensors[2:]),
            relu_transposed(x),
        )

    compiled = results()
    monkeypatch.setattr(fused, "compiled_for", lambda *tensors: None)
    for mine, theirs in zip(compiled, results(), strict=True):
        torch.testing.assert_close(mine, theirs)
    dropped = drop(torch.ones(100, 100), 0.3, training=True)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.03)


def test_other_types_are_left_to_torch():
    assert compiled_for(torch.zeros(3)) is not None
    assert compiled_for(torch.zeros(3, dtype=torch.bfloat16)) is None
    assert compiled_for(torch.zeros(3), torch.zeros(3, dtype=torch.float64)) is None
    assert compiled_for(torch.zeros(3), torch.zeros(3, device="meta")) is None
    broadcast = weighted_sum(torch.ones(2), [torch.ones(4, 3), torch.ones(1, 3)])
    assert torch.equal(broadcast, torch.full((4, 3), 2.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled_for(torch.zeros(3)) is None

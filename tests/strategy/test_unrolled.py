"""The second-order architecture gradient against literal implementations, and the searches that use it."""

from copy import deepcopy

import pytest
import torch
from conftest import INFOS, TinySource
from fits import CLASSES, SPACE, Stopped, problem, runtime, same_state, states, stop_at_step

from mmnas_lab.loader import draw_clean
from mmnas_lab.objective.base import Scored
from mmnas_lab.objective.supervised import Supervised
from mmnas_lab.strategy.gradient_search import Bilevel, SingleLevel
from mmnas_lab.strategy.search_module import SingleLevelModule
from mmnas_lab.strategy.unrolled import RADIUS, VirtualStep, unrolled_gradient
from mmnas_lab.types import Batch, InputError

RATE, MOMENTUM, DECAY = 0.05, 0.9, 3e-4


def tiny(seed=0):
    """A hypernet without dropout and its batches, in float64."""
    torch.manual_seed(seed)
    space = type(SPACE)(num_cells=2, num_steps=1, channels=3, length=4, dropout=0.0, attention_dropout=0.0)
    network = space.hypernet(INFOS)
    with torch.no_grad():
        for logits in network.arch.values():
            logits.normal_()
    scored = Scored(
        network, Supervised(network.info.embedding, "multilabel", CLASSES, torch.zeros(3))
    ).double()
    batches = []
    for k in range(2):
        batch = draw_clean(TinySource(6, seed=k), torch.arange(6), torch.Generator())
        views = tuple({name: x.double() for name, x in view.items()} for view in batch.views)
        batches.append(Batch(views, batch.labels))
    return scored, batches[0], batches[1]


def parts(scored):
    arch = {id(p) for p in scored.network.arch.values()}
    weights = {name: p for name, p in scored.named_parameters() if id(p) not in arch}
    return weights, list(scored.network.arch.values())


def step_of(weights, with_buffers):
    generator = torch.Generator().manual_seed(3)
    buffers = {
        name: 0.1 * torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in weights.items()
    }
    return VirtualStep(RATE, MOMENTUM, DECAY, buffers if with_buffers else {})


def loss_after_the_step(scored, logits, arch_batch, weight_batch, step):
    """L_val(w'(alpha), alpha) by a copy whose weights are written to."""
    copy = deepcopy(scored)
    weights, arch = parts(copy)
    with torch.no_grad():
        for own, value in zip(arch, logits, strict=True):
            own.copy_(value)
    gradients = torch.autograd.grad(copy(weight_batch).total, list(weights.values()), allow_unused=True)
    with torch.no_grad():
        for (name, w), gradient in zip(weights.items(), gradients, strict=True):
            direction = (0 if gradient is None else gradient) + DECAY * w
            if name in step.buffers:
                direction = direction + MOMENTUM * step.buffers[name]
            w -= RATE * direction
    return copy(arch_batch, "arch").total


@pytest.mark.parametrize("with_buffers", [False, True])
def test_the_exact_gradient_is_the_derivative_of_the_loss_after_the_step(with_buffers):
    scored, arch_batch, weight_batch = tiny()
    weights, arch = parts(scored)
    step = step_of(weights, with_buffers)
    gradients, losses = unrolled_gradient(
        scored, weights, arch, arch_batch, weight_batch, step, "second_exact"
    )
    at = [logits.detach().clone() for logits in arch]
    expected_loss = loss_after_the_step(scored, at, arch_batch, weight_batch, step)
    torch.testing.assert_close(losses.total, expected_loss, rtol=1e-10, atol=1e-12)
    for which, gradient in enumerate(gradients):
        for entry in range(gradient.numel()):
            values = []
            for sign in (1, -1):
                moved = [logits.clone() for logits in at]
                moved[which].view(-1)[entry] += sign * 1e-6
                loss = loss_after_the_step(scored, moved, arch_batch, weight_batch, step)
                values.append(float(loss.detach()))
            numeric = (values[0] - values[1]) / 2e-6
            assert float(gradient.flatten()[entry]) == pytest.approx(numeric, abs=2e-7)


def released(scored, arch_batch, weight_batch, step):
    """DARTS section 2.3 step by step, on copies whose weights are written to."""
    moved = deepcopy(scored)
    weights, _ = parts(moved)
    gradients = torch.autograd.grad(moved(weight_batch).total, list(weights.values()), allow_unused=True)
    with torch.no_grad():
        for (name, w), gradient in zip(weights.items(), gradients, strict=True):
            direction = (0 if gradient is None else gradient) + DECAY * w + MOMENTUM * step.buffers[name]
            w -= RATE * direction
    weights, arch = parts(moved)
    found = torch.autograd.grad(
        moved(arch_batch, "arch").total, [*arch, *weights.values()], allow_unused=True
    )
    direct = [torch.zeros_like(a) if g is None else g for g, a in zip(found, arch, strict=False)]
    v = [
        torch.zeros_like(w) if g is None else g
        for g, w in zip(found[len(arch) :], weights.values(), strict=True)
    ]
    epsilon = RADIUS / torch.cat([one.flatten() for one in v]).norm()
    sides = []
    for sign in (1, -1):
        copy = deepcopy(scored)
        weights, arch = parts(copy)
        with torch.no_grad():
            for w, one in zip(weights.values(), v, strict=True):
                w += sign * epsilon * one
        sides.append(torch.autograd.grad(copy(weight_batch).total, arch))
    return [d - RATE * (p - m) / (2 * epsilon) for d, p, m in zip(direct, *sides, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_the_released_gradient_is_the_papers_finite_difference(seed):
    scored, arch_batch, weight_batch = tiny(seed)
    weights, arch = parts(scored)
    step = step_of(weights, with_buffers=True)
    before = {name: value.clone() for name, value in scored.state_dict().items()}
    gradients, _ = unrolled_gradient(scored, weights, arch, arch_batch, weight_batch, step, "second_released")
    for found, expected in zip(gradients, released(scored, arch_batch, weight_batch, step), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for name, value in scored.state_dict().items():  # weights and BatchNorm buffers stay
        assert torch.equal(value, before[name]), name


def test_dropout_is_the_same_in_all_evaluations_of_a_step():
    """With dropout the finite difference is still small: it compares the same sub-network with itself."""
    scored, arch_batch, weight_batch = tiny()
    for module in scored.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    weights, arch = parts(scored)
    step = step_of(weights, with_buffers=False)
    found = []
    for order in ("second_released", "second_exact"):
        torch.manual_seed(0)
        gradients, _ = unrolled_gradient(scored, weights, arch, arch_batch, weight_batch, step, order)
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert (found[0] - found[1]).norm() < 0.5 * found[1].norm()


def test_the_virtual_step_is_the_one_that_sgd_makes():
    scored, _, weight_batch = tiny()
    weights, _ = parts(scored)
    optimizer = torch.optim.SGD(weights.values(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    for _ in range(2):
        names = {w: name for name, w in weights.items()}
        optimizer.zero_grad()
        scored(weight_batch).total.backward()
        gradients = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
        moved = VirtualStep.of(optimizer, names).moved(weights, gradients)
        optimizer.step()
        for name, w in weights.items():
            if w.grad is not None:
                torch.testing.assert_close(moved[name], w.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", ["second_released", "second_exact"])
def test_a_second_order_search_differs_from_first_order_and_repeats(tmp_path, order):
    found = []
    for name, kind in (("a", order), ("b", order), ("c", "first")):
        (tmp_path / name).mkdir()
        with states(SingleLevelModule.__base__) as seen:
            Bilevel(order=kind).search(problem(runtime(), supervised=True), tmp_path / name)
        found.append(seen[-1])
    assert same_state(found[0], found[1])
    assert not torch.equal(found[0]["network.arch.alpha"], found[2]["network.arch.alpha"])


def test_the_order_of_the_half_steps_matters(tmp_path):
    found = []
    for half_steps in ("arch_first", "weights_first"):
        (tmp_path / half_steps).mkdir()
        with states(SingleLevelModule.__base__) as seen:
            Bilevel(half_steps=half_steps).search(problem(runtime()), tmp_path / half_steps)
        found.append(seen[-1])
    assert not same_state(*found)


def test_single_level_reads_all_samples_and_goes_on_after_a_stop(tmp_path):
    found = []
    for name, stop in (("whole", None), ("stopped", 4)):
        folder = tmp_path / name
        folder.mkdir()
        with states(SingleLevelModule) as seen:
            if stop:
                with pytest.raises(Stopped):
                    SingleLevel().search(problem(runtime(**stop_at_step(stop))), folder)
            given = problem(runtime())
            SingleLevel().search(given, folder)
        found.append(seen[-1])
        if not stop:
            rows = [sum(len(seen) for seen in source.seen) for source in (given.weights, given.architecture)]
            assert rows[0] == 2 * 12
            assert rows[1] >= 2 * 8
    assert same_state(*found)


def test_a_second_order_step_needs_both_batches():
    with pytest.raises(InputError, match=r"strategy.alternation=batch"):
        Bilevel("epoch", "second_exact")

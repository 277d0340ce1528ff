"""Barlow Twins is the paper's, lightly's, and on two ranks that of the whole batch on one."""

import pytest
import torch
from conftest import TinySource, on_ranks
from reference import barlow_twins as reference
from torch import nn

from mmnas_lab import distributed
from mmnas_lab.loader import FixedBatches, draw_pairs
from mmnas_lab.objective.barlow_twins import BarlowTwins, barlow_twins, cross_correlation
from mmnas_lab.types import Batch, InputError, Output


def loss_of(z_a, z_b, redundancy_weight):
    invariance, redundancy = barlow_twins(cross_correlation(z_a, z_b))
    return invariance + redundancy_weight * redundancy


@pytest.mark.parametrize("weight", [0.0051, 0.5])
@pytest.mark.parametrize(("batch", "width"), [(2, 3), (5, 4), (9, 1)])
def test_loss_and_gradient_are_the_definition(batch, width, weight, generator):
    z_a, z_b = (torch.randn(batch, width, generator=generator).requires_grad_() for _ in range(2))
    loss = loss_of(z_a, z_b, weight)
    expected = reference.barlow_twins(z_a, z_b, weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    for one, other in zip(
        torch.autograd.grad(loss, (z_a, z_b)), torch.autograd.grad(expected, (z_a, z_b)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [2, 7])
def test_loss_and_gradient_are_lightlys(batch, generator):
    lightly = pytest.importorskip("lightly.loss")
    z_a, z_b = (torch.randn(batch, 16, generator=generator).requires_grad_() for _ in range(2))
    expected = lightly.BarlowTwinsLoss(lambda_param=0.0051)(z_a, z_b)
    loss = loss_of(z_a, z_b, 0.0051)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(
        torch.autograd.grad(loss, (z_a, z_b)), torch.autograd.grad(expected, (z_a, z_b)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_equal_views_of_independent_dimensions_cost_nothing():
    z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert loss_of(z, z, 1.0).item() == pytest.approx(0, abs=1e-8)
    assert loss_of(z, -z, 1.0).item() == pytest.approx(8, rel=1e-4)
    assert loss_of(z, z.flip(1), 1.0).item() == pytest.approx(4, rel=1e-4)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"two views of one shape, got \(2, 3\) and \(3, 3\)"):
        cross_correlation(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(InputError, match="at least 2 samples, got 1; raise batch_size"):
        cross_correlation(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(InputError, match="at least 2 samples, got 1; raise batch_size"):
        BarlowTwins(4, hidden=3, projection=2)(run, Batch(({"a": torch.ones(1, 4)}, {"a": torch.ones(1, 4)})))
    with pytest.raises(InputError, match=r"objective.redundancy_weight must be positive, got 0"):
        BarlowTwins(4, redundancy_weight=0)
    with pytest.raises(InputError, match=r"objective.hidden must be at least 1, got 0"):
        BarlowTwins(4, hidden=0)


def run(inputs):
    return Output(inputs["a"], {})


def test_each_view_goes_through_the_network_by_itself(generator):
    seen = []

    def watched(inputs):
        seen.append(inputs["a"])
        return Output(inputs["a"], {})

    objective = BarlowTwins(4, 0.3, hidden=6, projection=3)
    first, second = torch.randn(2, 5, 4, generator=generator)
    losses = objective(
        watched, Batch(({"a": first}, {"a": second}), object())
    )  # labels that nothing can read
    assert seen[0] is first
    assert seen[1] is second
    expected = reference.barlow_twins(objective.projector(first), objective.projector(second), 0.3)
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses.parts["loss"] == losses.total
    parts = losses.parts["invariance"] + 0.3 * losses.parts["redundancy"]
    assert parts.item() == pytest.approx(losses.total.item())
    assert not any(part.requires_grad for part in losses.parts.values())
    losses.total.backward()
    assert all(p.grad is not None for p in objective.parameters())


def test_the_projector_is_the_released_one():
    projector = BarlowTwins(5, hidden=7, projection=3).projector
    linear = [(m.in_features, m.out_features, m.bias) for m in projector if isinstance(m, nn.Linear)]
    assert linear == [(5, 7, None), (7, 7, None), (7, 3, None)]
    names = [type(m).__name__ for m in projector]
    assert names == ["Linear", "SyncedBatchNorm", "ReLU", "Linear", "SyncedBatchNorm", "ReLU", "Linear"]


def whole_or_part(views, weight, rows):
    """Loss, gradients and running means of one process's rows, through a linear map and the projector."""
    torch.manual_seed(0)
    objective = BarlowTwins(4, 0.2, hidden=6, projection=5)
    weight = weight.clone().requires_grad_()
    inputs = [view[rows].clone().requires_grad_() for view in views]
    losses = objective(lambda given: Output(given["a"] @ weight, {}), Batch(tuple({"a": z} for z in inputs)))
    losses.total.backward()
    shared = [weight.grad, *(p.grad for p in objective.parameters())]
    return losses.total.item(), [z.grad for z in inputs], shared, list(objective.buffers())


def part(views, weight):
    return whole_or_part(views, weight, slice(distributed.rank(), None, 2))


@pytest.mark.ddp
def test_two_ranks_are_one_process_with_the_whole_batch(generator):
    views, weight = torch.randn(2, 8, 5, generator=generator), torch.randn(5, 4, generator=generator)
    loss, inputs, shared, buffers = whole_or_part(views, weight, slice(None))
    parts = on_ranks(part, views, weight)
    for rank, (its_loss, its_inputs, _, its_buffers) in enumerate(parts):
        assert its_loss == pytest.approx(loss, rel=1e-5)
        for one, other in zip(its_inputs, inputs, strict=True):
            torch.testing.assert_close(one / 2, other[rank::2], rtol=1e-3, atol=1e-5)
        for one, other in zip(its_buffers, buffers, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other, whole in zip(parts[0][2], parts[1][2], shared, strict=True):
        torch.testing.assert_close((one + other) / 2, whole, rtol=1e-3, atol=1e-5)  # what DDP makes of them


def evaluated(count, batch_size):
    """An evaluation of a fixed linear network by this process."""
    torch.manual_seed(0)
    network, objective = nn.Linear(5, 6), BarlowTwins(6, 0.3, hidden=7, projection=4).eval()
    batches = FixedBatches(TinySource(count), draw_pairs, batch_size, (0, "held"), whole=True)
    return objective.evaluate(lambda inputs: Output(network(inputs["text.0"][..., 0]), {}), batches)


@pytest.mark.ddp
@pytest.mark.parametrize("count", [4, 14], ids=["a rank without a batch", "three batches"])
def test_evaluation_is_the_same_on_one_and_two_ranks(count):
    alone = evaluated(count, 4)
    first, second = on_ranks(evaluated, count, 4)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-6)
    names = {"loss", "invariance", "redundancy", "alignment", "uniformity", "embedding_std"}
    assert alone.keys() == names
    assert alone["loss"] == pytest.approx(alone["invariance"] + 0.3 * alone["redundancy"])
    assert 0 < alone["embedding_std"] < 1.5

"""NT-Xent is SimCLR's, lightly's, and on two ranks that of the whole batch on one."""

import pytest
import torch
from conftest import TinySource, on_ranks
from reference import nt_xent as reference
from torch import nn
from torch.nn import functional as F

from mmnas_lab import distributed
from mmnas_lab.loader import FixedBatches, draw_pairs
from mmnas_lab.objective.collapse import alignment, uniformity
from mmnas_lab.objective.nt_xent import NTXent, nt_xent
from mmnas_lab.types import Batch, InputError, Output


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_loss_and_gradient_are_the_definition(batch, temperature, generator):
    z_a, z_b = (torch.randn(batch, 8, generator=generator).requires_grad_() for _ in range(2))
    loss = nt_xent(z_a, z_b, temperature)
    expected = reference.nt_xent(z_a, z_b, temperature)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for one, other in zip(
        torch.autograd.grad(loss, (z_a, z_b)), torch.autograd.grad(expected, (z_a, z_b)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 7])
def test_loss_is_lightlys(batch, generator):
    lightly = pytest.importorskip("lightly.loss")
    z_a, z_b = torch.randn(2, batch, 16, generator=generator)
    expected = lightly.NTXentLoss(temperature=0.1)(z_a, z_b)
    assert nt_xent(z_a, z_b, 0.1).item() == pytest.approx(expected.item(), abs=1e-5)


def test_what_is_refused():
    with pytest.raises(ValueError, match="temperature > 0, got 0"):
        nt_xent(torch.ones(2, 3), torch.ones(2, 3), 0)
    with pytest.raises(ValueError, match=r"two views of one shape, got \(2, 3\) and \(3, 3\)"):
        nt_xent(torch.ones(2, 3), torch.ones(3, 3), 1)
    with pytest.raises(InputError, match=r"objective.temperature must be positive, got -1"):
        NTXent(4, temperature=-1)


def part_of_loss(z_a, z_b, weight, temperature):
    """Loss of this rank's rows through a linear map, and gradients as they are before DDP's mean."""
    rows = slice(distributed.rank(), None, 2)
    weight = weight.clone().requires_grad_()
    inputs = [z[rows].clone().requires_grad_() for z in (z_a, z_b)]
    loss = nt_xent(*(z @ weight for z in inputs), temperature)
    loss.backward()
    return loss.item(), [z.grad for z in inputs], weight.grad


@pytest.mark.ddp
def test_two_ranks_are_one_process_with_the_whole_batch(generator):
    z_a, z_b = torch.randn(2, 6, 5, generator=generator)
    weight = torch.randn(5, 4, generator=generator)
    parts = on_ranks(part_of_loss, z_a, z_b, weight, 0.2)
    whole = [tensor.clone().requires_grad_() for tensor in (z_a, z_b, weight)]
    loss = nt_xent(whole[0] @ whole[2], whole[1] @ whole[2], 0.2)
    loss.backward()
    assert sum(part[0] for part in parts) / 2 == pytest.approx(loss.item(), abs=1e-5)
    for rank, (_, gradients, _) in enumerate(parts):
        for gradient, z in zip(gradients, whole[:2], strict=True):
            torch.testing.assert_close(gradient / 2, z.grad[rank::2], rtol=1e-5, atol=1e-6)
    mean = (parts[0][2] + parts[1][2]) / 2  # what DDP makes of them
    torch.testing.assert_close(mean, whole[2].grad, rtol=1e-5, atol=1e-6)


def test_both_views_go_through_the_network_together(generator):
    sizes = []

    def run(inputs):
        sizes.append(len(inputs["a"]))
        return Output(inputs["a"], {})

    objective = NTXent(4, 0.5, hidden=6, projection=3)
    first, second = torch.randn(2, 5, 4, generator=generator)
    losses = objective(run, Batch(({"a": first}, {"a": second})))
    assert sizes == [10]
    z_a, z_b = objective.projector(first), objective.projector(second)
    assert losses.total.item() == pytest.approx(nt_xent(z_a, z_b, 0.5).item(), abs=1e-6)
    assert losses.parts["loss"].requires_grad is False
    losses.total.backward()
    assert all(p.grad is not None for p in objective.parameters())


def test_monitors_of_collapse(generator):
    spread = F.normalize(torch.randn(500, 16, generator=generator), dim=-1)
    collapsed = torch.ones(5, 16) / 4
    assert alignment(spread, spread) == 0
    assert alignment(spread, -spread).item() == pytest.approx(4)
    assert uniformity(collapsed).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(spread).item() < -3
    assert uniformity(spread[:1]) == 0


def evaluated(count, batch_size):
    """An evaluation of a fixed linear network by this process."""
    torch.manual_seed(0)
    network, objective = nn.Linear(5, 6), NTXent(6, 0.3, hidden=7, projection=4)
    batches = FixedBatches(TinySource(count), draw_pairs, batch_size, (0, "held"), whole=True)
    return objective.evaluate(lambda inputs: Output(network(inputs["text.0"][..., 0]), {}), batches)


@pytest.mark.ddp
@pytest.mark.parametrize("count", [4, 14], ids=["a rank without a batch", "three batches"])
def test_evaluation_is_the_same_on_one_and_two_ranks(count):
    alone = evaluated(count, 4)
    first, second = on_ranks(evaluated, count, 4)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-6)
    assert 0 < alone["embedding_std"] < 1.2

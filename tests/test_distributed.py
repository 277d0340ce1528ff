"""The collectives on two gloo processes, and that they do nothing on one."""

import pytest
import torch
from conftest import on_ranks

from mmnas_lab import distributed

pytestmark = pytest.mark.ddp


def collectives():
    rank = distributed.rank()
    module = torch.nn.BatchNorm1d(2)
    module.weight.data.fill_(rank)
    module.running_mean.fill_(rank)
    distributed.broadcast_buffers(module)
    after_buffers = (module.weight.tolist(), module.running_mean.tolist())
    module.running_var.fill_(rank + 2.0)
    distributed.broadcast_module(module)
    distributed.barrier()
    rows = torch.arange(5)[rank::2].float()[:, None]
    means = distributed.mean_over_ranks([torch.tensor([[1.0, 2.0]]) * rank, torch.tensor(4.0 + rank)])
    return {
        "rank": rank,
        "world": distributed.world_size(),
        "broadcast": distributed.broadcast({"from": rank}),
        "after_buffers": after_buffers,
        "module": (module.weight.tolist(), module.running_var.tolist()),
        "means": [mean.tolist() for mean in means],
        "no_means": distributed.mean_over_ranks([]),
        "rows": distributed.gather_rows(rows, 5).flatten().tolist(),
        "objects": distributed.gather_objects(rank * "a"),
    }


def test_collectives():
    first, second = on_ranks(collectives)
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    assert (first.pop("after_buffers"), second.pop("after_buffers")) == (([0, 0], [0, 0]), ([1, 1], [0, 0]))
    assert first == second
    assert first == {
        "world": 2,
        "broadcast": {"from": 0},
        "module": ([0, 0], [2, 2]),
        "means": [[[0.5, 1.0]], 4.5],
        "no_means": [],
        "rows": [0, 1, 2, 3, 4],
        "objects": ["", "a"],
    }


def test_on_one_process_nothing_is_exchanged():
    tensor = torch.ones(2, 3)
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.gather_with_grad(tensor) is tensor
    assert distributed.sum_with_grad(tensor) is tensor
    assert distributed.gather_rows(tensor, 2) is tensor
    assert distributed.mean_over_ranks([tensor])[0] is tensor
    assert distributed.broadcast("a") == "a"
    assert distributed.gather_objects("a") == ["a"]
    distributed.barrier()


def gathered(rows, weights, transposed):
    """The gradient of sum over ranks of <weights of the rank, gathered rows>."""
    rank = distributed.rank()
    local = rows[rank].clone().requires_grad_()
    if transposed:
        local = rows[rank].T.contiguous().T.requires_grad_()  # neither is what comes in
    everything = distributed.gather_with_grad(local)
    if transposed:
        everything.T.backward(weights[rank].T.contiguous())  # reaches the gather as a transposed view
    else:
        everything.backward(weights[rank])
    return everything.detach(), local.grad


def summed(values, weights):
    """The gradient of the sum over ranks of <weights of the rank, summed values>."""
    rank = distributed.rank()
    local = values[rank].T.contiguous().T.requires_grad_()  # not contiguous
    total = distributed.sum_with_grad(local)
    (total.T * weights[rank].T).sum().backward()
    return total.detach(), local.grad


def test_gradients_flow_back_through_a_sum(generator):
    values, weights = torch.randn(2, 2, 3, 4, generator=generator)
    for total, gradient in on_ranks(summed, values, weights):
        torch.testing.assert_close(total, values.sum(0))
        torch.testing.assert_close(gradient, weights.sum(0))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_flow_back_to_their_rows(transposed, generator):
    rows = torch.randn(2, 3, 4, generator=generator)
    weights = torch.randn(2, 6, 4, generator=generator)
    for rank, (everything, gradient) in enumerate(on_ranks(gathered, rows, weights, transposed)):
        assert torch.equal(everything, rows.flatten(0, 1))
        torch.testing.assert_close(gradient, weights.sum(0)[3 * rank : 3 * rank + 3])


def failing(rank):
    distributed.barrier()
    if distributed.rank() == rank:
        raise ZeroDivisionError("on purpose")
    return "fine"


def test_an_error_on_a_rank_is_shown_and_the_next_call_works():
    with pytest.raises(AssertionError, match=r"(?s)rank 1: .*on purpose"):
        on_ranks(failing, 1)
    assert on_ranks(failing, 2) == ["fine", "fine"]


def curved(a, weights, gather):
    """Second derivative, by this rank's graph, of the sum over ranks of weight (a + 2 a)^3 in a shared a."""
    rank = distributed.rank()
    shared = a.clone().requires_grad_()
    local = (shared * (rank + 1)).reshape(1, 1)
    total = distributed.gather_with_grad(local).sum() if gather else distributed.sum_with_grad(local).sum()
    (first,) = torch.autograd.grad(weights[rank] * total**3, shared, create_graph=True)
    (second,) = torch.autograd.grad(first, shared)
    return first.detach(), second


@pytest.mark.ddp
@pytest.mark.parametrize("gather", [True, False])
def test_second_derivatives_reach_over_the_ranks(gather):
    a, weights = torch.tensor(0.7, dtype=torch.float64), torch.tensor([0.3, 1.1], dtype=torch.float64)
    results = on_ranks(curved, a, weights, gather)
    firsts, seconds = zip(*results, strict=True)
    # Means over ranks are a half of the derivatives of the summed loss 1.4 (3 a)^3, as in the search's step.
    torch.testing.assert_close(sum(firsts) / 2, 1.4 * 81 * a**2 / 2)
    torch.testing.assert_close(sum(seconds) / 2, 1.4 * 162 * a / 2)

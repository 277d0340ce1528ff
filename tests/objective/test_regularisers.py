"""The zero-one loss is FairDARTS's, and the architecture half-step alone adds it."""

import pytest
import torch
from conftest import INFOS

from mmnas_lab.objective.base import Needs, Objective, Scored, Weighted
from mmnas_lab.objective.regularisers import ZeroOne, zero_one
from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.types import Batch, InputError, Losses


def by_loop(weights, form):
    distances = [abs(value - 0.5) for value in weights.double().flatten().tolist()]
    return -sum(d if form == "l1" else d * d for d in distances) / len(distances)


@pytest.mark.parametrize("form", ["l1", "l2"])
def test_it_is_the_definition_over_all_entries_together(form, generator):
    mixing = {
        "alpha": torch.rand(4, 3, generator=generator),
        "beta": torch.rand(2, 5, 1, generator=generator),
    }
    both = torch.cat([value.flatten() for value in mixing.values()])
    assert ZeroOne(form)(mixing).item() == pytest.approx(by_loop(both, form), abs=1e-6)
    assert ZeroOne(form, ["beta"])(mixing).item() == pytest.approx(by_loop(mixing["beta"], form), abs=1e-6)
    decided = {"alpha": torch.tensor([0.0, 1.0, 1.0])}
    assert ZeroOne(form)(decided).item() == {"l1": -0.5, "l2": -0.25}[form]


@pytest.mark.parametrize(("form", "expected"), [("l1", -1.28e-3), ("l2", -6.4e-6)])
def test_its_gradient_pushes_away_from_one_half_and_is_nothing_there(form, expected):
    # The numbers were measured on the released code: 2 x 14 x 7 logits.
    for start, gradient in ((0.0, 0.0), (0.01, expected), (-0.01, -expected)):
        logits = torch.full((2, 14, 7), start, requires_grad=True)
        zero_one(torch.sigmoid(logits), form).backward()
        torch.testing.assert_close(logits.grad, torch.full_like(logits, gradient), rtol=5e-3, atol=1e-9)


def test_what_is_refused():
    with pytest.raises(InputError, match=r"no mixing weights 'delta', only alpha, beta"):
        ZeroOne("l1", ["alpha", "delta"])({"alpha": torch.ones(1), "beta": torch.ones(1)})
    with pytest.raises(InputError, match="zero_one.names is empty"):
        ZeroOne("l1", [])


class Constant(Objective):
    """A loss of 2 that reads the network but does not depend on it."""

    needs = Needs(views=1, labels=False)
    selects = ("loss", "min")

    def forward(self, run, batch, half="weights"):
        loss = 2 + 0 * run(batch.views[0]).embedding.sum()
        return Losses(loss, {"loss": loss.detach()})

    def evaluate(self, run, batches):
        return {"loss": 2.0}


def test_it_joins_the_architecture_half_step_alone(generator):
    torch.manual_seed(0)
    network = FusionSpace(num_cells=2, num_steps=1, channels=3, length=4).hypernet(INFOS)
    penalties = {"zero_one": Weighted(10.0, ZeroOne("l2")), "alpha": Weighted(3.0, ZeroOne("l1", ["alpha"]))}
    scored = Scored(network, Constant(), penalties)
    batch = Batch(({name: torch.randn(2, *info.shape, generator=generator) for name, info in INFOS.items()},))
    plain = scored(batch, "weights")
    assert plain.total.item() == pytest.approx(2, abs=1e-5)
    assert plain.parts.keys() == {"loss"}
    losses = scored(batch, "arch")
    values = {name: function(network.mixing()).item() for name, (_, function) in penalties.items()}
    assert {name: losses.parts[name].item() for name in values} == pytest.approx(values)
    expected = 2 + 10 * values["zero_one"] + 3 * values["alpha"]
    assert losses.total.item() == pytest.approx(expected, abs=1e-5)
    assert losses.parts["loss"].item() == losses.total.item()
    gradients = torch.autograd.grad(losses.total, list(network.arch.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)

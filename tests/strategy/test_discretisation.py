"""Single genotypes compared by their loss: against brute force, and as the end of a bilevel search."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import INFOS, on_ranks
from fits import (
    Stopped,
    on_two_devices,
    problem,
    runtime,
    same_state,
    states,
    stop_after_validation,
    stop_at_step,
)

from mmnas_lab.loader import FixedBatches
from mmnas_lab.objective.nt_xent import NTXent
from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.strategy.curvature import CurvatureStop
from mmnas_lab.strategy.discretisation import _margins, descend
from mmnas_lab.strategy.gradient_search import Bilevel
from mmnas_lab.strategy.search_module import SearchModule
from mmnas_lab.types import InputError, TrainingError


def space_of(num_cells=1, num_steps=1):
    return FusionSpace(
        num_cells=num_cells, num_steps=num_steps, channels=3, length=4, dropout=0.1, pairing="distinct"
    )


def hypernet_of(space, generator):
    """A hypernet in eval mode with weights that tell genotypes apart, and a loss of what it gives."""
    torch.manual_seed(int(torch.randint(1000, (), generator=generator)))
    network = space.hypernet(INFOS).double().eval()
    inputs = {
        name: torch.randn(6, *info.shape, generator=generator, dtype=torch.float64)
        for name, info in INFOS.items()
    }
    target = torch.randn(6, network.info.embedding, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def loss(pinned):
        return float((pinned(inputs).embedding - target).square().mean())

    return network, loss


def pinned_loss(network, genotype, loss):
    with network.pinned(genotype):
        return loss(network)


@pytest.mark.parametrize("seed", range(3))
def test_one_cell_ends_at_the_best_of_all_genotypes(seed):
    generator = torch.Generator().manual_seed(seed)
    space = space_of()
    network, loss = hypernet_of(space, generator)
    every = {one: pinned_loss(network, one, loss) for one in space.all_single_cells(INFOS)}
    start = space.sample(INFOS, generator)
    end = descend(network, start, loss)
    assert end.genotype == min(every, key=every.get)
    assert end.loss == min(every.values())
    assert end.start == every[start]
    assert end.compared == len(every)
    (cell,) = end.genotype.cells
    others = {
        "cell.0.inputs": [value for one, value in every.items() if one.cells[0].inputs != cell.inputs],
        "cell.0.step.0.op": [v for one, v in every.items() if one.cells[0].steps[0].op != cell.steps[0].op],
    }
    assert end.margins == {name: min(values) - end.loss for name, values in others.items()}


@pytest.mark.parametrize(("num_cells", "num_steps"), [(2, 1), (1, 2), (2, 2)])
def test_no_single_revision_of_the_end_is_better(num_cells, num_steps, generator):
    space = space_of(num_cells, num_steps)
    network, loss = hypernet_of(space, generator)
    end = descend(network, space.sample(INFOS, generator), loss)
    decisions = range(num_cells * num_steps)
    around = [one for k in decisions for one in network.revised(end.genotype, k)]
    assert end.loss == pinned_loss(network, end.genotype, loss) <= end.start
    assert end.loss <= min(pinned_loss(network, one, loss) for one in around)
    assert end.margins.keys() <= end.genotype.choices().keys()
    assert min(end.margins.values()) >= 0


@pytest.mark.parametrize(("num_cells", "num_steps"), [(2, 1), (1, 2), (2, 3)])
def test_revisions_are_the_genotypes_that_differ_in_one_decision(num_cells, num_steps, generator):
    space = space_of(num_cells, num_steps)
    network = space.hypernet(INFOS)
    genotype = space.sample(INFOS, generator)
    chosen, features, ops = genotype.choices(), len(INFOS), len(space.ops)
    for decision in range(num_cells * num_steps):
        cell, step = divmod(decision, num_steps)
        found = network.revised(genotype, decision)
        assert found[0] == genotype
        assert len(set(found)) == len(found)
        names = {f"cell.{cell}.step.{step}.inputs", f"cell.{cell}.step.{step}.op"}
        names |= {f"cell.{cell}.inputs"} if step == 0 else set()
        for one in found:
            assert space.parse(one.to_json(), INFOS) == one
            assert {name for name, value in one.choices().items() if value != chosen[name]} <= names
        candidates, states_ = features + cell, 2 + step
        pairs = candidates * (candidates - 1) if step == 0 else 1
        operands = states_ * (states_ - 1) if num_steps > 1 else 1
        assert len(found) == pairs * operands * ops
    assert network.revised(genotype, num_cells * num_steps) == []


def test_in_a_tie_the_present_genotype_stays(generator):
    space = space_of(num_cells=2)
    network, _ = hypernet_of(space, generator)
    start = space.sample(INFOS, generator)
    end = descend(network, start, lambda _: 1.0)
    assert end.genotype == start
    assert set(end.margins.values()) == {0.0}


def test_losses_that_are_not_finite_are_never_the_best(generator):
    space = space_of()
    network, loss = hypernet_of(space, generator)
    calls = []

    def broken(pinned):
        calls.append(pinned)
        return math.nan if len(calls) % 2 else loss(pinned)

    assert math.isfinite(descend(network, space.sample(INFOS, generator), broken).loss)
    with pytest.raises(TrainingError, match=r"search\.optimizer\.lr"):
        descend(network, space.sample(INFOS, generator), lambda _: math.nan)


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path, generator):
    space = space_of(num_cells=2)
    network, loss = hypernet_of(space, generator)
    start, store = space.sample(INFOS, generator), tmp_path / "compared.json"
    expected = descend(network, start, loss)
    first_decision = len(network.revised(start, 0))
    calls = []

    def counted(pinned):
        calls.append(pinned)
        if len(calls) == first_decision + 10:
            raise Stopped
        return loss(pinned)

    with pytest.raises(Stopped):
        descend(network, start, counted, store)
    calls.clear()
    calls.extend([None] * 10_000)
    assert descend(network, start, counted, store) == expected
    assert len(calls) - 10_000 == expected.compared - first_decision
    assert not store.exists()


def test_the_order_of_a_sum_is_no_other_choice(generator):
    space = FusionSpace(
        num_cells=1, num_steps=1, channels=3, length=4, dropout=0.1, pairing="distinct", protocol="paper"
    )
    network, loss = hypernet_of(space, generator)
    sums = [one for one in space.all_single_cells(INFOS) if one.cells[0].steps[0].op == "sum"]
    losses = {one: pinned_loss(network, one, loss) for one in sums}
    best = min(sums, key=losses.get)
    pair = best.cells[0].inputs
    (swapped,) = (one for one in sums if one.cells[0].inputs == pair[::-1])
    assert losses[swapped] == losses[best]
    others = [value for one, value in losses.items() if set(one.cells[0].inputs) != set(pair)]
    assert _margins(best, sums, losses.get) == {"cell.0.inputs": min(others) - losses[best]}
    assert min(others) > losses[best]
    assert "zero" in space.ops
    assert "zero" not in {one.cells[0].steps[0].op for one in network.revised(best, 0)}


# At the end of a search.


EPOCHS, BEST = 6, 3


def given_to(running=None):
    return replace(problem(running or runtime(), epochs=EPOCHS), space=space_of(num_cells=2))


def decided(folder, running=None):
    """The result of a search that compares single genotypes, and the states after its epochs."""
    folder.mkdir(exist_ok=True)
    with states(SearchModule) as seen:
        result = Bilevel(decide="loss").search(given_to(running), folder)
    assert list(folder.iterdir()) == []
    assert result.selection["epoch"] == BEST, "whose weights are not the last ones"
    return result, seen


def losses_by_hand(state, *genotypes):
    """Losses of single genotypes on the architecture half, with these weights."""
    given = given_to()
    network = given.space.hypernet(INFOS)
    objective = NTXent(network.info.embedding, 0.5, hidden=5, projection=4)
    for prefix, module in (("network.", network), ("objective.", objective)):
        own = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        module.load_state_dict(own)
        module.eval()
    held = FixedBatches(given.architecture, given.draw, 4, (0, "search", "held"), whole=True)
    losses = []
    for genotype in genotypes:
        with network.pinned(genotype):
            losses.append(objective.evaluate(network, held)["loss"])
    return losses


def test_a_search_compares_with_the_weights_of_its_best_epoch(tmp_path):
    result, seen = decided(tmp_path / "by_loss")
    (tmp_path / "by_weights").mkdir()
    with states(SearchModule) as others:
        by_weights = Bilevel().search(given_to(), tmp_path / "by_weights")
    assert all(same_state(one, other) for one, other in zip(seen[:-1], others[:-1], strict=True))
    assert same_state(seen[-1], seen[BEST])
    assert result.history == by_weights.history
    assert by_weights.selection["epoch"] == BEST
    found, named = losses_by_hand(seen[BEST], result.genotype, by_weights.genotype)
    assert result.selection["name"] == "search/single_loss"
    assert result.selection["value"] == pytest.approx(found, rel=1e-5)
    assert result.selection["loss_by_weights"] == pytest.approx(named, rel=1e-5)
    assert found < named
    assert result.selection["compared"] > 50


@pytest.mark.parametrize(
    "stop",
    [stop_at_step(1), stop_at_step(14), stop_after_validation(4), stop_after_validation(5)],
)
def test_a_stopped_search_compares_the_same_genotypes(stop, tmp_path):
    expected, _ = decided(tmp_path / "whole")
    with pytest.raises(Stopped):
        decided(tmp_path / "stopped", runtime(**stop))
    result, _ = decided(tmp_path / "stopped")
    assert (result.genotype, result.selection, result.margins) == (
        expected.genotype,
        expected.selection,
        expected.margins,
    )


def on_one_rank(folder):
    with states(SearchModule) as seen:
        result = Bilevel(decide="loss").search(given_to(on_two_devices(runtime())), folder)
    return result, seen[result.selection["epoch"]]


@pytest.mark.ddp
def test_ranks_agree(tmp_path):
    (one, state), (other, _) = on_ranks(on_one_rank, tmp_path)
    assert (one.genotype, one.selection, one.margins) == (other.genotype, other.selection, other.margins)
    # Each rank has its own batches of the held half, so the loss of both is not that of one process.
    around = losses_by_hand(state, one.genotype)
    assert one.selection["value"] == pytest.approx(around[0], rel=0.5)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_decided_by_loss():
    with pytest.raises(InputError, match=r"strategy\.decide must be weights or loss, got 'best'"):
        Bilevel(decide="best")
    with pytest.raises(InputError, match=r"strategy\.decide=weights"):
        Bilevel(decide="loss", early_stop=CurvatureStop())

"""Curvature against a Hessian formed entry by entry, and the rule of early stopping against its words."""

import copy

import pytest
import torch
from fits import Stopped, problem, runtime, same_state, states, stop_after_validation

from mmnas_lab.objective.base import Scored
from mmnas_lab.objective.supervised import Supervised
from mmnas_lab.search_space.cnn_cells.space import CnnCellSpace
from mmnas_lab.strategy.curvature import CurvatureStop, dominant_eigenvalue
from mmnas_lab.strategy.gradient_search import Bilevel
from mmnas_lab.strategy.search_module import SearchModule
from mmnas_lab.types import Batch, InputError, InputInfo


def scored_cells(**settings):
    space = CnnCellSpace(num_cells=3, channels=2, num_nodes=1, init_scale=0.5, **settings)
    network = space.hypernet({"image": InputInfo((3, 8, 8), "image")})
    objective = Supervised(network.info.embedding, "multiclass", ("a", "b"), torch.zeros(2))
    return Scored(network, objective).double()


def slow_largest(scored, batch, seed):
    """By differentiating every entry of the gradient, on a copy."""
    scored = copy.deepcopy(scored)
    arch = list(scored.network.arch.values())
    torch.manual_seed(seed)
    gradients = torch.autograd.grad(scored(batch, "arch").total, arch, create_graph=True)
    rows = [
        torch.cat([row.flatten() for row in torch.autograd.grad(entry, arch, retain_graph=True)])
        for gradient in gradients
        for entry in gradient.flatten()
    ]
    return torch.linalg.eigvalsh(torch.stack(rows))[-1].item()


@pytest.mark.parametrize("relaxation", ["softmax", "sigmoid", "gumbel"])
def test_the_eigenvalue_is_that_of_the_whole_hessian(relaxation):
    torch.manual_seed(1)
    scored = scored_cells(relaxation=relaxation)
    batch = Batch(
        ({"image": torch.randn(4, 3, 8, 8, dtype=torch.float64)},),
        torch.tensor([0, 1, 1, 0]),
    )
    expected = slow_largest(scored, batch, seed=3)
    before = copy.deepcopy(scored.state_dict())
    torch.manual_seed(3)
    value = dominant_eigenvalue(scored, list(scored.network.arch.values()), batch, weight_decay=0.25)
    after = torch.rand(3)
    assert value == pytest.approx(expected + 0.25, rel=1e-3)
    assert same_state(before, scored.state_dict())
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


def test_few_logits_need_no_iteration():
    torch.manual_seed(1)
    scored = scored_cells(vocabulary="s2").double()
    arch = [scored.network.arch["alpha_normal"]]
    assert arch[0].numel() <= 8
    batch = Batch(({"image": torch.randn(4, 3, 8, 8, dtype=torch.float64)},), torch.tensor([0, 1, 1, 0]))
    gradient = torch.autograd.grad(scored(batch, "arch").total, arch, create_graph=True)[0].flatten()
    rows = [torch.autograd.grad(entry, arch, retain_graph=True)[0].flatten() for entry in gradient]
    expected = torch.linalg.eigvalsh(torch.stack(rows))[-1].item()
    assert dominant_eigenvalue(scored, arch, batch) == pytest.approx(expected, rel=1e-6)


def stops_slowly(values, every, window, delta, factor, start):
    """The released rule, epoch by epoch."""
    half = window // 2
    for newest in range(len(values)):
        now, before = newest - half, newest - half - delta
        if before < 0 or before * every < start:
            continue
        mean = [
            sum(around) / len(around)
            for around in (values[max(0, k - half) : k + half + 1] for k in (before, now))
        ]
        if mean[0] > 0 and mean[1] / mean[0] > factor:
            return newest, before * every
    return None


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_stops_where_its_words_do(seed):
    draw = torch.Generator().manual_seed(seed)
    values = (torch.rand(40, generator=draw) * 0.5 + 0.3 + 0.02 * torch.arange(40)).tolist()
    rule = CurvatureStop(every=2, window=5, delta=4, factor=1.3, start_epoch=10)
    found = next(
        ((n, stop.epoch) for n in range(40) if (stop := rule.decide(values[: n + 1])) is not None), None
    )
    assert found == stops_slowly(values, 2, 5, 4, 1.3, 10)


def test_steady_growth_stops_at_epoch_22_with_the_genotype_of_epoch_10():
    rule = CurvatureStop()
    values = [1.05 ** (2 * k) for k in range(12)]
    assert rule.decide(values[:11]) is None
    stop = rule.decide(values)
    assert stop is not None
    assert stop.epoch == 10
    assert rule.measures(22)
    assert not rule.measures(21)
    assert CurvatureStop(factor=None).decide(values) is None
    assert rule.decide(values, first_epoch=12) is None  # the architecture did not move before


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"every": 0}, "every"),
        ({"window": 4}, "odd"),
        ({"delta": 0}, "delta"),
        ({"factor": 0.75}, "factor"),
        ({"start_epoch": -1}, "start_epoch"),
    ],
)
def test_impossible_rules_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        CurvatureStop(**settings)


class AfterThree(CurvatureStop):
    """Stops after the measurement of epoch 2, with the genotype of epoch 1."""

    def decide(self, values, first_epoch=0):
        from mmnas_lab.strategy.curvature import Stop

        return Stop(1, 2.0) if len(values) == 3 else None


def stopped_search(folder, running=None):
    folder.mkdir(exist_ok=True)
    given = problem(running or runtime(), epochs=6)
    with states(SearchModule) as seen:
        result = Bilevel(early_stop=AfterThree(every=1)).search(given, folder)
    return result, seen


def test_a_search_stops_and_gives_the_earlier_genotype(tmp_path):
    result, seen = stopped_search(tmp_path / "stopped")
    whole, _ = stopped_search_without(tmp_path / "whole")
    assert len(seen) == 3
    assert result.selection == {
        "name": "search/eigenvalue",
        "growth": 2.0,
        "stopped_after": 2,
        "epoch": 1,
    }
    assert result.trace["records"] == whole.trace["records"][:3]
    assert len([point for point in result.history if point.name == "search/eigenvalue"]) == 3
    assert list((tmp_path / "stopped").iterdir()) == []


def stopped_search_without(folder):
    folder.mkdir()
    given = problem(runtime(), epochs=6)
    return Bilevel(early_stop=CurvatureStop(every=1, factor=None)).search(given, folder), None


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_killed_search_stops_at_the_same_place(epoch, tmp_path):
    expected, states_of_it = stopped_search(tmp_path / "whole")
    with pytest.raises(Stopped):
        stopped_search(tmp_path / "killed", runtime(**stop_after_validation(epoch)))
    result, seen = stopped_search(tmp_path / "killed")
    assert result.genotype == expected.genotype
    assert result.selection == expected.selection
    assert result.history == expected.history
    assert same_state(seen[-1], states_of_it[-1])


def test_measuring_changes_nothing_of_the_search(tmp_path):
    for name in ("measured", "plain"):
        (tmp_path / name).mkdir()
    measured = Bilevel(early_stop=CurvatureStop(every=1, factor=None)).search(
        problem(runtime()), tmp_path / "measured"
    )
    plain = Bilevel().search(problem(runtime()), tmp_path / "plain")
    assert measured.trace == plain.trace
    assert measured.genotype == plain.genotype
    assert [p for p in measured.history if p.name != "search/eigenvalue"] == plain.history

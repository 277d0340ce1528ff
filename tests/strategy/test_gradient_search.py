"""A search moves what it should, goes on exactly after a stop, and stays in step over ranks."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TinySource, on_ranks
from fits import (
    INFOS,
    SPACE,
    Stopped,
    on_two_devices,
    problem,
    runtime,
    same_state,
    search,
    states,
    stop_after_validation,
    stop_at_step,
)

from mmnas_lab import distributed
from mmnas_lab.objective.barlow_twins import BarlowTwins
from mmnas_lab.objective.base import Weighted
from mmnas_lab.objective.masked_reconstruction import MaskedReconstruction
from mmnas_lab.objective.mix import Mix, Term
from mmnas_lab.objective.regularisers import ZeroOne
from mmnas_lab.strategy.gradient_search import Bilevel
from mmnas_lab.strategy.search_module import SearchModule
from mmnas_lab.types import TrainingError

ALTERNATIONS = ["batch", "epoch"]
STEPS = {"batch": 3, "epoch": 5}  # an epoch
ARCH = [f"network.arch.{name}" for name in ("alpha", "beta", "gamma")]


def assert_same_search(first, second):
    (one, its_states), (other, other_states) = first, second
    assert one.genotype == other.genotype
    assert one.margins == other.margins
    assert one.selection == other.selection
    assert one.trace == other.trace
    assert same_state(its_states[-1], other_states[-1])
    assert one.history == other.history


@pytest.mark.parametrize("alternation", ALTERNATIONS)
def test_a_search_moves_weights_and_architecture(alternation, tmp_path):
    result, (first, second) = search(tmp_path, alternation)
    assert all(not torch.equal(first[name], second[name]) for name in (*ARCH, "objective.projector.0.weight"))
    assert SPACE.parse(result.genotype.to_json(), INFOS) == result.genotype
    assert result.selection["name"] == "search/eval_loss"
    losses = {point.epoch: point.value for point in result.history if point.name == "search/eval_loss"}
    assert result.selection["value"] == min(losses.values())
    assert losses[result.selection["epoch"]] == min(losses.values())
    assert {point.name for point in result.history} >= {"search/arch_loss", "search/weight_loss"}
    assert [point.step for point in result.history if point.name == "search/eval_loss"] == [
        STEPS[alternation],
        2 * STEPS[alternation],
    ]
    records = result.trace["records"]
    assert [record["epoch"] for record in records] == [0, 1]
    assert all(len(records[0]["mixing"][k]) == len(names) for k, names in result.trace["names"].items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alternation", ALTERNATIONS)
def test_warmup_moves_the_weights_alone(alternation, tmp_path):
    result, (first, second) = search(tmp_path, alternation, warmup_epochs=1)
    torch.manual_seed(0)
    start = first["network.arch.alpha"]
    assert start.abs().max() < 0.01  # as it was drawn
    assert not torch.equal(start, second["network.arch.alpha"])
    assert result.selection["epoch"] == 1


def test_each_half_is_read_where_it_belongs(tmp_path):
    given = problem(runtime(), supervised=True, epochs=1)
    Bilevel("epoch").search(given, tmp_path)
    assert sum(len(rows) for rows in given.weights.seen) == 12
    assert [len(rows) for rows in given.architecture.seen] == [4, 4, 4, 4]  # one pass, one evaluation


def test_a_regulariser_moves_the_architecture_and_is_logged_by_name(tmp_path):
    def searched(name, regularisers):
        given = replace(problem(runtime(), epochs=8), regularisers=regularisers)
        return Bilevel().search(given, tmp_path / name)

    def decided(result):
        mixing = result.trace["records"][-1]["mixing"]
        return {name: ZeroOne("l2")({name: torch.tensor(weights)}).item() for name, weights in mixing.items()}

    for name in ("plain", "penalised"):
        (tmp_path / name).mkdir()
    plain = searched("plain", {})
    penalised = searched("penalised", {"sharp": Weighted(1000.0, ZeroOne("l2", ["alpha"]))})
    assert decided(penalised)["alpha"] < decided(plain)["alpha"]
    assert {p.name for p in penalised.history} - {p.name for p in plain.history} == {"search/arch_sharp"}
    points = {point.name: point.value for point in penalised.history if point.epoch == 7}
    assert -0.25 < points["search/arch_sharp"] < 0
    assert points["search/arch_loss"] < -1
    assert points["search/weight_loss"] > 0


def points_of_interruption(alternation):
    steps = STEPS[alternation]
    return {
        "first step": stop_at_step(1),
        "mid-epoch": stop_at_step(2),
        "after a half-step of the architecture": stop_at_step(steps - 1),
        "last batch of an epoch": stop_at_step(steps),
        "after validation": stop_after_validation(0),
        "second epoch": stop_at_step(steps + 2),
        "last batch": stop_at_step(2 * steps),
        "before the last save": stop_after_validation(1),
    }


@pytest.mark.parametrize("alternation", ALTERNATIONS)
def test_a_stopped_search_goes_on_to_the_same_result(alternation, tmp_path):
    expected = search(tmp_path / "whole", alternation)
    for name, stop in points_of_interruption(alternation).items():
        folder = tmp_path / name
        with pytest.raises(Stopped):
            search(folder, alternation, runtime(**stop))
        assert_same_search(search(folder, alternation), expected)


def test_a_search_that_is_stopped_again_and_again(tmp_path):
    settings = {"warmup_epochs": 1, "epochs": 3, "schedule": "one_cycle", "clip_norm": 0.5}
    expected = search(tmp_path / "whole", "epoch", **settings)
    for step in (2, 3, 4, 7, 12):
        with pytest.raises(Stopped):
            search(tmp_path / "often", "epoch", runtime(**stop_at_step(step)), **settings)
    assert_same_search(search(tmp_path / "often", "epoch", **settings), expected)


def test_a_damaged_save_point_is_said_and_the_search_starts_again(tmp_path, caplog):
    expected = search(tmp_path / "whole", "batch")
    with pytest.raises(Stopped):
        search(tmp_path / "cut", "batch", runtime(**stop_at_step(4)))
    (save_point,) = (tmp_path / "cut").iterdir()
    save_point.write_bytes(save_point.read_bytes()[: save_point.stat().st_size // 2])
    assert_same_search(search(tmp_path / "cut", "batch"), expected)
    assert "cannot be read" in caplog.text
    assert "search starts again" in caplog.text


@pytest.mark.parametrize(
    ("half", "quantity"), [("weights", "search/weight_loss"), ("architecture", "search/")]
)
def test_a_loss_that_is_not_finite_is_named(half, quantity, tmp_path):
    given = problem(runtime())
    getattr(given, half).features["image.1"][3] = math.nan
    with pytest.raises(
        TrainingError, match=rf"{quantity}\w* is nan after epoch 0 of search \(step 3\); lower search.opt"
    ):
        Bilevel().search(given, tmp_path)


def search_on_this_rank(folder, alternation):
    seen_rows, original = [], TinySource.clean

    def clean(self, index):
        seen_rows.append(index.tolist())
        return original(self, index)

    TinySource.clean = clean
    try:
        result, seen = search(folder, alternation, on_two_devices(runtime()))
    finally:
        TinySource.clean = original
    return result, seen, seen_rows, distributed.rank()


@pytest.mark.ddp
@pytest.mark.parametrize("alternation", ALTERNATIONS)
def test_ranks_stay_bit_identical(alternation, tmp_path):
    (one, its_states, rows, _), (other, other_states, other_rows, _) = on_ranks(
        search_on_this_rank, tmp_path, alternation
    )
    assert rows[: STEPS[alternation]] != other_rows[: STEPS[alternation]]
    assert len(its_states) == len(other_states) == 2
    assert all(same_state(*pair) for pair in zip(its_states, other_states, strict=True))
    assert not torch.equal(its_states[0]["network.arch.alpha"], its_states[1]["network.arch.alpha"])
    assert (one.genotype, one.margins, one.selection) == (other.genotype, other.margins, other.selection)
    assert one.trace == other.trace
    assert one.history == other.history


def stopped_search_on_this_rank(folder, alternation, step):
    whole = search(folder / "whole", alternation, on_two_devices(runtime()))
    try:
        search(folder / "stopped", alternation, on_two_devices(runtime(**stop_at_step(step))))
    except Stopped:
        distributed.barrier()
    return whole, search(folder / "stopped", alternation, on_two_devices(runtime()))


@pytest.mark.ddp
@pytest.mark.parametrize("alternation", ALTERNATIONS)
def test_a_stopped_search_on_two_ranks_goes_on_to_the_same_result(alternation, tmp_path):
    for whole, resumed in on_ranks(stopped_search_on_this_rank, tmp_path, alternation, 3):
        assert_same_search(resumed, whole)


def mixed_search_on_this_rank(folder):
    """A search by a mix of which one term trains its own head only, with a regulariser."""

    def objective(info):
        masks = MaskedReconstruction(info, INFOS, patch=1, fill="learned", width=4)
        twins = BarlowTwins(info.embedding, hidden=5, projection=4)
        return Mix(twins=Term(twins), masks=Term(masks, arch=0.5, weights=0.0))

    given = replace(
        problem(on_two_devices(runtime()), epochs=1),
        objective=objective,
        regularisers={"zero_one": Weighted(2.0, ZeroOne())},
    )
    with states(SearchModule) as seen:
        result = Bilevel().search(given, folder)
    return seen[-1], result.history


@pytest.mark.ddp
def test_ranks_stay_in_step_where_a_term_trains_its_own_head_only(tmp_path):
    (one, history), (other, other_history) = on_ranks(mixed_search_on_this_rank, tmp_path)
    assert same_state(one, other)
    assert history == other_history
    assert {point.name for point in history} >= {
        "search/arch_masks_loss",
        "search/arch_zero_one",
        "search/weight_masks_loss",
        "search/weight_twins_redundancy",
        "search/eval_loss",
    }

"""Random search with weight sharing: draws are scored with weights that all of them trained."""

from dataclasses import replace

import pytest
from fits import (
    INFOS,
    SPACE,
    Stopped,
    problem,
    runtime,
    same_state,
    states,
    stop_after_validation,
    stop_at_step,
)

from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.strategy.weight_sharing import WeightSharing, WeightSharingModule
from mmnas_lab.types import InputError

DISTINCT = FusionSpace(num_cells=2, num_steps=1, channels=3, length=4, dropout=0.1, pairing="distinct")


def searched(folder, running=None, **settings):
    folder.mkdir(exist_ok=True)
    given = replace(problem(running or runtime(), **settings), space=DISTINCT)
    with states(WeightSharingModule) as seen:
        result = WeightSharing(draws=5).search(given, folder)
    return result, seen


def test_the_best_draw_is_taken(tmp_path):
    result, _ = searched(tmp_path)
    losses = [point.value for point in result.history if point.name == "search/draw_loss"]
    assert len(losses) == 5
    assert result.selection["draw"] == losses.index(min(losses))
    assert result.selection["value"] == min(losses)
    assert len(set(losses)) > 1
    assert DISTINCT.parse(result.genotype.to_json(), INFOS) == result.genotype
    assert [p.step for p in result.history if p.name == "search/weight_loss"] == [3, 6]
    assert [path.name for path in tmp_path.iterdir()] == ["draws.json"]


def test_the_logits_stay_and_the_weights_move(tmp_path):
    _, (first, second) = searched(tmp_path)
    for name, value in first.items():
        if name.startswith("network.arch"):
            assert value.equal(second[name])
    assert not same_state(first, second)


@pytest.mark.parametrize(
    "stop",
    [stop_at_step(2), stop_at_step(3), stop_after_validation(0), stop_at_step(6), stop_after_validation(1)],
)
def test_a_stopped_search_goes_on_to_the_same_result(stop, tmp_path):
    expected, whole = searched(tmp_path / "whole")
    with pytest.raises(Stopped):
        searched(tmp_path / "killed", runtime(**stop))
    result, seen = searched(tmp_path / "killed")
    assert result.genotype == expected.genotype
    assert result.selection == expected.selection
    assert result.history == expected.history
    assert same_state(seen[-1], whole[-1])


def test_what_cannot_be_searched_so_is_refused(tmp_path):
    with pytest.raises(InputError, match="draws"):
        WeightSharing(draws=0)
    given = problem(runtime())
    assert given.space is SPACE
    with pytest.raises(InputError, match="pairing=distinct"):
        WeightSharing().search(given, tmp_path)

"""Random search takes the best draw, goes on after a stop; a fixed genotype is that of its file."""

import json

import pytest
from fits import INFOS, SPACE, Stopped, problem, runtime, stop_at_step

from mmnas_lab.randomness import generator
from mmnas_lab.strategy.sampling_search import Fixed, Random
from mmnas_lab.types import InputError


def without_times(result):
    selection = {name: value for name, value in result.selection.items() if name != "seconds"}
    history = [point for point in result.history if "seconds" not in point.name]
    return result.genotype, selection, history


def test_the_best_of_the_draws_is_taken(tmp_path):
    result = Random(draws=3, epochs=1).search(problem(runtime()), tmp_path)
    draws = generator(0, "search", "draws")
    expected = [SPACE.sample(INFOS, draws) for _ in range(3)]
    assert result.genotype == expected[result.selection["draw"]]
    losses = [point.value for point in result.history if point.name.endswith("eval_loss")]
    assert len(losses) == 3
    assert result.selection["value"] == min(losses)


@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_random_search_goes_on_to_the_same_result(step, tmp_path):
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    expected = Random(draws=2, epochs=2).search(problem(runtime()), tmp_path / "whole")
    with pytest.raises(Stopped):
        Random(draws=2, epochs=2).search(problem(runtime(**stop_at_step(step))), tmp_path / "stopped")
    again = Random(draws=2, epochs=2).search(problem(runtime()), tmp_path / "stopped")
    assert without_times(again) == without_times(expected)


@pytest.mark.parametrize("settings", [{"draws": 0}, {"epochs": 0}])
def test_nothing_to_draw(settings):
    with pytest.raises(InputError, match="draws and strategy.epochs must be at least 1"):
        Random(**settings)


def test_a_fixed_genotype_is_that_of_its_file(tmp_path, generator):
    genotype = SPACE.sample(INFOS, generator)
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps(genotype.to_json()))
    strategy = Fixed(str(path))
    assert strategy.search(problem(runtime()), tmp_path).genotype == genotype
    assert strategy.settings() == {"genotype": genotype.to_json()}


def test_a_fixed_genotype_needs_a_file_of_json(tmp_path):
    with pytest.raises(
        InputError, match=r"no file '.*nowhere.json'; give the genotype.json of a finished run"
    ):
        Fixed(str(tmp_path / "nowhere.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        Fixed(str(tmp_path / "broken.json"))

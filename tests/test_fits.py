"""What fits what: the README's table is the code's, what it marks takes steps, and the rest is refused."""

from pathlib import Path

import pytest
from cli_support import TINY, one_message, run, succeed
from test_cells import write
from test_mixers import write_admissions

from mmnas_lab.fits import nodes, objective_unfit, spaces, strategies, strategy_unfit, table

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES, OBJECTIVES, SPACES = strategies(), nodes("objective"), spaces()
STRATEGY_PAIRS = [(strategy, space) for strategy in STRATEGIES for space in SPACES if strategy != "fixed"]
OBJECTIVE_PAIRS = [(objective, space) for objective in OBJECTIVES for space in SPACES]
SMALL = {
    "random": ["strategy.draws=1", "strategy.epochs=2"],
    "weight_sharing": ["strategy.draws=2"],
    "micro_benchmark": ["strategy.seeds=1"],
    "darts_es": ["strategy.early_stop.every=1"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    write(folder / "cifar")
    write_admissions(folder / "mimic3.npz", 400)
    return folder


def arguments(space):
    """A search of two epochs at smoke scale."""
    if space == "cnn_cells":
        experiment = ["experiment=darts_cifar10", "scale=smoke", "dataset.path=cifar", "trainer.threads=1"]
        return [*experiment, "search.batch_size=30", "stages=[features,search]"]
    if space == "mixers":
        experiment = ["experiment=mixmas_mimic3", "scale=smoke", "dataset.path=mimic3.npz"]
        return [*experiment, "trainer.threads=1", "search.batch_size=16", "stages=[features,search]"]
    return [*TINY, "stages=[features,search]"]


def test_the_readme_has_the_table():
    assert table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("strategy", "space"), STRATEGY_PAIRS)
def test_a_strategy_searches_the_spaces_that_it_fits_and_no_other(strategy, space, place):
    command = [*arguments(space), f"strategy={strategy}", *SMALL.get(strategy, [])]
    if strategy_unfit(STRATEGIES[strategy], SPACES[space]) is None:
        succeed(*command, cwd=place)
        return
    message = one_message(run(*command, cwd=place))
    fitting = [name for name, one in STRATEGIES.items() if strategy_unfit(one, SPACES[space]) is None]
    assert all(name in message for name in fitting)


@pytest.mark.parametrize(("objective", "space"), OBJECTIVE_PAIRS)
def test_an_objective_drives_searches_of_the_spaces_that_it_fits_and_no_other(objective, space, place):
    short = ["strategy.seeds=1"] * (space == "mixers")
    command = [*arguments(space), f"objective={objective}", *short]
    if objective_unfit(OBJECTIVES[objective], SPACES[space]) is None:
        succeed(*command, cwd=place)
        return
    message = one_message(run(*command, cwd=place))
    fitting = [name for name, node in OBJECTIVES.items() if objective_unfit(node, SPACES[space]) is None]
    assert all(name in message for name in fitting)


@pytest.mark.parametrize("strategy", ["weight_sharing", "bilevel_by_loss"])
def test_single_genotypes_of_one_mixture_are_refused_before_anything_is_computed(strategy, tmp_path):
    command = [*arguments("fusion"), f"strategy={strategy}", "search_space.pairing=shared"]
    message = one_message(run(*command, cwd=tmp_path))
    assert f"strategy={strategy} needs" in message
    assert "search_space.pairing=distinct, or strategy=bilevel" in message
    assert not (tmp_path / "outputs").exists()

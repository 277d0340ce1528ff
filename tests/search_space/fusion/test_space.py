"""Settings, draws, baselines and parameter counts of the fusion space."""

import pytest
import torch

from mmnas_lab.search_space.fusion.genotype import CellGenotype, FusionGenotype, StepGenotype
from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.types import InputError, InputInfo

POSTERS = {
    **{f"image.{i}": InputInfo((512, 16), "image") for i in range(4)},
    "text.0": InputInfo((64, 1), "text"),
    "text.1": InputInfo((128, 1), "text"),
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def poster_genotype(op="linear_glu"):
    step = (StepGenotype((0, 1), op),)
    return FusionGenotype(
        (CellGenotype(("image.0", "text.0"), step), CellGenotype(("image.1", "text.0"), step)), 2
    )


def test_the_found_poster_network_has_the_published_size():
    network = FusionSpace().build(poster_genotype(), POSTERS)
    assert parameters(network) == 532_416
    assert parameters(torch.nn.Linear(network.info.embedding, 23)) == 141_335


def test_the_paper_protocol_has_its_closed_form():
    channels = 192
    network = FusionSpace(protocol="paper").build(poster_genotype(), POSTERS)
    reshape = sum(in_channels * channels + 3 * channels for in_channels in (512, 64, 512))
    assert parameters(network) == reshape + 2 * 2 * channels**2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_cells": 0}, "search_space.num_cells must be at least 1, got 0"),
        ({"num_steps": 0}, "search_space.num_steps must be at least 1, got 0"),
        ({"channels": -1}, "search_space.channels must be at least 1, got -1"),
        ({"length": 8}, r"search_space.length must be a square \(1, 4, 9, 16, ...\), got 8"),
        ({"cell_outputs": 4}, r"cell_outputs must be 1 to num_steps \+ 2 = 3, got 4"),
        ({"head_cells": 3}, "head_cells must be between 1 and num_cells = 2, got 3"),
    ],
)
def test_settings_that_make_no_space(settings, message):
    with pytest.raises(InputError, match=message):
        FusionSpace(**settings)


@pytest.mark.parametrize("protocol", ["paper", "released_code"])
def test_one_feature_is_not_enough(protocol, generator):
    space, inputs = FusionSpace(protocol=protocol, length=4), {"text.0": InputInfo((5, 1), "text")}
    for call in (space.hypernet, lambda given: space.sample(given, generator)):
        with pytest.raises(InputError, match="at least two features, the backbone gives 1: text.0"):
            call(inputs)


def test_a_feature_of_another_length():
    inputs = {"a.0": InputInfo((3, 9), "a"), "b.0": InputInfo((3, 1), "b")}
    with pytest.raises(InputError, match="feature 'a.0' has 9 positions, the fusion space needs 1 or 4"):
        FusionSpace(length=4).hypernet(inputs)


def test_draws_are_uniform_over_pairs_and_ops(generator):
    inputs = {name: InputInfo((2, 1), "m") for name in "abc"}
    space = FusionSpace(1, 1, 2, 4, protocol="paper")
    draws = [space.sample(inputs, generator) for _ in range(1200)]
    every = space.all_single_cells(inputs)
    assert len(every) == len(set(every)) == 3 * 2 * 4
    assert set(draws) == set(every)
    counts = [draws.count(genotype) for genotype in every]
    assert min(counts) > 20
    assert max(counts) < 90


def test_later_cells_can_read_earlier_ones_and_choices_say_so(generator):
    inputs = {name: InputInfo((2, 1), "m") for name in "ab"}
    space = FusionSpace(3, 2, 2, 4)
    choices = {choice.name: choice.options for choice in space.choices(inputs)}
    assert choices["cell.0.x"] == ("a", "b")
    assert choices["cell.2.y"] == ("a", "b", "cell.0", "cell.1")
    assert choices["cell.1.step.1.first"] == ("0", "1", "2")
    assert choices["cell.1.step.0.op"] == ("sum", "attention", "linear_glu", "concat_fc")
    draws = [space.sample(inputs, generator) for _ in range(50)]
    assert any("cell.1" in genotype.cells[2].inputs for genotype in draws)
    for genotype in draws:
        for i, cell in enumerate(genotype.cells):
            assert set(cell.inputs) <= set(choices[f"cell.{i}.x"])
            assert cell.steps[0].inputs == (0, 1)


def test_fixed_networks_of_baselines(generator):
    space = FusionSpace(2, 1, 3, 4)
    inputs = {
        "image.0": InputInfo((2, 4), "image"),
        "image.1": InputInfo((5, 4), "image"),
        "text.0": InputInfo((6, 1), "text"),
    }
    batch = {name: torch.randn(3, *info.shape, generator=generator) for name, info in inputs.items()}
    for name, features in (
        ("two_stream", ("image.1", "text.0")),
        ("image", ("image.1", "image.0")),
        ("text", ("text.0",)),
    ):
        genotype = space.fixed(name, inputs)
        network = space.build(genotype, inputs)
        assert tuple(network.names) == features
        assert network(batch).embedding.shape == (3, network.info.embedding)
    with pytest.raises(InputError, match="no baseline 'audio': .* two_stream, image, text"):
        space.fixed("audio", inputs)


def test_dropout_of_one_stage_overrides_the_spaces(generator):
    inputs = {name: InputInfo((2, 1), "m") for name in "ab"}
    space = FusionSpace(1, 1, 2, 4, dropout=0.1)
    genotype = space.sample(inputs, generator)
    for given, expected in ((None, 0.1), (0.4, 0.4), (0.0, 0.0)):
        network = space.build(genotype, inputs, dropout=given)
        assert network.reshape[0].p == expected
    assert space.dropout == 0.1

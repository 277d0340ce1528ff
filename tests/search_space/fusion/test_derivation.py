"""The derived genotype and its margins are those of brute force, for drawn logits and for exact ties."""

import random

import pytest
import torch
from reference import fusion

from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.types import InputInfo


def literal(genotype):
    return [(*cell.inputs, [(*step.inputs, step.op) for step in cell.steps]) for cell in genotype.cells]


@pytest.mark.parametrize("ties", [False, True], ids=["drawn", "ties"])
@pytest.mark.parametrize("pairing", ["shared", "distinct"])
@pytest.mark.parametrize("protocol", ["released_code", "paper"])
@pytest.mark.parametrize("seed", range(25))
def test_derivation_is_brute_force(seed, protocol, pairing, ties):
    draw = random.Random(seed)
    num_cells, num_steps = draw.randint(1, 3), draw.randint(1, 3)
    # Enough features for the released rule to find a new one for every cell.
    features = [f"f.{k}" for k in range(draw.randint(num_cells + 1, 9))]
    space = FusionSpace(num_cells, num_steps, 2, 1, protocol=protocol, pairing=pairing)
    network = space.hypernet({name: InputInfo((2, 1), "f") for name in features})
    torch.manual_seed(seed)
    with torch.no_grad():
        for logits in network.arch.values():
            if ties:
                logits.copy_(torch.randint(0, 2, logits.shape))
            else:
                logits.normal_()
    expected, margins = fusion.derive(
        network.arch, features, num_cells=num_cells, num_steps=num_steps, protocol=protocol, pairing=pairing
    )
    derived = network.derive()
    assert literal(derived.genotype) == expected
    assert derived.margins.keys() == dict(margins).keys()
    assert list(derived.margins.values()) == pytest.approx([m for _, m in margins], abs=1e-6)
    assert derived.genotype.head_cells == num_cells


def test_all_logits_equal_takes_the_first_of_everything():
    inputs = {f"f.{k}": InputInfo((2, 1), "f") for k in range(7)}
    for pairing, second in (("shared", ("f.0", "f.2")), ("distinct", ("f.0", "f.1"))):
        network = FusionSpace(2, 2, 2, 1, pairing=pairing).hypernet(inputs)
        with torch.no_grad():
            for logits in network.arch.values():
                logits.fill_(0.3)
        derived = network.derive()
        assert [cell.inputs for cell in derived.genotype.cells] == [("f.0", "f.1"), second]
        assert {step.op for cell in derived.genotype.cells for step in cell.steps} == {"sum"}
        assert derived.margins["cell.0.inputs"] == 0


def test_the_released_rule_goes_on_when_all_features_are_taken():
    network = FusionSpace(3, 1, 2, 1).hypernet({name: InputInfo((2, 1), "f") for name in "ab"})
    assert [cell.inputs for cell in network.derive().genotype.cells] == [("a", "b")] * 3

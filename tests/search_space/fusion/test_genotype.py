"""Genotypes survive JSON, and JSON that is none is refused with its reason."""

import copy
import json

import pytest

from mmnas_lab.search_space.fusion.genotype import CellGenotype, FusionGenotype, StepGenotype
from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.types import InputError, InputInfo

INPUTS = {name: InputInfo((2, 1), "m") for name in ("image.0", "image.1", "text.0")}


@pytest.mark.parametrize("protocol", ["paper", "released_code"])
@pytest.mark.parametrize(("num_cells", "num_steps"), [(1, 1), (2, 3), (3, 2)])
def test_random_genotypes_survive_json_and_build(num_cells, num_steps, protocol, generator):
    space = FusionSpace(num_cells, num_steps, 2, 4, head_cells=1, protocol=protocol)
    for _ in range(20):
        genotype = space.sample(INPUTS, generator)
        again = space.parse(json.loads(json.dumps(genotype.to_json())), INPUTS)
        assert again == genotype
        assert hash(again) == hash(genotype)
    assert space.build(again, INPUTS).info.embedding == 2 * 4


def test_features_come_in_the_order_of_their_use():
    space = FusionSpace(2, 1, 2, 4)
    data = valid()
    assert space.parse(data, INPUTS).features() == ("text.0", "image.0")


def valid():
    return {
        "space": "fusion",
        "schema": 1,
        "cells": [
            {"inputs": ["text.0", "image.0"], "steps": [{"inputs": [0, 1], "op": "sum"}]},
            {"inputs": ["cell.0", "image.0"], "steps": [{"inputs": [1, 0], "op": "attention"}]},
        ],
        "head_cells": 2,
    }


def without(*path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def put(value, *path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put("image.9", "cells", 0, "inputs", 1),
            "cell 0 of the genotype reads 'image.9'; it can read image.0, ",
        ),
        (put("cell.1", "cells", 1, "inputs", 0), "cell 1 of the genotype reads 'cell.1'; .* cell.0$"),
        (
            put("conv", "cells", 0, "steps", 0, "op"),
            "step 0 of cell 0 applies 'conv'; the operations are sum, ",
        ),
        (
            put(2, "cells", 1, "steps", 0, "inputs", 0),
            r"step 0 of cell 1 reads states \(2, 0\); there are 0 to 1",
        ),
        (put(2, "schema"), "is of space 'fusion', schema 2; the fusion space reads space 'fusion', schema 1"),
        (put("nas_bench", "space"), "is of space 'nas_bench', schema 1"),
        (without("space"), "is of space None"),
        (put(3, "head_cells"), "1 <= head_cells <= cells, got 2 cells and head_cells 3"),
        (put(0, "head_cells"), "1 <= head_cells <= cells, got 2 cells and head_cells 0"),
        (put("all", "head_cells"), "not a fusion genotype: ValueError"),
        (put([], "cells"), "at least one cell"),
        (put([], "cells", 1, "steps"), "cell 1 of the genotype has no step"),
        (put(["text.0"], "cells", 0, "inputs"), "not a fusion genotype: ValueError"),
        (without("cells", 0, "steps"), "not a fusion genotype: KeyError 'steps'"),
        (put(None, "cells"), "not a fusion genotype: TypeError"),
    ],
)
def test_what_is_no_genotype_is_refused_with_its_reason(change, message):
    space = FusionSpace(2, 1, 2, 4)
    data = copy.deepcopy(valid())
    space.parse(data, INPUTS)
    change(data)
    with pytest.raises(InputError, match=message):
        space.parse(data, INPUTS)


@pytest.mark.parametrize("data", [[], "fusion", None, 3])
def test_json_that_is_no_object_is_refused(data):
    with pytest.raises(InputError, match="not a fusion genotype"):
        FusionSpace().parse(data, INPUTS)


@pytest.mark.parametrize(
    ("second", "op", "head_cells", "unread"),
    [
        (("image.1", "text.0"), "sum", 2, False),
        (("image.1", "text.0"), "sum", 1, True),
        (("cell.0", "text.0"), "sum", 1, False),
        (("cell.0", "text.0"), "zero", 1, True),
    ],
)
def test_parts_that_no_output_reads_are_known(second, op, head_cells, unread):
    first = CellGenotype(("image.0", "text.0"), (StepGenotype((0, 1), "sum"),))
    genotype = FusionGenotype((first, CellGenotype(second, (StepGenotype((0, 1), op),))), head_cells)
    assert genotype.unread() is unread

"""The hypernet and found networks are the literal equations, outputs and every gradient, over random sizes."""

import random

import pytest
import torch
from reference import fusion
from reference_names import named, reference_tensors, scramble

from benchmarks.plain_hypernet import PlainHypernet
from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.types import InputInfo

PROTOCOLS = ["released_code", "paper"]
PAIRINGS = ["shared", "distinct"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def drawn_sizes(seed, protocol, pairing):
    """A space, its inputs and a batch size, all drawn; a BatchNorm has at least two values a channel."""
    draw = random.Random(seed)
    length = draw.choice([1, 4, 9])
    num_cells, num_steps = draw.randint(1, 3), draw.randint(1, 3)
    space = FusionSpace(
        num_cells=num_cells,
        num_steps=num_steps,
        channels=draw.randint(2, 5),
        length=length,
        dropout=0.0,
        attention_dropout=0.0,
        cell_outputs=draw.randint(1, num_steps + 2),
        head_cells=draw.randint(1, num_cells),
        protocol=protocol,
        pairing=pairing,
    )
    inputs = {
        f"image.{k}": InputInfo((draw.randint(1, 6), draw.choice([1, length])), "image")
        for k in range(draw.randint(2, 5))
    }
    return space, inputs, draw.randint(1 if length > 1 else 3, 4)


def sizes_of(space):
    names = ("channels", "length", "cell_outputs", "head_cells", "protocol")
    return {name: getattr(space, name) for name in names}


def features_of(inputs, batch, generator, dtype=torch.float64):
    return {name: torch.randn(batch, *info.shape, generator=generator, dtype=dtype) for name, info in inputs.items()}


def error_of(actual, expected, name):
    assert actual.shape == expected.shape, name
    return float((actual.double() - expected).abs().max().detach())


def results_of(embedding, cells, tensors, direction):
    """Outputs and the gradients of all parameters, by name."""
    (embedding * direction.to(embedding.dtype)).sum().backward()
    found = {"embedding": embedding, **{f"output of cell {i}": cell for i, cell in enumerate(cells)}}
    for name, (tensor, transposed) in tensors.items():
        if tensor.requires_grad:
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            found[f"gradient of {name}"] = gradient.T if transposed else gradient
    return {name: tensor.detach() for name, tensor in found.items()}


def compare(network, run_reference, features, generator, dtype, genotype=None):
    """Outputs and gradients of the network in `dtype` against the reference in float64.

    In float64 to 1e-10 of each tensor's largest magnitude, in float32 to 1e-5 of it. Two things loosen it: a
    gradient that vanishes (of a bias before a BatchNorm) has no magnitude of its own, and is held to a
    tenth of the largest gradient; and where a BatchNorm over few values makes the equations themselves
    inexact in float32, the bound is what the reference loses there, times 32.
    """

    def reference(dtype):
        p = reference_tensors(network, genotype, dtype)
        embedding, cells = run_reference({name: x.to(dtype) for name, x in features.items()}, p)
        return results_of(embedding, cells, {name: (tensor, False) for name, tensor in p.items()}, direction)

    cells, length, channels = len(network.info.taps), *next(iter(network.info.taps.values()))[::-1]
    batch = len(next(iter(features.values())))
    direction = torch.randn(batch, network.info.embedding, generator=generator, dtype=torch.float64)
    expected = reference(torch.float64)
    lost = reference(torch.float32) if dtype == torch.float32 else {}

    network.to(dtype)
    output = network({name: feature.to(dtype) for name, feature in features.items()})
    taps = [output.taps[f"cell.{i}"] for i in range(cells)]
    assert all(tap.shape == (batch, channels, length) for tap in taps)
    actual = results_of(output.embedding, taps, named(network, genotype), direction)
    assert actual.keys() == expected.keys()
    floor = 0.1 * max(float(value.abs().max()) for name, value in expected.items() if "gradient" in name)
    for name, value in expected.items():
        scale = max(float(value.abs().max()), floor if "gradient" in name else 0.0)
        allowed = TOLERANCE[dtype] * scale
        if name in lost:
            allowed = max(allowed, 32 * error_of(lost[name], value, name))
        assert error_of(actual[name], value, name) <= allowed, f"{name} of scale {scale}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("seed", range(6))
def test_hypernet_is_the_reference(seed, protocol, pairing, training, dtype, generator):
    space, inputs, batch = drawn_sizes(seed, protocol, pairing)
    network = scramble(space.hypernet(inputs).double(), generator).train(training)
    compare(
        network,
        lambda features, p: fusion.hypernet(
            features,
            p,
            num_cells=space.num_cells,
            num_steps=space.num_steps,
            pairing=pairing,
            training=training,
            **sizes_of(space),
        ),
        features_of(inputs, batch + 8 * (dtype == torch.float32), generator),
        generator,
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("seed", range(6))
def test_found_network_is_the_reference(seed, protocol, training, dtype, generator):
    space, inputs, batch = drawn_sizes(seed, protocol, "shared")
    genotype = space.sample(inputs, generator)
    network = scramble(space.build(genotype, inputs).double(), generator).train(training)
    literal = [(*cell.inputs, [(*step.inputs, step.op) for step in cell.steps]) for cell in genotype.cells]
    compare(
        network,
        lambda features, p: fusion.found_network(features, p, literal, training=training, **sizes_of(space)),
        features_of(inputs, batch + 8 * (dtype == torch.float32), generator),
        generator,
        dtype,
        genotype,
    )

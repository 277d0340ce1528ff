"""The hypernet and found networks are the literal equations: outputs and every gradient, at random sizes."""

import random

import pytest
import torch
from reference import fusion
from reference_names import named, reference_tensors, scramble

from benchmarks.plain_hypernet import PlainHypernet
from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.types import InputError, InputInfo

PROTOCOLS = ["released_code", "paper"]
PAIRINGS = ["shared", "distinct"]
MODES = [(True, torch.float64), (False, torch.float64), (True, torch.float32)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def drawn_sizes(seed, protocol, pairing, relaxation="softmax"):
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
        relaxation=relaxation,
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
    return {
        name: torch.randn(batch, *info.shape, generator=generator, dtype=dtype)
        for name, info in inputs.items()
    }


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

    In float64 to 1e-10 of each tensor's largest magnitude, in float32 to 1e-5 of it. A gradient that is small
    beside the others, or vanishes, is held to a tenth of the largest one. BatchNorm over few values makes the
    equations themselves inexact in float32: there the bound is what the reference loses, times 32, and the
    bias before it, whose gradient is exactly 0 and in float32 only rounding, is left out.
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
            if name.endswith(".bias") and name.replace(".bias", ".bn_bias") in expected:
                continue
            allowed = max(allowed, 32 * error_of(lost[name], value, name))
        assert error_of(actual[name], value, name) <= allowed, f"{name} of scale {scale}"


@pytest.mark.parametrize(("training", "dtype"), MODES, ids=["train", "eval", "train_float32"])
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("seed", "relaxation"), [*((seed, "softmax") for seed in range(5)), (0, "sigmoid"), (3, "sigmoid")]
)
def test_hypernet_is_the_reference(seed, relaxation, protocol, pairing, training, dtype, generator):
    space, inputs, batch = drawn_sizes(seed, protocol, pairing, relaxation)
    network = scramble(space.hypernet(inputs).double(), generator).train(training)
    compare(
        network,
        lambda features, p: fusion.hypernet(
            features,
            p,
            num_cells=space.num_cells,
            num_steps=space.num_steps,
            pairing=pairing,
            relaxation=relaxation,
            training=training,
            **sizes_of(space),
        ),
        features_of(inputs, batch + 8 * (dtype == torch.float32), generator),
        generator,
        dtype,
    )


@pytest.mark.parametrize(("training", "dtype"), MODES, ids=["train", "eval", "train_float32"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("seed", range(5))
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


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gumbel_draws_in_training_and_shows_its_mode(pairing, generator):
    space, inputs, batch = drawn_sizes(3, "released_code", pairing, "gumbel")
    plain, _, _ = drawn_sizes(3, "released_code", pairing)
    network = scramble(space.hypernet(inputs).double(), generator)
    features = features_of(inputs, batch, generator)

    def embedding(seed):
        torch.manual_seed(seed)
        return network(features).embedding

    assert torch.equal(embedding(1), embedding(1))
    assert not torch.allclose(embedding(1), embedding(2))
    softmax = plain.hypernet(inputs).double()
    softmax.load_state_dict(network.state_dict())
    for name, weights in softmax.mixing().items():
        assert torch.equal(network.mixing()[name], weights)
    assert network.derive() == softmax.derive()
    network.eval(), softmax.eval()
    assert torch.equal(embedding(1), softmax(features).embedding)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_weight_half_step_has_the_same_weight_gradients_and_no_others(pairing, generator):
    space, inputs, batch = drawn_sizes(3, "released_code", pairing)
    network = scramble(space.hypernet(inputs).double(), generator)
    features = features_of(inputs, batch, generator)

    def gradients():
        network.zero_grad()
        network(features).embedding.square().sum().backward()
        return {name: p.grad for name, p in network.named_parameters()}

    everything = gradients()
    with network.weights_only():
        weights = gradients()
    assert {name for name, gradient in weights.items() if gradient is None} == {
        "arch.alpha",
        "arch.beta",
        "arch.gamma",
    }
    for name, gradient in weights.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, everything[name], rtol=1e-12, atol=1e-12)
    assert gradients()["arch.alpha"] is not None


def test_the_weight_half_step_ends_with_an_error(generator):
    space, inputs, _ = drawn_sizes(3, "released_code", "shared")
    network = space.hypernet(inputs)
    with pytest.raises(ZeroDivisionError), network.weights_only():
        raise ZeroDivisionError
    assert network.logits("alpha") is network.arch["alpha"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("seed", range(3))
def test_a_decided_hypernet_is_its_found_network(seed, protocol, training, generator):
    """With two mixtures, logits far apart leave one candidate in each choice; it is also what is derived."""
    space, inputs, batch = drawn_sizes(seed, protocol, "distinct")
    genotype = space.sample(inputs, generator)
    hypernet = scramble(space.hypernet(inputs).double(), generator).train(training)
    found = space.build(genotype, inputs).double().train(training)
    ours, theirs = named(found, genotype), named(hypernet)
    assert ours.keys() <= theirs.keys()
    with torch.no_grad():
        for name, (tensor, _) in ours.items():
            tensor.copy_(theirs[name][0])
        for logits in hypernet.arch.values():
            logits.zero_()
        for i, cell in enumerate(genotype.cells):
            names = [*inputs, *(f"cell.{c}" for c in range(i))]
            for side, name in enumerate(cell.inputs):
                hypernet.arch["alpha"][side, hypernet.edges[i]][names.index(name)] = 1e3
            for m, step in enumerate(cell.steps):
                for side, state in enumerate(step.inputs):
                    hypernet.arch["beta"][i, side, hypernet.inner[m]][state] = 1e3
                hypernet.arch["gamma"][i, m, list(space.ops).index(step.op)] = 1e3
    features = features_of(inputs, batch, generator)
    torch.testing.assert_close(
        hypernet(features).embedding, found(features).embedding, rtol=1e-10, atol=1e-10
    )
    derived = hypernet.derive()
    assert derived.genotype == genotype
    assert list(derived.margins.values()) == pytest.approx([1.0] * len(derived.margins))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_running_statistics_move_as_in_the_plain_hypernet(pairing, generator):
    space = FusionSpace(2, 2, 3, 4, 0.0, cell_outputs=2, attention_dropout=0.0, pairing=pairing)
    inputs = {"image.0": InputInfo((5, 4), "image"), "text.0": InputInfo((2, 1), "text")}
    network = scramble(space.hypernet(inputs), generator)
    plain = PlainHypernet(
        {name: info.shape for name, info in inputs.items()}, 3, 4, 2, 2, 0.0, pairing, 2, 2, 0.0
    )
    plain.load(reference_tensors(network))
    ours, theirs = (
        [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)] for model in (network, plain)
    )
    assert len(ours) == len(theirs) == 2 + 2 * (2 * 2 + 1)
    before = {name: m.running_var.clone() for name, m in network.named_modules() if hasattr(m, "running_var")}
    for module in theirs:
        module.reset_running_stats()
    for module in ours:
        module.reset_running_stats()
    for _ in range(2):
        features = features_of(inputs, 3, generator, torch.float32)
        torch.testing.assert_close(network(features).embedding, plain(features), rtol=1e-4, atol=1e-5)
    key = lambda m: (m.num_features, *m.weight.tolist())  # noqa: E731
    for mine, other in zip(sorted(ours, key=key), sorted(theirs, key=key), strict=True):
        assert torch.equal(mine.weight, other.weight)
        torch.testing.assert_close(mine.running_mean, other.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.running_var, other.running_var, rtol=1e-4, atol=1e-5)
        assert mine.num_batches_tracked == other.num_batches_tracked == 2
    assert len(before) == len(ours)


def test_a_missing_modality_reads_as_zero(generator):
    space, inputs, batch = drawn_sizes(2, "released_code", "distinct")
    inputs["text.0"] = InputInfo((3, 1), "text")
    network = space.hypernet(inputs).eval()
    features = features_of(inputs, batch, generator, torch.float32)
    present = {"text": torch.arange(batch) > 0}
    zeroed = dict(features, **{"text.0": features["text.0"].clone()})
    zeroed["text.0"][0] = 0
    assert torch.equal(network(features, present).embedding, network(zeroed).embedding)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_mixing_weights_have_a_name_each(pairing):
    space, inputs, _ = drawn_sizes(1, "released_code", pairing)
    network = space.hypernet(inputs)
    mixing, names = network.mixing(), network.choice_names()
    assert mixing.keys() == names.keys() == {"alpha", "beta", "gamma"}
    for key, weights in mixing.items():
        assert len(names[key]) == len(set(names[key])) == weights.numel()
    assert network.info.embedding == space.head_cells * space.channels * space.length


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("seed", range(3))
def test_a_pinned_hypernet_is_its_found_network(seed, protocol, generator):
    space, inputs, batch = drawn_sizes(seed, protocol, "distinct")
    genotype = space.sample(inputs, generator)
    hypernet = scramble(space.hypernet(inputs).double(), generator)
    found = space.build(genotype, inputs).double()
    ours, theirs = named(found, genotype), named(hypernet)
    with torch.no_grad():
        for name, (tensor, _) in ours.items():
            tensor.copy_(theirs[name][0])
    features = features_of(inputs, batch, generator)
    mixed = hypernet(features).embedding
    with hypernet.pinned(genotype):
        pinned = hypernet(features).embedding
        assert (
            torch.autograd.grad(pinned.sum(), list(hypernet.arch.values()), allow_unused=True) == (None,) * 3
        )
    torch.testing.assert_close(pinned, found(features).embedding, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hypernet(features).embedding, mixed)


def test_one_mixture_cannot_stand_for_single_genotypes(generator):
    space, inputs, _ = drawn_sizes(3, "released_code", "shared")
    with (
        pytest.raises(InputError, match="pairing=distinct"),
        space.hypernet(inputs).pinned(space.sample(inputs, generator)),
    ):
        pass

"""The supernet is the literal definition: outputs, every gradient, every running statistic."""

import pytest
import torch
from cnn_names import named, reference_tensors, scramble
from reference import plain_cnn_cells
from torch.func import functional_call

from mmnas_lab.search_space.base import held_weights
from mmnas_lab.search_space.cnn_cells import cell as cell_module
from mmnas_lab.search_space.cnn_cells import supernet as supernet_module
from mmnas_lab.search_space.cnn_cells.cell import MixedCell
from mmnas_lab.search_space.cnn_cells.mixed_ops import Noises
from mmnas_lab.search_space.cnn_cells.space import CnnCellSpace
from mmnas_lab.types import InputInfo

IMAGE = {"image": InputInfo((3, 8, 8), "image")}

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
SMALL = {"num_cells": 3, "channels": 4, "num_nodes": 3}
SPACES = {
    "darts": {**SMALL, "num_cells": 4},
    "channels last": {"num_cells": 3, "channels": 16, "num_nodes": 2},
    "two nodes": {**SMALL, "num_nodes": 2, "num_cells": 5},
    "fairdarts, sigmoid": {**SMALL, "vocabulary": "fairdarts", "relaxation": "sigmoid"},
    "gumbel": {**SMALL, "relaxation": "gumbel", "temperature": 0.7},
    "s1": {**SMALL, "vocabulary": "s1", "num_nodes": 4},
    "s2": {**SMALL, "vocabulary": "s2"},
    "s3": {**SMALL, "vocabulary": "s3"},
    "s4": {**SMALL, "vocabulary": "s4"},
    "partial channels": {**SMALL, "channels": 8, "partial_channels": 4},
    "partial channels, drop-path, sigmoid": {
        **SMALL,
        "partial_channels": 2,
        "search_drop_path": 0.4,
        "relaxation": "sigmoid",
    },
    "drop-path": {**SMALL, "search_drop_path": 0.4},
    "imagenet stem": {**SMALL, "stem": "imagenet"},
    "nas_bench_201": {"vocabulary": "nas_bench_201", "num_cells": 5, "channels": 4},
}


def supernet_of(option, generator):
    space = CnnCellSpace(**SPACES[option])
    size = (64, 32) if space.stem == "imagenet" else (12, 8)
    inputs = {"image": InputInfo((3, *size), "image")}
    network = scramble(space.hypernet(inputs).double(), generator)
    return space, network, torch.randn(3, 3, *size, generator=generator, dtype=torch.float64)


def results_of(outputs, tensors, directions):
    """Outputs and gradients by name, for a loss that reads every output."""
    sum((output * directions[name].to(output.dtype)).sum() for name, output in outputs.items()).backward()
    found = {name: output.detach() for name, output in outputs.items()}
    for name, (tensor, part) in tensors.items():
        if tensor.requires_grad:
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            found[f"gradient of {name}"] = gradient[part]
    return found


def with_taps(embedding, outputs, info):
    """The outputs that ours hands out: the last at each size."""
    found = {"embedding": embedding}
    for name, shape in info.taps.items():
        if name.startswith("stage."):
            found[name] = [o for o in outputs if tuple(o.shape[1:]) == shape][-1]
    return found


def assert_close_in_one_draw(results, draws):
    """float32 against float64 where an activation may lie on a kink.

    Of a ReLU or a max pooling whose inputs tie within rounding, the gradient may go the other way: a jump and
    no error, which a plain float32 network shows too. Outputs and running statistics have no jumps and must
    agree in every draw, all gradients in one of several.
    """
    for draw in range(draws):
        actual, expected = results(draw)
        smooth = [name for name in expected if "gradient" not in name]
        assert_close({n: actual[n] for n in smooth}, {n: expected[n] for n in smooth}, torch.float32)
        try:
            assert_close(actual, expected, torch.float32)
        except AssertionError:
            if draw == draws - 1:
                raise
        else:
            return


def assert_close(actual, expected, dtype):
    """Each tensor to the tolerance times its largest magnitude.

    A gradient far below the others of its network is rounding of larger ones: it is held to a hundredth of
    the largest.
    """
    assert actual.keys() == expected.keys()
    gradients = [value for name, value in expected.items() if "gradient" in name]
    largest = max((float(value.abs().max()) for value in gradients), default=0.0)
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 0.01 * largest if "gradient" in name else 0.0)
        error = float((actual[name].double() - value).abs().max())
        assert error <= TOLERANCE[dtype] * scale, f"{name} of scale {scale}: {error}"


def draws_of(network, monkeypatch, generator, batch):
    """Fixed draws of everything random, for ours and for the reference."""
    extra = {"noise": {}, "gumbel": {}, "kept": None, "bench": network.vocabulary == "nas_bench_201"}
    if network.relaxation == "gumbel" and network.training:
        shapes = {kind: network.arch[f"alpha_{kind}"].shape for kind in network.edge_ops}
        extra["gumbel"] = {
            kind: -torch.rand(shape, generator=generator, dtype=torch.float64).log().neg().log()
            for kind, shape in shapes.items()
        }
        queue = list(extra["gumbel"].values())
        monkeypatch.setattr(supernet_module, "gumbel_noise", lambda logits: queue.pop(0).to(logits))
    fan_of = {
        id(fan.own["noise"]): (name.removesuffix(".mixed"), leaving)
        for name, mixed in network.named_modules()
        if isinstance(mixed, MixedCell)
        for fan, leaving in zip(mixed.fans, mixed.leaving, strict=True)
        if "noise" in fan.own
    }

    def draw(self, x):
        name, leaving = fan_of[id(self)]
        parts = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in leaving]
        for e, part in zip(leaving, parts, strict=True):
            extra["noise"][f"{name}.edge.{e}.noise"] = part
        return torch.cat(parts, 1).to(x)

    monkeypatch.setattr(Noises, "draw", draw)
    if network.most_drop_path > 0:
        network.at_epoch(3, 4)
        assert network.drop_path == network.most_drop_path
        if network.training:
            extra["kept"], order = {}, []
            for name, mixed in network.named_modules():
                if isinstance(mixed, MixedCell):
                    order += [f"{name.removesuffix('.mixed')}.edge.{e}" for row in mixed.leaving for e in row]

            def kept(x, probability):
                factors = torch.rand(batch, 1, 1, 1, generator=generator, dtype=torch.float64) / probability
                extra["kept"][order[len(extra["kept"])]] = factors
                return factors.to(x)

            monkeypatch.setattr(cell_module, "kept", kept)
    return extra


def both(option, training, dtype, generator, monkeypatch):
    """Outputs, gradients and running statistics of ours in `dtype` and of the reference in float64."""
    space, network, image = supernet_of(option, generator)
    network.train(training)
    p = reference_tensors(network)
    network.to(dtype)
    extra = draws_of(network, monkeypatch, generator, len(image))

    output = network({"image": image.to(dtype)})
    assert {name: tuple(tap.shape[1:]) for name, tap in output.taps.items()} == network.info.taps
    ours = {"embedding": output.embedding, **output.taps}
    directions = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in ours.items()
    }
    actual = results_of(ours, named(network), directions)

    embedding, outputs = plain_cnn_cells.supernet(
        image,
        p,
        depth=space.num_cells,
        nodes=space.num_nodes,
        edge_ops=network.edge_ops,
        partial=space.partial_channels,
        relaxation=space.relaxation,
        temperature=space.temperature,
        training=training,
        extra=extra,
    )
    leaves = {name: (tensor, slice(None)) for name, tensor in p.items()}
    expected = results_of(with_taps(embedding, outputs, network.info), leaves, directions)
    for name, (tensor, part) in named(network).items():
        if "running" in name:
            actual[f"moved {name}"], expected[f"moved {name}"] = tensor[part].detach(), p[name]
    assert len(actual) > 50
    return actual, expected


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("option", SPACES)
def test_supernet_is_the_reference(option, training, generator, monkeypatch):
    assert_close(*both(option, training, torch.float64, generator, monkeypatch), torch.float64)


@pytest.mark.parametrize("option", SPACES)
def test_supernet_in_float32_is_the_reference(option, generator, monkeypatch):
    assert_close_in_one_draw(lambda _: both(option, True, torch.float32, generator, monkeypatch), draws=6)


@pytest.mark.parametrize("option", ["darts", "s1", "partial channels", "nas_bench_201"])
def test_the_weight_half_step_has_the_same_weight_gradients_and_no_others(option, generator):
    _, network, image = supernet_of(option, generator)

    def gradients():
        network.zero_grad()
        network({"image": image}).embedding.square().sum().backward()
        return {name: p.grad for name, p in network.named_parameters()}

    everything = gradients()
    with network.weights_only():
        weights = gradients()
    assert {name for name, gradient in weights.items() if gradient is None} == {
        f"arch.{name}" for name in network.arch
    }
    for name, gradient in weights.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, everything[name], rtol=1e-9, atol=1e-12)


def test_with_weights_held_the_architecture_half_step_keeps_less_for_the_same_gradients(generator):
    network = (
        CnnCellSpace(num_cells=3, channels=4).hypernet({"image": InputInfo((3, 16, 16), "image")}).double()
    )
    image = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    arch = list(network.arch.values())

    def half_step(held):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = functional_call(network, held, ({"image": image},))
        gradients = torch.autograd.grad(output.embedding.square().sum(), arch)
        return gradients, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    whole, much = half_step({})
    gradients, little = half_step(held_weights(network, arch))
    assert little < 0.85 * much
    for actual, expected in zip(gradients, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("option", ["darts", "channels last", "partial channels", "nas_bench_201"])
def test_gradients_can_be_differentiated_again(option, generator):
    """The exact unrolled step needs it: a directional derivative of alpha's gradient along the weights."""
    _, network, image = supernet_of(option, generator)
    arch = list(network.arch.values())
    weights = [p for name, p in network.named_parameters() if not name.startswith("arch")]
    loss = network({"image": image}).embedding.square().sum()
    gradients = torch.autograd.grad(loss, arch, create_graph=True)
    along = sum((gradient * gradient.detach()).sum() for gradient in gradients)
    second = torch.autograd.grad(along, weights, allow_unused=True)
    drawn = [None if s is None else torch.randn(s.shape, generator=generator, dtype=s.dtype) for s in second]
    expected = sum(float((s * d).sum()) for s, d in zip(second, drawn, strict=True) if s is not None)
    step = 1e-7

    def gradient_at(sign):
        with torch.no_grad():
            for weight, direction in zip(weights, drawn, strict=True):
                if direction is not None:
                    weight.add_(sign * step * direction)
        moved = torch.autograd.grad(network({"image": image}).embedding.square().sum(), arch)
        return sum(float((g * h.detach()).sum()) for g, h in zip(moved, gradients, strict=True))

    above = gradient_at(1)
    measured = (above - gradient_at(-2)) / (2 * step)
    assert measured == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("option", SPACES)
def test_mixing_weights_have_a_name_each(option, generator):
    _, network, _ = supernet_of(option, generator)
    mixing, names = network.mixing(), network.choice_names()
    assert mixing.keys() == names.keys() == set(network.arch)
    for key, weights in mixing.items():
        assert len(names[key]) == len(set(names[key])) == weights.numel()
        if key.startswith("alpha") and network.relaxation != "sigmoid":
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))


def test_gumbel_draws_in_training_and_not_in_evaluation(generator):
    _, network, image = supernet_of("gumbel", generator)
    torch.manual_seed(0)
    first = network({"image": image}).embedding
    assert not torch.equal(first, network({"image": image}).embedding)
    torch.manual_seed(0)
    assert torch.equal(first, network({"image": image}).embedding)
    network.eval()
    assert torch.equal(network({"image": image}).embedding, network({"image": image}).embedding)


def test_noise_of_s4_is_fresh_in_evaluation_too(generator):
    _, network, image = supernet_of("s4", generator)
    network.eval()
    assert not torch.equal(network({"image": image}).embedding, network({"image": image}).embedding)


def test_a_missing_image_reads_as_zero(generator):
    _, network, image = supernet_of("darts", generator)
    network.eval()
    zeroed = image.clone()
    zeroed[0] = 0
    present = {"image": torch.arange(3) > 0}
    expected = network({"image": zeroed}).embedding
    assert torch.equal(network({"image": image}, present).embedding, expected)


def test_drop_path_keeps_the_mean():
    x = torch.ones(20000, 1, 1, 1)
    torch.manual_seed(0)
    factors = cell_module.kept(x, 0.3)
    assert sorted(set(factors.flatten().tolist())) == pytest.approx([0.0, 1 / 0.7])
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.02)


def genotype_with_skips(skips):
    """A genotype of DARTS' form whose normal cell has so many skip connections."""
    ops = ["skip_connect"] * skips + ["sep_conv_3x3"] * (8 - skips)
    normal = [[{"op": ops[2 * node + k], "input": k} for k in range(2)] for node in range(4)]
    reduce = [[{"op": "skip_connect", "input": k} for k in range(2)] for _ in range(4)]
    cells = [{"kind": "normal", "nodes": normal}, {"kind": "reduce", "nodes": reduce}]
    return CnnCellSpace().parse({"space": "cnn_cells", "schema": 1, "cells": cells}, IMAGE)


@pytest.mark.parametrize("skips", [0, 4, 5, 8])
def test_skip_connections_are_counted_and_warned_of(skips):
    network = CnnCellSpace(num_cells=3, channels=2).hypernet(IMAGE)
    genotype = genotype_with_skips(skips)
    assert network.monitors(genotype) == {"skips_normal": float(skips), "skips_reduce": 8.0}
    alarm = network.alarm(genotype)
    assert (alarm is not None) == (skips > 4)
    if alarm:
        assert f"{skips} of its 8" in alarm


PINNED = {
    "fairdarts": {"vocabulary": "fairdarts", "num_nodes": 3},
    "darts": {"num_nodes": 3},
    "partial": {"num_nodes": 2, "partial_channels": 2, "channels": 8},
    "s1": {"vocabulary": "s1"},
    "nas_bench_201": {"vocabulary": "nas_bench_201", "num_cells": 5},
}


@pytest.mark.parametrize("case", PINNED)
def test_a_pinned_supernet_weighs_one_genotype_alone(case, generator):
    """As with these weights in place of the relaxed ones, where every operation is computed."""
    space = CnnCellSpace(**{"num_cells": 3, "channels": 4, **PINNED[case]})
    torch.manual_seed(1)
    network = space.hypernet(IMAGE).double().eval()
    genotype = space.sample(IMAGE, generator)
    image = {"image": torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=generator)}
    weights = network.one_hot(genotype)
    relaxed = {name: value.double() for name, value in weights.items()}
    network._weights = lambda kind: relaxed[f"alpha_{kind}"]
    network._edge_weights = lambda kind: relaxed.get(f"beta_{kind}")
    dense = network(image).embedding
    del network._weights, network._edge_weights
    with network.pinned(genotype):
        pinned = network(image).embedding
    torch.testing.assert_close(pinned, dense, rtol=1e-10, atol=1e-12)
    for cell in genotype.cells:
        ops = {edge.op for node in cell.nodes for edge in node} - {"none"}
        count = sum(edge.op != "none" for node in cell.nodes for edge in node)
        assert int(weights[f"alpha_{cell.kind}"].sum()) == count
        assert ops or case == "nas_bench_201"


def test_a_pinned_step_moves_the_operations_of_its_genotype_alone(generator):
    space = CnnCellSpace(num_cells=3, channels=4, vocabulary="fairdarts", num_nodes=2)
    network = space.hypernet(IMAGE)
    image = {"image": torch.randn(3, 3, 8, 8, generator=generator)}
    with network.pinned(space.sample(IMAGE, generator)):
        network(image).embedding.sum().backward()
    trained = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
    left = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert any(".own." in name for name in trained)
    assert any(".own." in name for name in left)
    assert {name for name in left if name.startswith("arch.")} == {f"arch.{name}" for name in network.arch}

"""Found networks are the literal definition, and have the published numbers of parameters."""

import math

import pytest
import torch
from reference import plain_cnn_cells
from test_supernet import assert_close, assert_close_in_one_draw, results_of, with_taps

from mmnas_lab.search_space.cnn_cells import found_network as found_module
from mmnas_lab.search_space.cnn_cells.found_network import AUXILIARY
from mmnas_lab.search_space.cnn_cells.space import CnnCellSpace
from mmnas_lab.types import InputError, InputInfo

CIFAR = {"image": InputInfo((3, 32, 32), "image")}
SMALL = {"found_cells": 3, "found_channels": 4}
BENCH = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|none~2|"
CASES = {
    "DARTS_V2, drop-path": ("DARTS_V2", {**SMALL, "found_cells": 4, "drop_path": 0.5}, (16, 16)),
    "PC_DARTS_cifar, auxiliary": ("PC_DARTS_cifar", {**SMALL, "auxiliary": True}, (32, 32)),
    "DARTS_V1, channels last": ("DARTS_V1", {**SMALL, "found_channels": 16}, (8, 8)),
    "FairDARTS_c, drop-path on nodes": (
        "FairDARTS_c",
        {**SMALL, "drop_path": 0.5, "drop_path_on": "nodes"},
        (12, 8),
    ),
    "PDARTS, imagenet, auxiliary": (
        "PDARTS",
        {**SMALL, "stem": "imagenet", "auxiliary": True},
        (192, 192),
    ),
    "nas_bench_201": (
        BENCH,
        {"vocabulary": "nas_bench_201", "found_cells": 5, "found_channels": 4},
        (12, 8),
    ),
    "nas_bench_201, all none": (
        BENCH.replace("skip_connect", "none").replace("nor_conv_1x1", "none").replace("avg_pool_3x3", "none"),
        {"vocabulary": "nas_bench_201", "found_cells": 5, "found_channels": 4},
        (8, 8),
    ),
}


def both(case, training, dtype, generator, monkeypatch):
    """Outputs, gradients and running statistics of ours in `dtype` and of the reference in float64."""
    name, settings, size = CASES[case]
    inputs = {"image": InputInfo((3, *size), "image")}
    space = CnnCellSpace(**settings)
    genotype = space.fixed(name, inputs)
    torch.manual_seed(0)
    network = space.build(genotype, inputs).double().train(training)
    tensors = {n: t for n, t in network.state_dict(keep_vars=True).items() if "num_batches" not in n}
    p = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    network.to(dtype)
    batch = 8 if space.auxiliary else 3  # the tower's last BatchNorm has one value a sample
    image = torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)
    drawn, drop = [], training and settings.get("drop_path", 0) > 0
    if drop:
        network.at_epoch(1, 2)
        assert network.drop_path == 0.25

    def kept(x, probability):
        drawn.append(torch.rand(batch, 1, 1, 1, generator=generator, dtype=torch.float64))
        return drawn[-1].to(x)

    monkeypatch.setattr(found_module, "kept", kept)
    output = network({"image": image.to(dtype)})
    taps = {n: s for n, s in network.info.taps.items() if training or n != "auxiliary"}
    assert {n: tuple(tap.shape[1:]) for n, tap in output.taps.items()} == taps
    ours = {"embedding": output.embedding, **output.taps}
    directions = {
        n: torch.randn(value.shape, generator=generator, dtype=torch.float64) for n, value in ours.items()
    }
    tensors = {n: t for n, t in network.state_dict(keep_vars=True).items() if "num_batches" not in n}
    actual = results_of(ours, {n: (t, slice(None)) for n, t in tensors.items()}, directions)

    cells = {
        cell.kind: [[(edge.op, edge.input) for edge in node] for node in cell.nodes]
        for cell in genotype.cells
    }
    queue = list(drawn)
    embedding, outputs, vector = plain_cnn_cells.found(
        image,
        p,
        cells,
        depth=space.found_cells,
        training=training,
        drop_path_on=space.drop_path_on,
        kept=(lambda: queue.pop(0)) if drop else None,
        auxiliary=space.auxiliary,
    )
    assert not queue
    expected = with_taps(embedding, outputs, network.info)
    if vector is not None:
        expected["auxiliary"] = vector
    expected = results_of(expected, {n: (t, slice(None)) for n, t in p.items()}, directions)
    for n, tensor in tensors.items():
        if "running" in n:
            actual[f"moved {n}"], expected[f"moved {n}"] = tensor.detach(), p[n].detach()
    return actual, expected


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_found_network_is_the_reference(case, training, generator, monkeypatch):
    assert_close(*both(case, training, torch.float64, generator, monkeypatch), torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_found_network_in_float32_is_the_reference(case, generator, monkeypatch):
    assert_close_in_one_draw(lambda _: both(case, True, torch.float32, generator, monkeypatch), draws=6)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# Measured with the released modules: CIFAR-10 and CIFAR-100, each without and with auxiliary head.
PARAMETERS = {
    "DARTS_V1": (3_169_414, 3_645_840, 3_221_344, 3_766_980),
    "DARTS_V2": (3_349_342, 3_825_768, 3_401_272, 3_946_908),
    "PC_DARTS_cifar": (3_634_678, 4_111_104, 3_686_608, 4_232_244),
    "PC_DARTS_image": (3_721_510, 4_197_936, 3_773_440, 4_319_076),
    "PDARTS": (3_433_798, 3_910_224, 3_485_728, 4_031_364),
    "FairDARTS_a": (2_360_782, 2_837_208, 2_399_752, 2_945_388),
    "FairDARTS_b": (3_407_878, 3_884_304, 3_459_808, 4_005_444),
    "FairDARTS_c": (2_598_814, 3_075_240, 2_637_784, 3_183_420),
    "FairDARTS_d": (3_365_542, 3_841_968, 3_417_472, 3_963_108),
    "FairDARTS_e": (2_643_742, 3_120_168, 2_682_712, 3_228_348),
    "FairDARTS_f": (3_151_054, 3_627_480, 3_202_984, 3_748_620),
    "FairDARTS_g": (2_899_054, 3_375_480, 2_938_024, 3_483_660),
}
IMAGENET_PARAMETERS = {
    "DARTS_V1": (4_510_432, 5_771_208),
    "DARTS_V2": (4_718_752, 5_979_528),
    "PC_DARTS_cifar": (5_270_560, 6_531_336),
    "PC_DARTS_image": (5_342_464, 6_603_240),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_genotypes_have_their_parameters_on_cifar(name):
    space = CnnCellSpace(auxiliary=True)
    with torch.device("meta"):
        network = space.build(space.fixed(name, CIFAR), CIFAR)
    tower = count(network.auxiliary)
    found = []
    for classes in (10, 100):
        without = count(network) - tower + (network.info.embedding + 1) * classes
        found += [without, without + tower + (AUXILIARY + 1) * classes]
    assert tuple(found) == PARAMETERS[name]
    with torch.device("meta"):
        bare = CnnCellSpace().build(space.fixed(name, CIFAR), CIFAR)
    assert count(bare) == count(network) - tower
    assert network.info.embedding == (432 if name[-2:] in ("_a", "_c", "_e", "_g") else 576)


@pytest.mark.parametrize("name", IMAGENET_PARAMETERS)
def test_published_genotypes_have_their_parameters_on_imagenet(name):
    inputs = {"image": InputInfo((3, 224, 224), "image")}
    space = CnnCellSpace(stem="imagenet", auxiliary=True)
    with torch.device("meta"):
        network = space.build(space.fixed(name, inputs), inputs)
    tower = count(network.auxiliary)
    without = count(network) - tower + (network.info.embedding + 1) * 1000
    assert (without, without + tower + (AUXILIARY + 1) * 1000) == IMAGENET_PARAMETERS[name]
    assert [shape[1:] for shape in network.info.taps.values()] == [(28, 28), (14, 14), (7, 7), ()]


@pytest.mark.parametrize(
    ("op", "counts"),
    [
        ("nor_conv_3x3", (1_531_546, 1_537_396, 1_538_696)),
        ("skip_connect", (73_306, 79_156, 80_456)),
        ("nor_conv_1x1", (241_306, 247_156, 248_456)),
    ],
)
def test_nas_bench_201_networks_have_their_parameters(op, counts):
    space = CnnCellSpace(vocabulary="nas_bench_201")
    text = f"|{op}~0|+|{op}~0|{op}~1|+|{op}~0|{op}~1|{op}~2|"
    network = space.build(space.fixed(text, CIFAR), CIFAR)
    assert tuple(count(network) + 65 * classes for classes in (10, 100, 120)) == counts


@pytest.mark.parametrize(
    ("settings", "weights", "logits"),
    [
        ({}, 1_930_618, 224),
        ({"vocabulary": "fairdarts"}, 1_930_618, 196),
        ({"partial_channels": 4}, 299_578, 252),
        ({"vocabulary": "s1"}, 405_146, 56),
        ({"vocabulary": "s2"}, 665_466, 56),
        ({"vocabulary": "s3"}, 665_466, 84),
        ({"vocabulary": "s4"}, 624_506, 56),
        ({"vocabulary": "nas_bench_201"}, 1_686_106, 30),
    ],
)
def test_supernets_have_their_parameters(settings, weights, logits):
    network = CnnCellSpace(**settings).hypernet(CIFAR)
    arch = sum(parameter.numel() for parameter in network.arch.values())
    assert arch == logits
    assert count(network) - arch + (network.info.embedding + 1) * 10 == weights


def test_the_darts_supernet_has_its_parameters_cell_by_cell():
    network = CnnCellSpace().hypernet(CIFAR)
    cells = [count(cell) for cell in network.skeleton.cells]
    assert cells == [45_888, 46_144, 144_000, 137_856, 139_904, 484_608, 460_032, 468_224]
    assert count(network.skeleton.stem) == 1_392
    sizes = [tuple(shape) for shape in network.info.taps.values()]
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    assert count(CnnCellSpace().hypernet(CIFAR)) - 224 + 257 * 100 == 1_953_748


def test_fresh_weights_are_drawn_as_convolutions_draw_theirs():
    network = CnnCellSpace().hypernet(CIFAR)
    convs = network.skeleton.cells[7].mixed.fans[0].own["sep_conv_5x5"]
    for parameter, fan_in in ((convs.depthwise[0], 25), (convs.pointwise[0], 64)):
        weight = parameter.detach()
        assert float(weight.abs().max()) <= 1 / math.sqrt(fan_in)
        assert float(weight.std()) == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.05)


def test_drop_path_spares_identities_in_darts_and_takes_them_in_fairdarts(monkeypatch):
    """With every sample dropped, what is left of a cell is its identities alone."""
    monkeypatch.setattr(found_module, "kept", lambda x, probability: torch.zeros(len(x), 1, 1, 1))
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"image": InputInfo((3, 16, 16), "image")}
    left = {}
    for where in ("edges", "nodes"):
        space = CnnCellSpace(**SMALL, drop_path_on=where, drop_path=0.5)
        network = space.build(space.fixed("DARTS_V2", inputs), inputs)
        network.at_epoch(1, 2)
        left[where] = network({"image": image}).taps["stage.0"].abs().amax((0, 2, 3)).view(4, -1).amax(1) > 0
    # Normal cell of DARTS_V2: nodes 4 and 5 have the identity of input 0.
    assert left["edges"].tolist() == [False, False, True, True]
    assert left["nodes"].tolist() == [False] * 4


def test_drop_path_of_a_stage_may_be_overridden():
    space = CnnCellSpace(**SMALL)
    network = space.build(space.fixed("DARTS_V1", CIFAR), CIFAR, dropout=0.0)
    network.at_epoch(5, 10)
    assert network.drop_path == 0
    network = space.build(space.fixed("DARTS_V1", CIFAR), CIFAR)
    network.at_epoch(5, 10)
    assert network.drop_path == pytest.approx(0.1)


@pytest.mark.parametrize("size", [(30, 32), (32, 2), (33, 33)])
@pytest.mark.parametrize("vocabulary", ["darts", "nas_bench_201"])
def test_sizes_that_cannot_be_halved_are_refused(size, vocabulary):
    inputs = {"image": InputInfo((3, *size), "image")}
    space = CnnCellSpace(vocabulary=vocabulary)
    with pytest.raises(InputError, match=r"must be multiples of 4; resize or pad them to 4|to (28|32) or 3"):
        space.hypernet(inputs)
    with pytest.raises(InputError, match="cannot be halved as often as cnn_cells does with the cifar stem"):
        space.build(space.sample(CIFAR, torch.Generator().manual_seed(0)), inputs)
    with pytest.raises(InputError, match="multiples of 32; resize or pad them to 224 or 256"):
        CnnCellSpace(stem="imagenet").hypernet({"image": InputInfo((3, 240, 240), "image")})


def test_other_inputs_than_one_image_are_refused():
    features = {"image.0": InputInfo((8, 16), "image"), "text.0": InputInfo((8, 1), "text")}
    with pytest.raises(InputError, match="reads one image of .* got image.0 .*search_space=fusion"):
        CnnCellSpace().hypernet(features)


def test_an_auxiliary_tower_on_small_maps_is_refused():
    inputs = {"image": InputInfo((3, 16, 16), "image")}
    space = CnnCellSpace(auxiliary=True)
    with pytest.raises(InputError, match="at least 6 x 6 positions .* got 4 x 4; set search_space.auxiliary"):
        space.build(space.fixed("DARTS_V1", inputs), inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_cells": 2}, "at least 3 cells"),
        ({"vocabulary": "nas_bench_201", "num_cells": 8 + 1}, r"3 N \+ 2 \(5, 8, 11, 14 or 17\), got 9"),
        ({"vocabulary": "s1", "num_nodes": 3}, "s1 names the operations of 4 nodes, got num_nodes=3"),
        ({"partial_channels": 3}, "set search_space.channels to a multiple of 6"),
        ({"channels": 15}, "search_space.channels must be even"),
        ({"channels": 0}, "search_space.channels must be at least 1"),
        ({"drop_path": 1.0}, r"search_space.drop_path must be in \[0, 1\), got 1"),
        ({"temperature": 0.0}, "search_space.temperature must be positive"),
        ({"vocabulary": "nas_bench_201", "auxiliary": True}, "set .*search_space.auxiliary=false"),
        ({"threshold": -0.1}, r"search_space.threshold must be in \[0, 1\]"),
        ({"init_scale": -1.0}, "search_space.init_scale must be at least 0"),
    ],
)
def test_settings_that_make_no_supernet_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CnnCellSpace(**settings).hypernet(CIFAR)

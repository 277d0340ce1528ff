"""Derivation against brute force, genotypes through JSON, published ones, and what is refused."""

import json
import math
import random
import re

import pytest
import torch
from reference import plain_cnn_cells

from mmnas_lab.search_space.cnn_cells.genotype import (
    bench_201_genotype,
    bench_201_string,
    check_genotype,
)
from mmnas_lab.search_space.cnn_cells.published import PUBLISHED, published
from mmnas_lab.search_space.cnn_cells.space import CnnCellSpace
from mmnas_lab.search_space.cnn_cells.vocabulary import edge_ops
from mmnas_lab.types import InputError, InputInfo

IMAGE = {"image": InputInfo((3, 8, 8), "image")}
RULES = {
    "darts": {},
    "s1": {"vocabulary": "s1"},
    "s4": {"vocabulary": "s4"},
    "partial": {"partial_channels": 2},
    "fairdarts": {"vocabulary": "fairdarts", "relaxation": "sigmoid", "derivation": "threshold_sparse"},
    "threshold_edge": {"vocabulary": "darts", "relaxation": "sigmoid", "derivation": "threshold_edge"},
    "one node": {"num_nodes": 1},
    "nas_bench_201": {"vocabulary": "nas_bench_201", "num_cells": 5},
}


def literal(cell):
    return [[(edge.op, edge.input) for edge in node] for node in cell.nodes]


def weights_of(network, kind):
    """Mixing weights as python floats, summed exactly."""
    rows = network.arch[f"alpha_{kind}"].detach().double().tolist()
    if network.relaxation == "sigmoid":
        return [[1 / (1 + math.exp(-z)) for z in row] for row in rows]
    found = [[math.exp(z) / math.fsum(map(math.exp, row)) for z in row] for row in rows]
    if network.partial > 1:
        beta = network.arch[f"beta_{kind}"].detach().double()
        edge = plain_cnn_cells.edge_softmax(beta, network.num_inputs, network.num_nodes).tolist()
        found = [[w * b for w in row] for row, b in zip(found, edge, strict=True)]
    return found


@pytest.mark.parametrize("ties", [False, True], ids=["drawn", "ties"])
@pytest.mark.parametrize("option", RULES)
def test_derivation_is_brute_force(option, ties):
    space = CnnCellSpace(**{"num_cells": 3, "channels": 4, "threshold": 0.7, **RULES[option]})
    network = space.hypernet(IMAGE)
    for seed in range(15):
        torch.manual_seed(seed)
        with torch.no_grad():
            for logits in network.arch.values():
                logits.copy_(torch.randint(0, 2, logits.shape) if ties else 2 * torch.randn(logits.shape))
        derived = network.derive()
        for kind, ops in network.edge_ops.items():
            expected, leads = plain_cnn_cells.derive_cell(
                weights_of(network, kind),
                ops,
                network.num_inputs,
                network.num_nodes,
                network.rule,
                space.threshold,
            )
            assert literal(derived.genotype.cell(kind)) == expected
            found = [
                v for name, v in derived.margins.items() if re.fullmatch(rf"{kind}\.node\.\d\.edges", name)
            ]
            assert found == pytest.approx(leads, abs=1e-9)
        assert all(margin >= 0 for margin in derived.margins.values())


def test_all_logits_equal_takes_the_first_of_everything_with_margins_of_zero():
    network = CnnCellSpace(num_cells=3, channels=4).hypernet(IMAGE)
    with torch.no_grad():
        for logits in network.arch.values():
            logits.fill_(0.3)
    derived = network.derive()
    for cell in derived.genotype.cells:
        assert literal(cell) == [[("max_pool_3x3", 0), ("max_pool_3x3", 1)]] * 4
    margins = derived.margins
    assert {margins[name] for name in margins if name.endswith("op")} == {0.0}
    assert {margins[f"normal.node.{i}.edges"] for i in (3, 4, 5)} == {0.0}
    assert margins["normal.node.2.edges"] == pytest.approx(1 / 8)  # two edges: neither can lose


def test_none_is_not_taken_but_weakens_its_edge():
    network = CnnCellSpace(num_cells=3, channels=4).hypernet(IMAGE)
    with torch.no_grad():
        for logits in network.arch.values():
            logits.zero_()
            logits[:, 4] = 1.0  # sep_conv_3x3
            logits[2, 0] = 5.0  # none on 0->3
    derived = network.derive()
    assert literal(derived.genotype.cell("normal"))[1] == [("sep_conv_3x3", 1), ("sep_conv_3x3", 2)]


def test_fairdarts_leaves_nodes_without_edges_and_refuses_an_empty_cell():
    space = CnnCellSpace(
        vocabulary="fairdarts",
        relaxation="sigmoid",
        derivation="threshold_sparse",
        num_cells=3,
        channels=4,
        found_cells=3,
        found_channels=4,
    )
    network = space.hypernet(IMAGE)
    with torch.no_grad():
        for logits in network.arch.values():
            logits.zero_()
    with pytest.raises(
        InputError, match="normal cell of the genotype has no edge.*lower search_space.threshold"
    ):
        space.build(network.derive().genotype, IMAGE)
    with torch.no_grad():
        for logits in network.arch.values():
            logits[0, 3] = math.log(0.85 / 0.15) + 1e-6  # sep_conv_3x3 on 0->2, just above 0.85
            logits[9, 3] = math.log(0.85 / 0.15) - 1e-3  # 0->5, just below
    genotype = network.derive().genotype
    assert literal(genotype.cell("normal")) == [[("sep_conv_3x3", 0)], [], [], []]
    built = space.build(genotype, IMAGE).eval()
    assert built({"image": torch.randn(1, 3, 8, 8)}).embedding.shape == (1, 4 * 4)


def test_s1_is_the_published_table():
    normal, reduce = (edge_ops("s1", kind, 4) for kind in ("normal", "reduce"))
    assert len(normal) == len(reduce) == 14
    assert normal[0] == ("skip_connect", "dil_conv_3x3")
    assert normal[5] == ("max_pool_3x3", "skip_connect")
    assert normal[12] == normal[13] == ("dil_conv_3x3", "dil_conv_5x5")
    assert reduce[1] == ("max_pool_3x3", "dil_conv_3x3")
    assert reduce[6] == ("max_pool_3x3", "sep_conv_3x3")
    assert reduce[13] == ("skip_connect", "dil_conv_5x5")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_genotypes_survive_json(name):
    genotype = published(name)
    again = CnnCellSpace().parse(json.loads(json.dumps(genotype.to_json())), IMAGE)
    assert again == genotype
    assert hash(again) == hash(genotype)
    for cell in genotype.cells:
        assert len(cell.nodes) == 4
        if not name.startswith("Fair"):
            assert [len(node) for node in cell.nodes] == [2] * 4


def test_an_edge_from_an_absent_node_is_passed_over():
    live = published("FairDARTS_c").cell("normal").live_nodes(2)
    assert list(live) == [2, 4, 5]
    assert [(edge.op, edge.input) for edge in live[5]] == [("sep_conv_3x3", 0)]


@pytest.mark.parametrize("settings", [*RULES.values(), {"num_nodes": 2}], ids=[*RULES, "two nodes"])
def test_sampled_genotypes_build_and_their_choices_are_listed(settings, generator):
    small = {"num_cells": 3, "channels": 4, "found_cells": 3, "found_channels": 4, **settings}
    if settings.get("vocabulary") == "nas_bench_201":
        small["found_cells"] = 5
    space = CnnCellSpace(**small)
    options = {choice.name: choice.options for choice in space.choices(IMAGE)}
    seen = set()
    for _ in range(20):
        genotype = space.sample(IMAGE, generator)
        assert space.parse(json.loads(json.dumps(genotype.to_json())), IMAGE) == genotype
        for cell in genotype.cells:
            for state, node in enumerate(cell.nodes, 1 if space.rule == "argmax" else 2):
                if space.rule != "argmax":
                    pair = ",".join(str(edge.input) for edge in node)
                    assert pair in options[f"{cell.kind}.node.{state}.edges"]
                for edge in node:
                    assert edge.op in options[f"{cell.kind}.node.{state}.edge.{edge.input}.op"]
                    seen.add(edge.op)
    assert len(seen) > 1
    network = space.build(genotype, IMAGE).eval()
    assert network({"image": torch.randn(1, 3, 8, 8)}).embedding.shape == (1, network.info.embedding)


def test_nas_bench_201_notation_goes_both_ways(generator):
    space = CnnCellSpace(vocabulary="nas_bench_201")
    for _ in range(5):
        genotype = space.sample(IMAGE, generator)
        assert bench_201_genotype(bench_201_string(genotype)) == genotype
    text = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"
    assert bench_201_string(bench_201_genotype(text)) == text
    with pytest.raises(InputError, match=r"not an architecture of NAS-Bench-201: 'DARTS_V2'; its form is"):
        space.fixed("DARTS_V2", IMAGE)


def broken(**changes):
    """DARTS_V2's JSON with some parts exchanged."""
    return {**published("DARTS_V2").to_json(), **changes}


def with_edge(op, source):
    data = broken()
    data["cells"][1]["nodes"][0][1] = {"op": op, "input": source}
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            broken(space="fusion"),
            "is of space 'fusion', schema 1; cnn_cells reads space 'cnn_cells', schema 1",
        ),
        (broken(schema=2), "schema 2; cnn_cells reads space 'cnn_cells', schema 1; set search_space"),
        ([], "a JSON object is needed"),
        (broken(cells=[{}]), "not a genotype of cnn_cells: KeyError 'kind'; see genotype.json of a run"),
        (broken(cells=3), "not a genotype of cnn_cells: TypeError"),
        (
            with_edge("conv_7x7", 0),
            "node 2 of the reduce cell applies 'conv_7x7'; the operations are max_pool",
        ),
        (with_edge("none", 0), "node 2 of the reduce cell applies 'none'"),
        (with_edge("skip_connect", 2), "node 2 of the reduce cell reads state 2; there are 0 to 1"),
        (with_edge("skip_connect", -1), "reads state -1"),
        (broken(cells=broken()["cells"][:1]), "needs the cells normal, reduce, the genotype has normal"),
    ],
)
def test_bad_genotypes_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        CnnCellSpace().parse(data, IMAGE)


def test_a_genotype_of_the_other_topology_is_refused(generator):
    bench = CnnCellSpace(vocabulary="nas_bench_201")
    genotype = bench.sample(IMAGE, generator)
    with pytest.raises(InputError, match="genotype has cell; .*search_space.vocabulary=nas_bench_201"):
        check_genotype(genotype, "darts", CnnCellSpace().found_ops())
    with pytest.raises(InputError, match="no published genotype 'DARTS_V3'; there are DARTS_V1, DARTS_V2"):
        CnnCellSpace().fixed("DARTS_V3", IMAGE)


def test_uniform_sampling_reaches_every_source_and_operation():
    space, draws = (
        CnnCellSpace(vocabulary="s2"),
        torch.Generator().manual_seed(random.Random(0).randint(0, 9)),
    )
    counts = {}
    for _ in range(1000):
        node = space.sample(IMAGE, draws).cell("normal").nodes[1]
        counts[tuple(edge.input for edge in node)] = counts.get(tuple(edge.input for edge in node), 0) + 1
    assert set(counts) == {(0, 1), (0, 2), (1, 2)}
    assert all(250 < count < 420 for count in counts.values())

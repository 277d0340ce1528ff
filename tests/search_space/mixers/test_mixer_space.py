"""The space of mixers: its choices, genotypes and networks, and M2-Mixer's sizes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from mmnas_lab.build import build_with_facts, check_node, check_schema
from mmnas_lab.objective.multi_head import MultiHead
from mmnas_lab.search_space.mixers.genotype import MixerGenotype
from mmnas_lab.search_space.mixers.space import MixerSpace
from mmnas_lab.types import InputError, InputInfo

PACKAGE = "mmnas_lab.search_space.mixers"
MLP = {"_target_": f"{PACKAGE}.mlp_mixer.MLPMixer", "token_hidden": 5, "channel_hidden": 7, "num_blocks": 2}
HYPER = {**MLP, "_target_": f"{PACKAGE}.hyper_mixer.HyperMixer"}
MONARCH = {"_target_": f"{PACKAGE}.monarch_mixer.MonarchMixer", "num_blocks": 2}
RAMLP = {
    "_target_": f"{PACKAGE}.ramlp.RaMLP",
    "depths": [1, 1, 1, 1],
    "widths": [4, 4, 8, 8],
    "heads": [1, 1, 2, 2],
}
FEED_FORWARD = {"_target_": f"{PACKAGE}.feed_forward.FeedForward"}
NODES = {
    "image": {"mlp_mixer": {**MLP, "patch": 4}, "hyper_mixer": {**HYPER, "patch": 4}, "ramlp": RAMLP},
    "text": {"mlp_mixer": MLP, "hyper_mixer": HYPER, "monarch_mixer": MONARCH},
    "tabular": {"feed_forward": FEED_FORWARD},
}
INPUTS = {
    "image": InputInfo((3, 8, 12), "image", "image"),
    "text": InputInfo((5, 9), "text", "text"),
    "static": InputInfo((4,), "static", "tabular"),
}
ALL = ["concat", "mean", "max", "sum", "product", "gated"]
FUSION = {"hyper_mixer": HYPER, "mlp_mixer": MLP}


def space(encoders=NODES, functions=ALL, networks=FUSION, **settings):
    return MixerSpace(encoders, functions, networks, **{"width": 6, "dropout": 0.0, **settings})


def batch(count, generator, inputs=INPUTS):
    return {name: torch.randn(count, *info.shape, generator=generator) for name, info in inputs.items()}


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


# Choices and genotypes.


def test_choices_come_in_greedy_order_and_those_with_one_option_are_kept():
    choices = {choice.name: choice.options for choice in space().choices(INPUTS)}
    assert list(choices) == [
        "encoder.image",
        "encoder.text",
        "encoder.static",
        "fusion_function",
        "fusion_network",
    ]
    assert choices["encoder.static"] == ("feed_forward",)
    assert choices["fusion_network"] == ("hyper_mixer", "mlp_mixer")
    (only,) = space().choices({"text": INPUTS["text"]})
    assert only.name == "encoder.text"


def test_options_are_scored_in_the_networks_of_a_greedy_search():
    ours, chosen = space(), {}
    assert ours.candidate("encoder.text", "monarch_mixer", chosen, INPUTS) == MixerGenotype(
        (("text", "monarch_mixer"),)
    )
    chosen |= {
        "encoder.image": "ramlp",
        "encoder.text": "monarch_mixer",
        "encoder.static": "feed_forward",
    }
    encoders = (("image", "ramlp"), ("text", "monarch_mixer"), ("static", "feed_forward"))
    assert ours.candidate("fusion_function", "max", chosen, INPUTS) == MixerGenotype(
        encoders, "max", "hyper_mixer"
    )
    chosen["fusion_function"] = "mean"
    genotype = ours.candidate("fusion_network", "mlp_mixer", chosen, INPUTS)
    assert genotype == MixerGenotype(encoders, "mean", "mlp_mixer")
    assert genotype == ours.genotype_of({**chosen, "fusion_network": "mlp_mixer"}, INPUTS)
    with pytest.raises(InputError, match="no choice 'encoder.txt'; did you mean encoder.text"):
        ours.candidate("encoder.txt", "mlp_mixer", {}, INPUTS)
    with pytest.raises(InputError, match="encodes 'text' by 'mlp', which .*; did you mean mlp_mixer"):
        ours.candidate("encoder.text", "mlp", {}, INPUTS)
    with pytest.raises(InputError, match="no option is chosen for encoder.image; take one of"):
        ours.candidate("fusion_function", "max", {}, INPUTS)


def test_sampled_genotypes_survive_json_build_and_reach_every_option(generator):
    ours, seen = space(), set()
    for _ in range(60):
        genotype = ours.sample(INPUTS, generator)
        assert ours.parse(json.loads(json.dumps(genotype.to_json())), INPUTS) == genotype
        assert hash(genotype) == hash(ours.parse(genotype.to_json(), INPUTS))
        seen |= {*genotype.encoders, genotype.fusion_function, genotype.fusion_network}
    assert len(seen) == 7 + 6 + 2
    assert genotype.features == ("image", "text", "static")


GOOD = MixerGenotype((("image", "ramlp"), ("text", "mlp_mixer")), "mean", "mlp_mixer").to_json()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "a JSON object is needed"),
        ({**GOOD, "space": "fusion"}, "of space 'fusion', schema 1; mixers reads space 'mixers', schema 1"),
        ({**GOOD, "schema": 2}, "schema 2; mixers reads"),
        ({"space": "mixers", "schema": 1}, "not a genotype of mixers: KeyError 'encoders'"),
        ({**GOOD, "encoders": ["ramlp"]}, "not a genotype of mixers: AttributeError"),
        ({**GOOD, "encoders": {}}, "has no encoder"),
        ({**GOOD, "encoders": {"audio": "ramlp"}}, "encodes the modality 'audio'; valid are: image, static"),
        ({**GOOD, "encoders": {"text": "ramlp"}}, "encodes 'text' by 'ramlp', which its vocabulary has not"),
        ({**GOOD, "fusion_function": "men"}, "fusion function 'men'; did you mean mean"),
        ({**GOOD, "fusion_network": "ramlp"}, "fusion network 'ramlp'; .*mixer"),
        ({**GOOD, "fusion_network": None}, "several modalities need both, one modality both or none"),
        (
            {**GOOD, "fusion_function": None, "fusion_network": None},
            "encodes image, text and has fusion function None",
        ),
    ],
)
def test_bad_genotypes_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        space().parse(data, INPUTS)


def test_an_encoder_named_twice_is_refused():
    twice = MixerGenotype((("text", "mlp_mixer"), ("text", "hyper_mixer")), "mean", "mlp_mixer")
    with pytest.raises(InputError, match="the modality 'text' twice"):
        space().build(twice, INPUTS)


def test_fixed_networks_of_baselines():
    assert space().fixed("text", INPUTS) == MixerGenotype((("text", "mlp_mixer"),))
    assert space().fixed("m2_mixer", INPUTS) == MixerGenotype(
        (("image", "mlp_mixer"), ("text", "mlp_mixer"), ("static", "feed_forward")), "concat", "mlp_mixer"
    )
    with pytest.raises(InputError, match="no baseline 'two_stream': .* m2_mixer, image, text, static"):
        space().fixed("two_stream", INPUTS)
    with pytest.raises(InputError, match="fusion network 'mlp_mixer'; did you mean hyper_mixer"):
        space(networks={"hyper_mixer": HYPER}).fixed("m2_mixer", INPUTS)


# Networks.


@pytest.mark.parametrize("protocol", ["intended", "released_code"])
@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("network", FUSION)
def test_networks_keep_their_word(network, function, protocol, generator):
    """Shapes, taps and gradients, with one to three modalities."""
    ours = space(protocol=protocol)
    encoders = (("image", "ramlp"), ("text", "monarch_mixer"), ("static", "feed_forward"))
    for count in (1, 2, 3):
        torch.manual_seed(0)
        built = ours.build(MixerGenotype(encoders[:count], function, network), INPUTS)
        output = built(batch(4, generator))
        assert output.embedding.shape == (4, built.info.embedding)
        assert {name: tuple(tap.shape[1:]) for name, tap in output.taps.items()} == built.info.taps
        assert list(output.taps) == [modality for modality, _ in encoders[:count]]
        output.embedding.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())
        parts = [*built.encoders.values(), built.function, built.fusion]
        assert parameters(built) == parameters(*parts)
        assert not any(module.training for module in built.eval().modules())


def test_no_head_starts_on_zeros_and_every_block_learns(generator):
    """Acceptance test 4 of the notes on the released code, which fails both for text."""
    torch.manual_seed(0)
    nodes = {"text": {"mlp_mixer": {**MLP, "num_blocks": 4, "token_hidden": 16, "channel_hidden": 32}}}
    for protocol, fine in (("intended", True), ("released_code", False)):
        ours = MixerSpace(nodes, ["concat"], FUSION, 16, dropout=0.0, protocol=protocol)
        inputs = {"text": InputInfo((10, 16), "text", "text")}
        built = ours.build(ours.fixed("text", inputs), inputs)
        embedding = built(batch(8, generator, inputs)).embedding
        assert (embedding.abs().max() > 0.1) == fine
        (embedding @ torch.randn(embedding.shape[1], 3, generator=generator)).square().sum().backward()
        first, last = (
            torch.cat([p.grad.flatten() for p in block.parameters()]).norm()
            for block in (built.encoders["text"].blocks[0], built.encoders["text"].blocks[-1])
        )
        if fine:
            assert first > 1e-4 * last
            assert first > 1e-3
        else:
            assert embedding.shape[1] == 10  # a mean over features, which a LayerNorm has set to zero
            assert first < 1e-3


@pytest.mark.parametrize("name", ["concat", "mean", "max", "gated"])
@pytest.mark.parametrize("network", FUSION)
@pytest.mark.parametrize("by_argument", [True, False])
def test_missing_modalities_change_nothing_and_leave_everything_finite(name, network, by_argument, generator):
    torch.manual_seed(0)
    genotype = MixerGenotype((("image", "mlp_mixer"), ("text", "monarch_mixer")), name, network)
    built = space().build(genotype, INPUTS).eval()
    inputs = batch(4, generator)
    present = {
        "image": torch.tensor([1, 0, 1, 0]).bool(),
        "text": torch.tensor([1, 1, 0, 0]).bool(),
    }
    holes = dict(inputs)
    for modality, mark in present.items():
        holes[modality] = inputs[modality].clone()
        holes[modality][~mark] = float("nan")
    marked = {f"present.{modality}": mark for modality, mark in present.items()}
    output = built(holes, present) if by_argument else built(holes | marked)
    assert output.embedding.isfinite().all()
    assert not output.taps["text"][2:].any()
    whole = built(inputs)
    torch.testing.assert_close(output.embedding[0], whole.embedding[0])
    assert not torch.allclose(output.embedding[1], whole.embedding[1], atol=1e-4)
    other = {**holes, "image": torch.where(holes["image"].isnan(), 7.0, holes["image"])}
    torch.testing.assert_close(built(other, present).embedding, output.embedding)
    built.train()
    built(holes, present).embedding.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in built.parameters())


def test_dropout_of_one_stage_overrides_the_spaces_and_the_candidates():
    nodes = {"text": {"mlp_mixer": {**MLP, "dropout": 0.3}}, "tabular": {"feed_forward": FEED_FORWARD}}
    inputs = {name: INPUTS[name] for name in ("text", "static")}
    ours = space(nodes, dropout=0.1, networks={"mlp_mixer": {**MLP, "dropout": 0.0}})
    genotype = ours.fixed("m2_mixer", inputs)
    for given, expected in ((None, {"text": 0.3, "static": 0.1, "fusion": 0.0}), (0.5, 0.5)):
        built = ours.build(genotype, inputs, dropout=given)
        for part, module in {**built.encoders, "fusion": built.fusion}.items():
            rates = {m.p for m in module.modules() if isinstance(m, nn.Dropout)}
            assert rates == {expected if given is not None else expected[part]}
    assert nodes["text"]["mlp_mixer"]["dropout"] == 0.3


def test_any_module_is_a_candidate_by_its_target(generator):
    nodes = {
        "image": {"flat": {"_target_": "torch.nn.Flatten", "start_dim": 2}},
        "video": {"pooled": {"_target_": "torch.nn.Flatten"}},
        "audio": {"resnet": {"_target_": f"{PACKAGE}.timm_model.TimmModel", "model": "test_resnet"}},
    }
    inputs = {
        "image": InputInfo((3, 4, 5), "image", "image"),
        "video": InputInfo((2, 3, 4, 4), "video", "video"),
        "audio": InputInfo((1, 32, 32), "audio", "audio"),
    }
    ours = space(nodes, networks={"mlp_mixer": MLP})
    built = ours.build(ours.sample(inputs, generator), inputs)
    output = built(batch(2, generator, inputs))
    assert output.taps["image"].shape == (2, 20)
    assert output.taps["video"].shape == (2, 96)
    assert output.embedding.shape == (2, built.info.embedding)


# Sizes of M2-Mixer and MixMAS.


def big(node, **settings):
    return {**node, "token_hidden": 32, "channel_hidden": 3072, "num_blocks": 4, **settings}


AV = {
    "image": InputInfo((1, 28, 28), "image", "image"),
    "audio": InputInfo((1, 112, 112), "audio", "audio"),
}
MIMIC = {
    "static": InputInfo((5,), "static", "tabular"),
    "series": InputInfo((24, 12), "series", "series"),
}
AV_NODES = {
    kind: {"mlp_mixer": big(MLP, patch=patch), "hyper_mixer": big(HYPER, patch=patch)}
    for kind, patch in (("image", 14), ("audio", 56))
}


def av_mnist(name, protocol, **fusion):
    node = {"mlp_mixer": MLP, "hyper_mixer": HYPER}[name]
    ours = MixerSpace(AV_NODES, ["concat"], {name: big(node, **fusion)}, 128, protocol=protocol, dropout=0.5)
    return with_heads(ours, dict.fromkeys(AV, name), name, AV, 10)


def mimic(series, fusion, heads=1, protocol="released_code"):
    small = {"token_hidden": 16, "channel_hidden": 64, "num_blocks": 1}
    nodes = {
        "tabular": {"feed_forward": FEED_FORWARD},
        "series": {"mlp_mixer": {**MLP, **small}, "hyper_mixer": {**HYPER, **small, "num_heads": heads}},
    }
    networks = {
        "mlp_mixer": {**MLP, **small, "token_hidden": 8},
        "hyper_mixer": {**HYPER, **small},
    }
    ours = MixerSpace(nodes, ["concat"], networks, 64, protocol=protocol)
    return with_heads(ours, {"static": "feed_forward", "series": series}, fusion, MIMIC, 6)


def with_heads(ours, encoders, fusion, inputs, classes):
    """Parameters of a network with a head a modality and one on the fused tokens."""
    genotype = MixerGenotype(tuple(encoders.items()), "concat", fusion)
    with torch.device("meta"):
        network = ours.build(genotype, inputs)
        objective = MultiHead(
            network.info.embedding, "multiclass", ("c",) * classes, torch.zeros(classes), network.info
        )
    return parameters(network, objective)


@pytest.mark.parametrize("protocol", ["intended", "released_code"])
def test_m2_mixer_has_as_many_parameters_as_published(protocol):
    assert av_mnist("mlp_mixer", protocol, num_blocks=2, channel_hidden=3078) == 8_339_354
    if protocol == "intended":  # the released MixMAS wires mixers of series otherwise
        assert mimic("mlp_mixer", "mlp_mixer", protocol=protocol) == 29_355


def test_mixmas_has_as_many_parameters_as_its_released_code():
    counts = [av_mnist("hyper_mixer", "released_code", num_blocks=count) for count in (1, 2, 3, 4)]
    assert [round(count / 1e6, 3) for count in counts] == [7.553, 8.346, 9.138, 9.930]
    assert mimic("hyper_mixer", "mlp_mixer") == 32_819
    assert mimic("hyper_mixer", "hyper_mixer") == 36_886
    assert mimic("hyper_mixer", "hyper_mixer", heads=2) == 34_774


def test_mixmas_on_mmimdb_has_the_published_size_with_monarch_and_a_fused_mlp_mixer():
    nodes = {"image": {"mlp_mixer": big(MLP, patch=16)}, "text": {"monarch_mixer": MONARCH}}
    ours = MixerSpace(nodes, ["concat"], {"mlp_mixer": big(MLP, num_blocks=2)}, 256, protocol="released_code")
    inputs = {
        "image": InputInfo((3, 256, 160), "image", "image"),
        "text": InputInfo((512, 768), "text", "text"),
    }
    encoders = {"image": "mlp_mixer", "text": "monarch_mixer"}
    assert with_heads(ours, encoders, "mlp_mixer", inputs, 23) == 10_368_589


# The configuration, and what it refuses.

CONF = Path(__file__).resolve().parents[3] / "conf"


def test_the_default_vocabulary_builds_for_every_kind():
    node = yaml.safe_load((CONF / "search_space/mixers.yaml").read_text())
    check_node(node, "search_space")
    ours = build_with_facts(node, "search_space", {})
    inputs = {
        **AV,
        **MIMIC,
        "text": InputInfo((30, 50), "text", "text"),
        "joints": InputInfo((20, 20, 3), "joints", "skeleton"),
    }
    with torch.device("meta"):
        for choice in ours.choices(inputs):
            for option in choice.options:
                if choice.name.startswith("encoder."):
                    ours.build(ours.candidate(choice.name, option, {}, inputs), inputs)
        ours.build(ours.fixed("m2_mixer", inputs), inputs)


def test_a_candidate_that_is_null_is_left_out():
    ours = space({"image": {**NODES["image"], "ramlp": None}}, networks={**FUSION, "mlp_mixer": None})
    assert list(ours.encoders["image"]) == ["mlp_mixer", "hyper_mixer"]
    assert list(ours.fusion_networks) == ["hyper_mixer"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoders": {"imgae": NODES["image"]}}, "no kind 'imgae'; did you mean image"),
        ({"encoders": {"image": {}}}, r"search_space\.encoders\.image is empty"),
        ({"encoders": {"image": {"m": {"patch": 4}}}}, r"encoders\.image\.m must be a node with a _target_"),
        (
            {"encoders": {"image": {"m": {**MLP, "pach": 4}}}},
            r"unknown key 'search_space\.encoders\.image\.m\.pach'; did you mean patch",
        ),
        ({"networks": {"m": {**MLP, "num_blocks": "two"}}}, r"fusion_networks\.m\.num_blocks=two: .*integer"),
        ({"networks": {"m": {"_target_": f"{PACKAGE}.mlp.MLP"}}}, r"fusion_networks\.m\._target_=.*imported"),
        ({"functions": ["concat", "avg"]}, "fusion_functions has no 'avg'; valid are: concat, gated"),
        ({"functions": []}, "names different functions, at least one"),
        ({"functions": ["mean", "mean"]}, "names different functions"),
        ({"width": 0}, r"search_space\.width must be at least 1, got 0"),
        ({"fusion_width": 0}, r"search_space\.fusion_width must be at least 1, got 0"),
        ({"dropout": 1.0}, r"search_space\.dropout must be in \[0, 1\), got 1"),
    ],
)
def test_settings_that_make_no_space(settings, message):
    with pytest.raises(InputError, match=message):
        space(**settings)


def test_misspelt_keys_of_nested_candidates_are_named_in_the_early_checks_too():
    from test_conf import composed

    values = composed("search_space=mixers", "sizes=mixers", "experiment=darts_cifar10")
    check_schema(values)
    values["search_space"]["encoders"]["image"]["ramlp"]["deepths"] = [1, 1, 1, 1]
    with pytest.raises(InputError, match=r"encoders\.image\.ramlp\.deepths'; did you mean depths"):
        check_schema(values)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": InputInfo((3, 8, 8), "image")}, "kind of input 'image' is not known; its backbone must"),
        (
            {"a": InputInfo((3, 8, 8), "a", "audio")},
            r"input 'a' is of kind 'audio', for which there are no encoders; add them as search_space\.enc",
        ),
        ({"image.0": InputInfo((3, 8, 8), "image", "image")}, "'image.0' is of modality 'image'; take a"),
        ({}, "need at least one modality"),
    ],
)
def test_inputs_that_mixers_cannot_read(inputs, message):
    with pytest.raises(InputError, match=message):
        space().choices(inputs)
    assert len(space().choices({**INPUTS, "present.text": InputInfo((), "text")})) == 5


def test_what_a_candidate_is_not():
    ours = space({"text": {"odd": {"_target_": "fractions.Fraction"}}})
    with pytest.raises(InputError, match=r"encoders\.text\.odd must be a torch module, got Fraction"):
        ours.build(MixerGenotype((("text", "odd"),)), {"text": INPUTS["text"]})
    bad = {"text": {"mlp_mixer": {"_target_": "torch.nn.Linear", "in_features": 3}}}
    with pytest.raises(InputError, match=r"encoders\.text\.mlp_mixer cannot be built: .*out_features"):
        space(bad).build(MixerGenotype((("text", "mlp_mixer"),)), {"text": INPUTS["text"]})

"""The references are compared with torch's own modules, with each other and with worked examples."""

import pytest
import torch
from reference import fusion
from reference.nt_xent import nt_xent
from torch import nn
from torch.nn import functional as F

from benchmarks.plain_hypernet import Attention, ConcatFC, LinearGLU, PlainHypernet, Sum

B, C, L = 3, 4, 5
INFOS = {"image.0": (6, L), "image.1": (7, L), "text.0": (2, 1)}


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def draw(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def scrambled(module, rng):
    """The module in float64 with every parameter drawn, so that no affine is 1 and 0."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * draw(rng, *parameter.shape))
    return module


def features_of(rng, batch=B):
    return {name: draw(rng, batch, channels, positions) for name, (channels, positions) in INFOS.items()}


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


# ---- layers and ops against torch ------------------------------------------------------------------


@pytest.mark.parametrize("positions", [1, L])
@pytest.mark.parametrize("training", [True, False])
def test_reshape_is_conv_norm_relu(rng, positions, training):
    conv, norm = scrambled(nn.Conv1d(6, C, 1), rng), scrambled(nn.BatchNorm1d(C), rng)
    feature = draw(rng, B, 6, positions)
    norm(conv(feature.expand(B, 6, L)))  # running statistics that are neither 0 nor 1
    norm.train(training)
    ours = fusion.reshape(
        feature,
        conv.weight[..., 0],
        conv.bias,
        norm.weight,
        norm.bias,
        L,
        training=training,
        running_mean=norm.running_mean.clone(),
        running_var=norm.running_var.clone(),
    )
    assert_equal(ours, F.relu(norm(conv(feature.expand(B, 6, L)))))


def test_layer_norm_is_over_channels_and_length(rng):
    norm = scrambled(nn.LayerNorm([C, L]), rng)
    x = draw(rng, B, C, L)
    assert_equal(fusion.layer_norm(x, norm.weight, norm.bias), norm(x))


def test_attention_is_scaled_dot_product_over_positions(rng):
    x, y = draw(rng, 2, B, C, L)
    expected = F.scaled_dot_product_attention(x.mT, y.mT, y.mT).mT
    assert_equal(fusion.attention(x, y), expected)


def test_paper_ops_are_its_equations(rng):
    x, y = draw(rng, 2, B, C, L)
    w_x, w_y, w, bias = draw(rng, C, C), draw(rng, C, C), draw(rng, C, 2 * C), draw(rng, C)
    p = {
        "s.linear_glu.weight_x": w_x,
        "s.linear_glu.weight_y": w_y,
        "s.concat_fc.weight": w,
        "s.concat_fc.bias": bias,
    }

    def op(name):
        return fusion.apply_op(name, x, y, p, "s", protocol="paper")

    assert_equal(op("zero"), torch.zeros(B, C, L, dtype=torch.float64))
    assert_equal(op("sum"), x + y)
    assert_equal(op("linear_glu"), (w_x @ x) * torch.sigmoid(w_y @ y))
    assert_equal(op("concat_fc"), F.relu(w @ torch.cat([x, y], dim=1) + bias[:, None]))


# ---- the plain hypernet ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "length", "counts"),
    [(192, 16, (0, 6144, 148608, 74304)), (128, 8, (0, 2048, 66304, 33152))],
)
def test_ops_have_the_released_number_of_parameters(channels, length, counts):
    ops = (
        Sum(),
        Attention(channels, length, 0.1),
        LinearGLU(channels, 0.1),
        ConcatFC(2 * channels, channels, 0.1),
    )
    assert tuple(sum(q.numel() for q in op.parameters()) for op in ops) == counts


def test_the_found_poster_network_has_the_released_number_of_parameters():
    plain = PlainHypernet(
        {f"image.{i}": (512, 16) for i in range(4)} | {"text.0": (64, 1), "text.1": (128, 1)}
    )
    used = ("reshape.image.0.", "reshape.image.1.", "reshape.text.0.", "head.")
    inside = (".linear_glu.", "cell.0.ln", "cell.1.ln")
    found = [
        q
        for name, q in plain.named().items()
        if name.startswith(used) or any(part in name for part in inside)
    ]
    assert sum(q.numel() for q in found) == 532_416


@pytest.mark.parametrize("pairing", ["shared", "distinct"])
@pytest.mark.parametrize(
    ("num_cells", "num_steps", "m_in", "m_out", "batch"), [(2, 1, 1, 2, B), (3, 2, 2, 2, B), (1, 2, 4, 1, 1)]
)
def test_plain_hypernet_is_the_reference(rng, pairing, num_cells, num_steps, m_in, m_out, batch):
    plain = PlainHypernet(
        INFOS,
        channels=C,
        length=L,
        num_cells=num_cells,
        num_steps=num_steps,
        dropout=0.0,
        pairing=pairing,
        node_multiplier=m_in,
        multiplier=m_out,
        attention_dropout=0.0,
    )
    scrambled(plain, rng)
    named = plain.named()
    assert {id(q) for q in named.values()} == {id(q) for q in plain.parameters()}
    p = {
        name: (q.detach()[..., 0] if q.dim() == 3 and name.endswith(".weight") else q.detach())
        .clone()
        .requires_grad_()
        for name, q in named.items()
    }
    features = features_of(rng, batch)
    expected, cells = fusion.hypernet(
        features,
        p,
        num_cells=num_cells,
        num_steps=num_steps,
        channels=C,
        length=L,
        cell_outputs=m_in,
        head_cells=m_out,
        protocol="released_code",
        pairing=pairing,
    )
    actual = plain(features)
    assert len(cells) == num_cells
    assert expected.shape == (batch, m_out * C * L)
    assert_equal(actual, expected)

    direction = draw(rng, *expected.shape)
    (actual * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, q in named.items():
        assert_equal(q.grad.reshape(p[name].shape), p[name].grad)
    assert all(p[name].grad.abs().max() > 0 for name in ("alpha", "beta", "gamma"))


def test_plain_hypernet_takes_over_named_tensors(rng):
    first, second = (
        PlainHypernet(INFOS, C, L, dropout=0.0, attention_dropout=0.0).double() for _ in range(2)
    )
    features = features_of(rng)
    second.load({name: q.detach().squeeze(-1) for name, q in first.named().items()})
    assert_equal(second(features), first(features))


# ---- found networks --------------------------------------------------------------------------------


def tensors(rng, *, num_cells, num_steps, m_in, m_out, protocol, training=True):
    """Drawn tensors for every op of every step, and running statistics where they are asked for."""
    p = {}

    def add(prefix, out_channels, in_channels, norm=True):
        p[f"{prefix}.weight"], p[f"{prefix}.bias"] = (
            draw(rng, out_channels, in_channels),
            draw(rng, out_channels),
        )
        if norm:
            p[f"{prefix}.bn_weight"], p[f"{prefix}.bn_bias"] = draw(rng, 2, out_channels)
        if norm and not training:
            p[f"{prefix}.bn_running_mean"] = draw(rng, out_channels)
            p[f"{prefix}.bn_running_var"] = draw(rng, out_channels).exp()

    for name, (channels, _) in INFOS.items():
        add(f"reshape.{name}", C, channels)
    for i in range(num_cells):
        for m in range(num_steps):
            step = f"cell.{i}.step.{m}"
            add(f"{step}.concat_fc", C, 2 * C, norm=protocol == "released_code")
            if protocol == "paper":
                p[f"{step}.linear_glu.weight_x"], p[f"{step}.linear_glu.weight_y"] = draw(rng, 2, C, C)
            else:
                add(f"{step}.linear_glu", 2 * C, 2 * C)
                p[f"{step}.attention.ln_weight"], p[f"{step}.attention.ln_bias"] = draw(rng, 2, C, L)
        if m_in > 1:
            add(f"cell.{i}.out", C, m_in * C)
        p[f"cell.{i}.ln_weight"], p[f"cell.{i}.ln_bias"] = draw(rng, 2, C, L)
    p["head.ln_weight"], p["head.ln_bias"] = draw(rng, 2, m_out * C, L)
    return p


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("protocol", ["released_code", "paper"])
def test_a_decided_hypernet_is_its_found_network(rng, protocol, training):
    """With two separate mixtures, logits far apart leave exactly one candidate in each choice."""
    sizes = {"channels": C, "length": L, "cell_outputs": 2, "head_cells": 2, "protocol": protocol}
    p = tensors(rng, num_cells=2, num_steps=2, m_in=2, m_out=2, protocol=protocol, training=training)
    alpha, beta = torch.zeros(2, 3 + 4), torch.zeros(2, 2, 2 + 3)
    gamma = torch.zeros(2, 2, len(fusion.OPS[protocol]))
    for side, edge in [(0, 2), (1, 0), (0, 3 + 1), (1, 3 + 3)]:
        alpha[side, edge] = 1e3
    for cell, side, edge in [
        (0, 0, 1), (0, 1, 0), (0, 0, 2 + 2), (0, 1, 2 + 1), (1, 0, 0), (1, 1, 1), (1, 0, 2 + 0), (1, 1, 2 + 2)
    ]:  # fmt: skip
        beta[cell, side, edge] = 1e3
    ops = [["linear_glu", "attention"], ["concat_fc", "linear_glu"]]
    for cell in range(2):
        for step in range(2):
            gamma[cell, step, fusion.OPS[protocol].index(ops[cell][step])] = 1e3
    logits = {"alpha": alpha.double(), "beta": beta.double(), "gamma": gamma.double()}

    genotype, margins = fusion.derive(
        logits, list(INFOS), num_cells=2, num_steps=2, protocol=protocol, pairing="distinct"
    )
    assert genotype == [
        ("text.0", "image.0", [(1, 0, "linear_glu"), (2, 1, "attention")]),
        ("image.1", "cell.0", [(0, 1, "concat_fc"), (0, 2, "linear_glu")]),
    ]
    assert [margin for _, margin in margins] == pytest.approx([1.0] * 10)

    features = features_of(rng)
    expected, _ = fusion.hypernet(
        features, p | logits, num_cells=2, num_steps=2, pairing="distinct", training=training, **sizes
    )
    actual, cells = fusion.found_network(features, p, genotype, training=training, **sizes)
    assert len(cells) == 2
    assert_equal(actual, expected)


def test_paper_cell_with_one_step_ends_with_it(rng):
    p = tensors(rng, num_cells=1, num_steps=1, m_in=1, m_out=1, protocol="paper")
    sizes = {"channels": C, "length": L, "cell_outputs": 1, "head_cells": 1, "protocol": "paper"}
    features = features_of(rng)
    genotype = [("image.0", "text.0", [(0, 1, "sum")])]
    embedding, _ = fusion.found_network(features, p, genotype, **sizes)

    def reshaped(name):
        own = {key: p[f"reshape.{name}.{key}"] for key in ("weight", "bias", "bn_weight", "bn_bias")}
        return fusion.reshape(features[name], length=L, **own)

    assert_equal(embedding, (reshaped("image.0") + reshaped("text.0")).flatten(1))


# ---- derivation ------------------------------------------------------------------------------------


def zeros(num_features, num_cells, num_steps, num_ops):
    """Shared logits that tie everywhere."""
    return {
        "alpha": torch.zeros(sum(num_features + i for i in range(num_cells)), 2),
        "beta": torch.zeros(num_cells, sum(2 + m for m in range(num_steps)), 2),
        "gamma": torch.zeros(num_cells, num_steps, num_ops),
    }


def test_ties_go_to_the_first_candidate():
    released, margins = fusion.derive(
        zeros(4, 2, 2, 4), "abcd", num_cells=2, num_steps=2, protocol="released_code", pairing="shared"
    )
    assert released == [
        ("a", "b", [(0, 1, "sum"), (0, 1, "sum")]),
        ("a", "c", [(0, 1, "sum"), (0, 1, "sum")]),
    ]
    assert dict(margins)["cell.0.step.0.inputs"] == 0.25  # the only pair there is
    assert all(margin == 0 for name, margin in margins if not name.endswith("step.0.inputs"))

    paper, margins = fusion.derive(
        zeros(2, 3, 1, 5), "ab", num_cells=3, num_steps=1, protocol="paper", pairing="shared"
    )
    assert paper == [
        ("a", "b", [(0, 0, "zero")]),
        ("a", "cell.0", [(0, 0, "zero")]),
        ("a", "cell.1", [(0, 0, "zero")]),
    ]
    assert dict(margins)["cell.0.inputs"] == 0.25


def test_released_code_ignores_cells_and_wants_a_new_feature():
    logits = zeros(3, 2, 2, 4)
    logits["alpha"][:3, fusion.SKIP] = torch.tensor([0.0, 2.0, 1.0])
    logits["alpha"][3:, fusion.SKIP] = torch.tensor([0.0, 2.0, 1.0, 9.0])
    logits["beta"][0, :, fusion.SKIP] = torch.tensor([0.0, 1.0, 1.0, 0.0, 2.0])
    genotype, margins = fusion.derive(
        logits, "abc", num_cells=2, num_steps=2, protocol="released_code", pairing="shared"
    )
    assert [cell[:2] for cell in genotype] == [("b", "c"), ("a", "b")]
    assert [step[:2] for step in genotype[0][2]] == [(1, 0), (2, 0)]
    weight = {value: torch.sigmoid(torch.tensor(value)).item() for value in (0.0, 1.0, 2.0)}
    margin = dict(margins)["cell.0.inputs"]
    assert margin == pytest.approx(weight[2.0] * (weight[1.0] - weight[0.0]), abs=1e-6)
    margin = dict(margins)["cell.0.step.1.inputs"]
    assert margin == pytest.approx(weight[2.0] * (weight[1.0] - weight[0.0]), abs=1e-6)


def test_released_code_says_when_no_feature_is_left():
    with pytest.raises(ValueError, match="cell 1 has no admissible pair"):
        fusion.derive(
            zeros(2, 2, 1, 4), "ab", num_cells=2, num_steps=1, protocol="released_code", pairing="shared"
        )


def test_paper_lets_none_win_and_forbids_a_repeated_pair():
    logits = zeros(3, 2, 1, 5)
    logits["alpha"][:3, fusion.NONE] = torch.tensor([0.0, 3.0, 3.0])
    logits["alpha"][3:, fusion.SKIP] = torch.tensor([0.0, 3.0, 3.0, 2.0])
    logits["beta"][0, :, fusion.SKIP] = torch.tensor([0.0, 1.0])
    genotype, _ = fusion.derive(logits, "abc", num_cells=2, num_steps=1, protocol="paper", pairing="shared")
    assert [cell[:2] for cell in genotype] == [("b", "c"), ("b", "cell.0")]
    assert genotype[0][2][0][:2] == (1, 1)


@pytest.mark.parametrize("protocol", ["released_code", "paper"])
def test_distinct_pairing_reads_one_step_as_x_and_y(protocol):
    logits = {
        "alpha": torch.tensor([[0.0, 3.0, 0.0], [0.0, 4.0, 0.5]]),
        "beta": torch.tensor([[[0.0, 5.0], [5.0, 0.0]]]),
        "gamma": torch.zeros(1, 1, len(fusion.OPS[protocol])),
    }
    genotype, margins = fusion.derive(
        logits, "abc", num_cells=1, num_steps=1, protocol=protocol, pairing="distinct"
    )
    assert genotype[0][:2] == ("a", "b")  # b is x's best as well, but worth more to y; (c, b) ties
    assert genotype[0][2][0][:2] == (0, 1)
    assert dict(margins)["cell.0.inputs"] == 0
    low = 1 / (1 + torch.tensor(5.0, dtype=torch.float64).exp().item())
    assert dict(margins)["cell.0.step.0.inputs"] == pytest.approx(low * low)


# ---- contrastive loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_lightlys(rng, batch, temperature):
    lightly_loss = pytest.importorskip("lightly.loss")
    z_a, z_b = draw(rng, 2, batch, 8)
    expected = lightly_loss.NTXentLoss(temperature=temperature)(z_a, z_b)
    assert nt_xent(z_a, z_b, temperature).item() == pytest.approx(expected.item(), rel=1e-6)


def test_nt_xent_of_one_pair_is_zero(rng):
    z_a, z_b = draw(rng, 2, 1, 8)
    assert nt_xent(z_a, z_b, 0.5).item() == pytest.approx(0.0, abs=1e-12)

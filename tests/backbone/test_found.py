"""Cells that a run found and trained on pictures become an encoder, and feed a fusion search."""

import json
import shutil

import numpy as np
import pytest
import torch
from cli_support import TINY, one_message, succeed
from cli_support import run as command
from PIL import Image
from safetensors.torch import load_file
from test_cells import configuration, write

from mmnas_lab.backbone.found import FoundImage
from mmnas_lab.runner import run
from mmnas_lab.types import InputError, InputInfo

ONE = {"image": InputInfo((3, 16, 16), "image")}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    values = configuration(
        write(folder / "pictures"), folder, "darts_cifar10", "train.epochs=1", "baselines=[]"
    )
    return run(values)


def pictures(count, size=(20, 16)):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def test_levels_are_the_taps_of_the_trained_network(cells):
    encoder = FoundImage(str(cells), batch_size=2)
    infos = encoder.infos(4)
    features = encoder.encode(pictures(5), 4)
    assert list(infos) == ["image.0", "image.1", "image.2", "image.3"] == list(features)
    assert all(tuple(features[name].shape[1:]) == info.shape for name, info in infos.items())

    state = load_file(cells / "network.safetensors")
    network = encoder.space.build(
        encoder.space.parse(json.loads((cells / "genotype.json").read_text()), ONE), ONE
    ).eval()
    network.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("network.")})
    square = [np.asarray(p.resize((16, 20)).crop((0, 2, 16, 18))) for p in pictures(5)]
    pixels = torch.from_numpy(np.stack(square)).permute(0, 3, 1, 2).float() / 255
    mean, std = (state[f"standardisation.image.{kind}"].view(3, 1, 1) for kind in ("mean", "std"))
    with torch.no_grad():
        output = network({"image": (pixels - mean) / std})
    torch.testing.assert_close(features["image.3"][..., 0], output.embedding, atol=1e-5, rtol=1e-5)
    pooled = torch.nn.functional.adaptive_max_pool2d(output.taps["stage.1"], 2).flatten(2)
    torch.testing.assert_close(features["image.1"], pooled, atol=1e-5, rtol=1e-5)


def test_taps_are_chosen_and_count_in_the_fingerprint(cells):
    last = FoundImage(str(cells), taps=["stage.2"])
    assert list(last.infos(1)) == ["image.0", "image.1"]
    assert last.fingerprint() != FoundImage(str(cells)).fingerprint()
    with pytest.raises(InputError, match="stage.1"):
        FoundImage(str(cells), taps=["stage.9"])


def test_a_fusion_search_reads_the_found_cells(cells, tmp_path):
    image = [
        "~backbone.image",
        "+backbone.image={_target_: mmnas_lab.backbone.found.FoundImage, label_free: true, run: "
        + str(cells)
        + "}",
    ]
    done = succeed(*TINY, *image, "baselines=[]", cwd=tmp_path)
    record = json.loads((tmp_path / done.folder / "record.json").read_text())
    assert record["label_free"]
    assert record["inputs"]["image.0"][1] == 4
    assert [name for name in record["inputs"] if name.startswith("image")] == [f"image.{k}" for k in range(4)]


def test_a_run_that_cannot_be_an_encoder_is_refused(cells, tmp_path):
    with pytest.raises(InputError, match="finished run"):
        FoundImage(str(tmp_path))
    shutil.copytree(cells, tmp_path / "cut")
    (tmp_path / "cut" / "network.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="network.safetensors"):
        FoundImage(str(tmp_path / "cut"))
    movies = succeed(*TINY, "baselines=[]", cwd=tmp_path).folder
    with pytest.raises(InputError, match="only cells on backbone=pixels"):
        FoundImage(str(tmp_path / movies))
    message = one_message(command(*TINY, "backbone=found_cells", cwd=tmp_path))
    assert "backbone.image.run" in message

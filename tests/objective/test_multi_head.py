"""The multi-head loss is its formula, over the samples that have a modality; its scores are those of z_f."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from mmnas_lab.build import build_with_facts
from mmnas_lab.objective.mix import Mix, Term
from mmnas_lab.objective.multi_head import MultiHead
from mmnas_lab.objective.supervised import Supervised
from mmnas_lab.types import Batch, InputError, Output, OutputInfo

CLASSES = ("a", "b", "c", "d")
INFO = OutputInfo(5, {"image": (3,), "text": (6,), "cell.0": (4, 7)})


def made(task="multiclass", info=INFO, **settings):
    torch.manual_seed(0)
    return MultiHead(info.embedding, task, CLASSES, torch.zeros(4), info, **settings)


def drawn(task, generator, count=7):
    """Inputs that hold the network's output, and labels."""
    inputs = {
        "embedding": torch.randn(count, 5, generator=generator),
        "image": torch.randn(count, 3, generator=generator),
        "text": torch.randn(count, 6, generator=generator),
    }
    labels = torch.randint(0, 4, (count,), generator=generator)
    return inputs, F.one_hot(labels, 4).float() if task == "multilabel" else labels


def run(inputs):
    return Output(inputs["embedding"], {"image": inputs["image"], "text": inputs["text"]})


def loss_of(task, logits, labels):
    """The mean of the samples' losses, one by one."""
    values = []
    for z, y in zip(logits, labels, strict=True):
        if task == "multilabel":
            values.append(-(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean())
        else:
            values.append(-torch.log_softmax(z, -1)[y])
    return sum(values) / len(values)


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
@pytest.mark.parametrize(
    ("weight", "scaled", "average"), itertools.product([None, 0.5, 0.0, 1.0], [True, False], [True, False])
)
def test_the_loss_is_the_formula(task, weight, scaled, average, generator):
    objective = made(task, fusion_weight=weight, scaled=scaled, average_logits=average)
    inputs, labels = drawn(task, generator)
    own = {name: head.logits(inputs[name]) for name, head in objective.heads.items()}
    assert list(own) == ["image", "text"]
    fused = objective.fused.logits(inputs["embedding"])
    if average:
        fused = (fused + own["image"] + own["text"]) / 3
    w = 1 / 3 if weight is None else weight
    expected = w * loss_of(task, fused, labels)
    expected += (1 - w) / 2 * sum(loss_of(task, z, labels) for z in own.values())
    losses = objective(run, Batch((inputs,), labels))
    assert losses.total.item() == pytest.approx(3 * expected.item() if scaled else expected.item(), rel=1e-5)
    assert losses.parts.keys() == {"loss", "fused_loss", "image_loss", "text_loss"}
    assert losses.parts["fused_loss"].item() == pytest.approx(loss_of(task, fused, labels).item(), rel=1e-5)
    torch.testing.assert_close(objective.classify(run, Batch((inputs,), labels)), fused)


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
@pytest.mark.parametrize("average", [True, False])
def test_a_sample_without_a_modality_has_no_part_in_its_loss_and_average(task, average, generator):
    objective = made(task, average_logits=average)
    inputs, labels = drawn(task, generator)
    has = torch.tensor([1, 1, 0, 1, 0, 0, 1]).bool()
    marked = {**inputs, "present.text": has}
    losses = objective(run, Batch((marked,), labels))
    own = objective.heads["text"].logits(inputs["text"])
    assert losses.parts["text_loss"].item() == pytest.approx(
        loss_of(task, own[has], labels[has]).item(), rel=1e-5
    )
    logits, _ = objective.logits(run(marked), marked)
    if average:
        image = objective.heads["image"].logits(inputs["image"])
        fused = objective.fused.logits(inputs["embedding"])
        torch.testing.assert_close(logits[2], (fused + image)[2] / 2)
        torch.testing.assert_close(logits[0], (fused + image + own)[0] / 3)
    marked["present.text"] = torch.zeros(7, dtype=torch.bool)
    losses = objective(run, Batch((marked,), labels))
    assert losses.parts["text_loss"] == 0
    assert losses.total.isfinite()


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("info", [OutputInfo(5), None])
def test_without_taps_it_is_the_plain_classifier(info, average, generator):
    torch.manual_seed(0)
    plain = Supervised(5, "multiclass", CLASSES, torch.zeros(4))
    torch.manual_seed(0)
    objective = MultiHead(
        5, "multiclass", CLASSES, torch.zeros(4), info, fusion_weight=0.2, average_logits=average
    )
    inputs, labels = drawn("multiclass", generator)
    batch = Batch((inputs,), labels)

    def alone(inputs):
        return Output(inputs["embedding"], {})

    assert torch.equal(objective(alone, batch).total, plain(alone, batch).total)
    assert objective.evaluate(alone, [batch]) == plain.evaluate(alone, [batch])
    assert sum(p.numel() for p in objective.parameters()) == sum(p.numel() for p in plain.parameters())


def test_scores_are_those_of_the_fused_logits(generator):
    objective = made(average_logits=True)
    batches = [Batch((inputs,), labels) for inputs, labels in (drawn("multiclass", generator) for _ in "ab")]
    logits, labels = objective.predict(run, batches)
    assert logits.shape == (14, 4)
    values = objective.evaluate(run, batches)
    assert values["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert values["loss"] == pytest.approx(loss_of("multiclass", logits, labels).item(), rel=1e-5)
    assert objective.selects == ("accuracy", "max")
    assert made(select="auroc_macro").selects == ("auroc_macro", "max")
    assert Mix(first=Term(made(select="loss"))).selects == ("first_loss", "min")


def test_the_fused_weight_grows_after_each_epoch_up_to_one():
    objective = made(fusion_weight=0.5, fusion_weight_growth=0.2, growth_from_epoch=1)
    seen = []
    for epoch in range(6):
        objective.at_epoch(epoch, 6)
        seen.append(objective.fusion_weight)
    assert seen == pytest.approx([0.5, 0.5, 0.7, 0.9, 1.0, 1.0])
    mixed = Mix(first=Term(objective))
    mixed.at_epoch(2, 6)
    assert objective.fusion_weight == pytest.approx(0.7)


def test_it_is_built_from_the_facts_of_a_network():
    node = {"_target_": "mmnas_lab.objective.multi_head.MultiHead", "prior_bias": True}
    prior = torch.tensor([1.0, 2.0, 3.0, 4.0])
    facts = {"embedding": 5, "output": INFO, "task": "multilabel", "classes": CLASSES, "prior": prior}
    objective = build_with_facts(node, "objective", {**facts, "inputs": {}})
    for head in (objective.fused, *objective.heads.values()):
        assert torch.equal(head.linear.bias, prior)
    assert objective.needs == Supervised.needs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion_weight": 1.2}, r"fusion_weight must be in \[0, 1\], got 1\.2"),
        ({"fusion_weight_growth": -0.1}, "must not be negative, got -0.1 and 0"),
        ({"growth_from_epoch": -1}, "must not be negative, got 0 and -1"),
        ({"threshold": 0.0}, "threshold must be between 0 and 1"),
        ({"task": "multilabel", "label_smoothing": 0.1}, "label_smoothing is for one class a sample"),
    ],
)
def test_settings_that_make_no_loss(settings, message):
    with pytest.raises(InputError, match=message):
        made(**settings)

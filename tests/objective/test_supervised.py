"""The classifier's loss is torch's, its scores are sklearn's, on one rank and two."""

import pytest
import torch
from conftest import TinySource, on_ranks
from sklearn import metrics as sklearn
from torch import nn
from torch.nn import functional as F

from mmnas_lab.loader import FixedBatches, draw_clean
from mmnas_lab.objective.metrics import classification_metrics, metric_names, per_class_f1
from mmnas_lab.objective.supervised import Supervised
from mmnas_lab.types import Batch, InputError, Output

CLASSES = ("a", "b", "c", "d")


def labelled(kind, generator):
    """Logits (n, 4) and multi-hot labels, with whatever makes scores degenerate."""
    logits = 2 * torch.randn(30, 4, generator=generator)
    labels = torch.rand(30, 4, generator=generator).gt(0.6).float()
    if kind == "inside_0_1":
        logits = torch.rand(30, 4, generator=generator)  # torchmetrics would take these for probabilities
    if kind == "class_without_labels":
        labels[:, 1] = 0
    if kind == "class_without_labels_or_predictions":
        labels[:, 1], logits[:, 1] = 0, -9
    if kind == "class_never_predicted":
        logits[:, 2] = -9
    if kind == "sample_without_anything":
        labels[:5], logits[:5] = 0, -9
    if kind == "nothing_predicted":
        logits[:] = -9
    return logits, labels


KINDS = [
    "drawn",
    "inside_0_1",
    "class_without_labels",
    "class_without_labels_or_predictions",
    "class_never_predicted",
    "sample_without_anything",
    "nothing_predicted",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_multilabel_scores_are_sklearns(kind, threshold, generator):
    logits, labels = labelled(kind, generator)
    predicted = torch.sigmoid(logits) > threshold
    scores = classification_metrics(logits, labels, "multilabel", threshold)
    assert scores.keys() == {"f1_weighted", "f1_micro", "f1_macro", "f1_samples"}
    for name, value in scores.items():
        expected = sklearn.f1_score(
            labels.numpy(), predicted.numpy(), average=name.removeprefix("f1_"), zero_division=0
        )
        assert value == pytest.approx(expected, abs=1e-6), name
    each = per_class_f1(logits, labels, "multilabel", threshold, CLASSES)
    expected = sklearn.f1_score(labels.numpy(), predicted.numpy(), average=None, zero_division=0)
    assert list(each) == list(CLASSES)
    assert list(each.values()) == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("absent", [None, 2])
def test_scores_of_one_class_are_sklearns(absent, generator):
    logits = torch.randn(40, 4, generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    if absent is not None:
        labels[labels == absent] = 0
        logits[:, absent] = -9
    predicted = logits.argmax(1).numpy()
    present = [k for k in range(4) if k != absent]
    curves = [((labels == k).numpy(), logits.softmax(1)[:, k].numpy()) for k in present]
    assert classification_metrics(logits, labels, "multiclass", 0.5) == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(labels, predicted),
            "f1_macro": sklearn.f1_score(labels, predicted, average="macro"),
            "f1_weighted": sklearn.f1_score(labels, predicted, average="weighted"),
            "auroc_macro": sum(sklearn.roc_auc_score(*curve) for curve in curves) / len(curves),
            "auprc_macro": sum(sklearn.average_precision_score(*curve) for curve in curves) / len(curves),
        },
        abs=1e-6,
    )
    each = per_class_f1(logits, labels, "multiclass", 0.5, CLASSES)
    expected = sklearn.f1_score(labels, predicted, average=None, labels=range(4), zero_division=0)
    assert list(each.values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_areas_of_two_classes_are_those_of_the_second(generator):
    logits, labels = torch.randn(50, 2, generator=generator), torch.arange(50) % 5 == 0
    scores = classification_metrics(logits, labels.long(), "multiclass", 0.5)
    margin = (logits[:, 1] - logits[:, 0]).numpy()
    assert scores["auroc"] == pytest.approx(sklearn.roc_auc_score(labels, margin), abs=1e-6)
    assert scores["auprc"] == pytest.approx(sklearn.average_precision_score(labels, margin), abs=1e-6)
    assert "auroc" not in classification_metrics(logits, torch.zeros(50).long(), "multiclass", 0.5)


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_loss_is_torchs(task, generator):
    objective = Supervised(5, task, CLASSES, torch.zeros(4))
    embedding = torch.randn(6, 5, generator=generator)
    labels = torch.randint(0, 4, (6,), generator=generator)
    expected = F.cross_entropy(objective.linear(embedding), labels)
    if task == "multilabel":
        labels = F.one_hot(labels, 4)
        expected = -(
            labels * F.logsigmoid(objective.linear(embedding))
            + (1 - labels) * F.logsigmoid(-objective.linear(embedding))
        ).mean()
    losses = objective(lambda inputs: Output(inputs["x"], {}), Batch(({"x": embedding},), labels))
    assert losses.total.item() == pytest.approx(expected.item(), abs=1e-6)
    assert losses.parts.keys() == {"loss"}
    assert objective.selects == (("f1_weighted" if task == "multilabel" else "accuracy"), "max")


def test_the_head_can_start_at_the_prior(generator):
    prior = torch.tensor([-2.0, -1.0, 0.0, 1.0])
    objective = Supervised(5, "multilabel", CLASSES, prior, prior_bias=True, weight_scale=0.0)
    embedding = torch.randn(3, 5, generator=generator)
    assert torch.equal(objective.logits(embedding), prior.expand(3, 4))
    plain = Supervised(5, "multilabel", CLASSES, prior)
    assert not torch.equal(plain.linear.bias, prior)


@pytest.mark.parametrize("threshold", [0, 1, -0.1])
def test_a_threshold_outside_of_0_1_is_refused(threshold):
    with pytest.raises(InputError, match=f"threshold must be between 0 and 1, got {threshold}"):
        Supervised(5, "multilabel", CLASSES, torch.zeros(4), threshold=threshold)


def evaluated(count, batch_size, task):
    """An evaluation of a fixed linear network by this process."""
    torch.manual_seed(0)
    network, objective = nn.Linear(5, 6), Supervised(6, task, CLASSES[:3], torch.zeros(3))
    batches = FixedBatches(TinySource(count, task=task), draw_clean, batch_size, (0, "val"), whole=False)
    return objective.evaluate(lambda inputs: Output(network(inputs["text.0"][..., 0]), {}), batches)


@pytest.mark.ddp
@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
@pytest.mark.parametrize("count", [4, 11], ids=["a rank without a batch", "a short last batch"])
def test_evaluation_is_the_same_on_one_and_two_ranks(count, task):
    alone = evaluated(count, 4, task)
    first, second = on_ranks(evaluated, count, 4, task)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(("task", "count"), [("multilabel", 4), ("multiclass", 4), ("multiclass", 2)])
def test_every_metric_of_a_task_can_select(task, count, generator):
    logits = torch.randn(30, count, generator=generator)
    labels = torch.arange(30) % count
    if task == "multilabel":
        labels = torch.rand(30, count, generator=generator).gt(0.6).float()
    assert set(metric_names(task, count)) == classification_metrics(logits, labels, task, 0.3).keys()
    for name in metric_names(task, count):
        head = Supervised(3, task, CLASSES[:count], torch.zeros(count), select=name)
        assert head.selects == (name, "max")
    head = Supervised(3, task, CLASSES[:count], torch.zeros(count), select="loss")
    assert head.selects == ("loss", "min")


@pytest.mark.parametrize(
    ("task", "count", "select"),
    [("multilabel", 4, "accuracy"), ("multiclass", 4, "auroc"), ("multiclass", 2, "auroc_macro")],
)
def test_a_metric_that_the_task_has_not_is_refused_with_those_it_has(task, count, select):
    with pytest.raises(InputError, match=f"select={select}: {task} data") as refusal:
        Supervised(3, task, CLASSES[:count], torch.zeros(count), select=select)
    assert all(name in str(refusal.value) for name in ("auto", "loss", *metric_names(task, count)))


def test_areas_of_one_class_alone_are_refused_where_they_would_select():
    head = Supervised(2, "multiclass", ("no", "yes"), torch.zeros(2), select="auroc")
    inputs = {"x": torch.zeros(4, 2)}
    batch = Batch((inputs,), torch.zeros(4, dtype=torch.long))
    with pytest.raises(InputError, match="select=auroc needs samples of several classes"):
        head.evaluate(lambda inputs: Output(inputs["x"], {}), [batch])

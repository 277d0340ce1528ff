"""Training keeps the best state, goes on exactly after a stop, and stays in step over ranks."""

import math

import pytest
import torch
from conftest import INFOS, TinySource, on_ranks
from fits import (
    CLASSES,
    Stopped,
    fit,
    on_two_devices,
    runtime,
    same_state,
    stop_after_validation,
    stop_at_step,
)

from mmnas_lab import distributed
from mmnas_lab.config import FitSettings, Optimizer
from mmnas_lab.loader import Batches, draw_clean
from mmnas_lab.objective.supervised import Supervised
from mmnas_lab.search_space.fusion.genotype import CellGenotype, FusionGenotype, StepGenotype
from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.training import train
from mmnas_lab.types import TrainingError

STEPS = 3  # an epoch


def assert_same_fit(first, second):
    (one, its_states), (other, other_states) = first, second
    assert one.selection == other.selection
    assert same_state(one.scored.state_dict(), other.scored.state_dict())
    assert same_state(its_states[-1], other_states[-1])
    assert one.history == other.history


def test_an_objective_is_told_of_every_epoch(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Supervised, "at_epoch", lambda self, epoch, epochs: seen.append((epoch, epochs)))
    fit(tmp_path)
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_the_best_state_is_kept(tmp_path):
    trained, seen = fit(tmp_path)
    scores = {point.epoch: point.value for point in trained.history if point.name == "train/val_f1_weighted"}
    assert list(scores) == [0, 1, 2]
    best = max(scores, key=lambda epoch: (scores[epoch], -epoch))
    assert trained.selection == {"epoch": best, "name": "val_f1_weighted", "value": scores[best]}
    assert same_state(trained.scored.state_dict(), seen[best])
    assert not trained.scored.training
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("evaluations", "epochs"), [(1, [3]), (2, [1, 3]), (9, [0, 1, 2, 3])])
def test_evaluations_are_spread_evenly_and_end_with_the_last_epoch(evaluations, epochs, tmp_path):
    trained, _ = fit(tmp_path, epochs=4, evaluations=evaluations)
    assert [point.epoch for point in trained.history if point.name == "train/val_loss"] == epochs


POINTS = {
    "first step": stop_at_step(1),
    "mid-epoch": stop_at_step(2),
    "last batch of an epoch": stop_at_step(STEPS),
    "after validation": stop_after_validation(0),
    "second epoch": stop_at_step(STEPS + 1),
    "after the second validation": stop_after_validation(1),
    "last batch": stop_at_step(3 * STEPS),
    "before the last save": stop_after_validation(2),
}


@pytest.mark.parametrize("name", POINTS)
def test_a_stopped_fit_goes_on_to_the_same_result(name, tmp_path):
    expected = fit(tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(tmp_path / "stopped", runtime(**POINTS[name]))
    assert_same_fit(fit(tmp_path / "stopped"), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "one_cycle"},
        {"schedule": "constant"},
        {"clip_norm": 0.1},
        {"optimizer": {"name": "adamw"}},
    ],
)
def test_every_setting_goes_on_to_the_same_result(settings, tmp_path):
    expected = fit(tmp_path / "whole", **settings)
    assert not same_state(expected[1][-1], fit(tmp_path / "other")[1][-1])
    for step in (2, 5):
        with pytest.raises(Stopped):
            fit(tmp_path / "stopped", runtime(**stop_at_step(step)), **settings)
    assert_same_fit(fit(tmp_path / "stopped", **settings), expected)


def test_a_save_point_that_is_never_written_changes_nothing(tmp_path):
    often = fit(tmp_path / "often")
    seldom = runtime()
    seldom.checkpoint_seconds = 1e9
    assert_same_fit(fit(tmp_path / "seldom", seldom), often)


def test_a_damaged_save_point_is_said_and_the_fit_starts_again(tmp_path, caplog):
    expected = fit(tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", runtime(**stop_at_step(5)))
    save_point = tmp_path / "cut" / "train.ckpt"
    save_point.write_bytes(save_point.read_bytes()[: save_point.stat().st_size // 2])
    assert_same_fit(fit(tmp_path / "cut"), expected)
    assert "cannot be read" in caplog.text
    assert "train.net starts again" in caplog.text


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    source = TinySource(13)
    source.features["text.0"][:] = math.nan
    message = (
        r"train/loss is nan after epoch 0 of train.net \(step 3\); lower train.optimizer.lr or set train.clip"
    )
    with pytest.raises(TrainingError, match=message):
        fit(tmp_path, source=source)


def fit_on_this_rank(folder, step):
    whole = fit(folder / "whole", on_two_devices(runtime()), source=TinySource(13))
    if step is None:
        return whole
    try:
        fit(folder / "stopped", on_two_devices(runtime(**stop_at_step(step))))
    except Stopped:
        distributed.barrier()
    return whole, fit(folder / "stopped", on_two_devices(runtime()))


@pytest.mark.ddp
def test_ranks_stay_bit_identical(tmp_path):
    (one, its_states), (other, other_states) = on_ranks(fit_on_this_rank, tmp_path, None)
    assert len(its_states) == len(other_states) == 3
    assert all(same_state(*pair) for pair in zip(its_states, other_states, strict=True))
    assert same_state(one.scored.state_dict(), other.scored.state_dict())
    assert one.history == other.history
    assert one.selection == other.selection
    assert not torch.equal(its_states[0]["objective.linear.weight"], its_states[1]["objective.linear.weight"])


@pytest.mark.ddp
def test_a_stopped_fit_on_two_ranks_goes_on_to_the_same_result(tmp_path):
    for whole, resumed in on_ranks(fit_on_this_rank, tmp_path, 5):
        assert_same_fit(resumed, whole)


def fit_with_an_unread_cell(folder):
    """Two epochs of a network of which the head reads the second cell alone, which reads no cell."""
    space = FusionSpace(num_cells=2, num_steps=1, channels=3, length=4, head_cells=1)
    step = (StepGenotype((0, 1), "sum"),)
    cells = (CellGenotype(("image.0", "text.0"), step), CellGenotype(("image.1", "text.0"), step))
    network = space.build(FusionGenotype(cells, 1), INFOS)
    assert network.unread
    trained = train(
        network,
        Supervised(network.info.embedding, "multilabel", CLASSES, torch.zeros(3)),
        Batches(TinySource(13), draw_clean, 4, (0, "train", "batches"), whole=False),
        None,
        FitSettings(epochs=2, batch_size=4, optimizer=Optimizer(lr=0.01)),
        label="train.net",
        address=(0, "train"),
        runtime=on_two_devices(runtime()),
    )
    return trained.scored.state_dict()


@pytest.mark.ddp
def test_ranks_train_a_network_with_an_unread_cell(tmp_path):
    one, other = on_ranks(fit_with_an_unread_cell, tmp_path)
    assert same_state(one, other)

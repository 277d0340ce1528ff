"""Tiny fits for the tests of search and training, and ways to stop them."""

import contextlib
from dataclasses import replace

import torch
from conftest import INFOS, TinySource

from mmnas_lab.config import FitSettings, Optimizer, Search
from mmnas_lab.loader import Batches, FixedBatches, draw_clean, draw_pairs
from mmnas_lab.objective.nt_xent import NTXent
from mmnas_lab.objective.supervised import Supervised
from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.strategy.base import Problem
from mmnas_lab.strategy.gradient_search import Bilevel
from mmnas_lab.strategy.search_module import SearchModule
from mmnas_lab.training import Fit, Runtime, TrainFit, train

SPACE = FusionSpace(num_cells=2, num_steps=1, channels=3, length=4, dropout=0.1)
CLASSES = ("a", "b", "c")


class Stopped(Exception):
    """What a test stops a fit with."""


def runtime(**listeners):
    """A CPU that saves at every step."""
    return Runtime(checkpoint_seconds=0, **listeners)


def stop_at_step(number):
    """Stops when the step is done, before it is saved."""

    def progress(label, done, total):
        if done == number:
            raise Stopped

    return {"progress": progress}


def stop_after_validation(epoch):
    """Stops when an epoch's values are logged, before it is saved."""

    def report(label, points):
        if points and points[-1].epoch == epoch and len({point.epoch for point in points}) == 1:
            raise Stopped

    return {"report": report}


@contextlib.contextmanager
def states(kind):
    """The state of `scored` after each epoch of the fits of that class."""
    seen, original = [], kind.after_epoch

    def after_epoch(fit: Fit, epoch):
        values = original(fit, epoch)
        seen.append({name: value.detach().clone() for name, value in fit.scored.state_dict().items()})
        return values

    kind.after_epoch = after_epoch
    try:
        yield seen
    finally:
        kind.after_epoch = original


def problem(running, epochs=2, warmup_epochs=0, supervised=False, **settings):
    """12 samples for the weights, 8 for the architecture, batches of 4: 3 and 2 steps an epoch."""
    search = Search(
        epochs=epochs,
        batch_size=4,
        optimizer=Optimizer(lr=0.01),
        arch_optimizer=Optimizer(lr=0.05, betas=(0.5, 0.999), weight_decay=1e-3),
        warmup_epochs=warmup_epochs,
        **settings,
    )

    def objective(info):
        if supervised:
            return Supervised(info.embedding, "multilabel", CLASSES, torch.zeros(3))
        return NTXent(info.embedding, 0.5, hidden=5, projection=4)

    needs = (Supervised if supervised else NTXent).needs
    weights, architecture = TinySource(12), TinySource(8, seed=1)
    draw = draw_clean if supervised else draw_pairs
    return Problem(SPACE, INFOS, objective, needs, weights, architecture, draw, search, 0, running)


def search(folder, alternation, running=None, **settings):
    """The result of a search, and the states of its hypernet after each epoch."""
    folder.mkdir(exist_ok=True)
    with states(SearchModule) as seen:
        result = Bilevel(alternation).search(problem(running or runtime(), **settings), folder)
    return result, seen


def fit(folder, running=None, source=None, epochs=3, evaluations=3, **settings):
    """`train` of a drawn network on 13 samples, batches of 4: 3 steps an epoch; and its states."""
    folder.mkdir(exist_ok=True)
    source = source or TinySource(13)
    torch.manual_seed(5)
    network = SPACE.build(SPACE.sample(INFOS, torch.Generator().manual_seed(1)), INFOS)
    objective = Supervised(network.info.embedding, "multilabel", CLASSES, torch.zeros(3))
    with states(TrainFit) as seen:
        trained = train(
            network,
            objective,
            Batches(source, draw_pairs_of_one, 4, (0, "train", "batches"), whole=False),
            FixedBatches(TinySource(7, seed=2), draw_clean, 4, (0, "train", "val"), whole=False),
            FitSettings(**{"epochs": epochs, "batch_size": 4, "optimizer": Optimizer(lr=0.01)} | settings),
            label="train.net",
            address=(0, "train"),
            runtime=running or runtime(),
            evaluations=evaluations,
            save_point=folder / "train.ckpt",
        )
    return trained, seen


def draw_pairs_of_one(source, index, generator):
    """One view of each sample, so that the draw matters."""
    return source.views(index, generator, 1)


def on_two_devices(running):
    """The same runtime on two ranks."""
    return replace(running, devices=2)


def same_state(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

"""Fixtures of all tests: seeded randomness, a tiny source of samples, and two gloo processes."""

import contextlib
import multiprocessing
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist

from mmnas_lab.types import Batch, InputInfo

INFOS = {
    "image.0": InputInfo((6, 4), "image"),
    "image.1": InputInfo((7, 4), "image"),
    "text.0": InputInfo((5, 1), "text"),
}
SECONDS = 300  # that two processes may take for one call, on a machine that does other things as well


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


class TinySource:
    """Random samples in memory; a view is the sample with noise from the generator that is given."""

    def __init__(self, count, seed=0, classes=3, task="multilabel"):
        draws = torch.Generator().manual_seed(seed)
        self.infos = INFOS
        self.features = {
            name: torch.randn(count, *info.shape, generator=draws) for name, info in INFOS.items()
        }
        if task == "multilabel":
            self.labels = torch.rand(count, classes, generator=draws).gt(0.5).float()
        else:
            self.labels = torch.randint(classes, (count,), generator=draws)
        self.seen = []  # rows of every batch, as lists

    def __len__(self):
        return len(self.labels)

    def clean(self, index):
        self.seen.append(index.tolist())
        return Batch(({name: values[index] for name, values in self.features.items()},), self.labels[index])

    def views(self, index, generator, count):
        (inputs,), labels = self.clean(index)

        def view():
            return {
                name: values + 0.1 * torch.randn(values.shape, generator=generator)
                for name, values in inputs.items()
            }

        return Batch(tuple(view() for _ in range(count)), labels)

    def mixed(self, index, generator, clean_probability):
        (clean,), labels = self.clean(index)
        keep = torch.rand(len(index), generator=generator) < clean_probability
        (view,), _ = self.views(index, generator, 1)
        mixed = {name: torch.where(keep[:, None, None], clean[name], view[name]) for name in clean}
        return Batch((mixed,), labels)


# Two processes, started at first use and kept for the session: importing torch takes longer than most tests.

_ranks = []


def on_ranks(fn, *args):
    """Run `fn(*args)` on two gloo processes at once; both results, rank 0's first.

    `fn` is a function at the top of a module; arguments and results must survive pickling.
    """
    if not _ranks:
        _ranks.extend(_start(rank) for rank in range(2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for _, pipe in _ranks:
        pipe.send((fn, args, port))
    answers = []
    for _, pipe in _ranks:
        try:
            answers.append(pipe.recv() if pipe.poll(SECONDS) else (False, f"no answer in {SECONDS} s"))
        except EOFError:
            answers.append((False, "the process died"))
    failures = [f"rank {rank}: {answer}" for rank, (fine, answer) in enumerate(answers) if not fine]
    if failures:
        _stop()
        raise AssertionError("\n".join(failures))
    return [result for _, result in answers]


def _start(rank):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(rank, there), daemon=True)
    process.start()
    there.close()
    return process, here


def _stop():
    for process, pipe in _ranks:
        process.kill()
        process.join()
        pipe.close()
    _ranks.clear()


def _serve(rank, pipe):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with contextlib.suppress(EOFError):
        while True:
            fn, args, port = pipe.recv()
            os.environ["MASTER_PORT"] = str(port)
            try:
                dist.init_process_group("gloo", rank=rank, world_size=2)
                answer = (True, fn(*args))
            except BaseException:
                answer = (False, traceback.format_exc())
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
            pipe.send(answer)


@pytest.fixture(scope="session", autouse=True)
def _no_rank_outlives_the_session():
    yield
    _stop()

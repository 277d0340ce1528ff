"""How fast the search is, as ratios within one run: `python -m benchmarks.bench --out bench.json`.

    step     one weight half-step and one architecture half-step, ours against `plain_hypernet`
    epoch    a search epoch on cached features against the same epoch behind a live VGG19
    cache    a shuffled epoch from the memory-mapped cache against reading the file in order

Variants are interleaved in one process and the ratio is the median over pairs of runs, so that a slow moment
of the machine hits both; `cpu_ratio` is the same of CPU time, which other programs disturb less, `flop_ratio`
of the arithmetic in matrix products. Before it is timed, ours is shown equal to the plain one, outputs and
gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain_hypernet import PlainHypernet
from mmnas_lab.backbone.feature_cache import FeatureCache
from mmnas_lab.backbone.feature_source import FeatureSource
from mmnas_lab.backbone.feature_writer import FEATURES_FILE, STATISTICS_FILE, array_path
from mmnas_lab.config import Optimizer
from mmnas_lab.loader import Batches, draw_clean
from mmnas_lab.search_space.base import Hypernet, held_weights
from mmnas_lab.search_space.fusion.space import FusionSpace
from mmnas_lab.training import make_optimizer
from mmnas_lab.types import InputInfo, Inputs

BATCH, CLASSES = 96, 23
CHANNELS, LENGTH = 192, 16
INFOS = {
    **{f"image.{k}": InputInfo((512, 16), "image") for k in range(4)},
    "text.0": InputInfo((64, 1), "text"),
    "text.1": InputInfo((128, 1), "text"),
}
TRAIN, VAL = 15_552, 2_608  # movies
PICTURE, PICTURE_BATCH = (3, 256, 160), 8
TARGETS = {"shared": 3.0, "distinct": 2.2, "epoch": 100.0, "read": 0.5, "waiting": 0.05}


# ---- the two search steps ---------------------------------------------------------------------------


class Step(nn.Module, ABC):
    """A network with its head and optimizers, and a search step pair on two batches."""

    def __init__(self, network: nn.Module, arch: list[nn.Parameter]) -> None:
        super().__init__()
        self.network, self.arch = network, arch
        self.head = nn.Linear(2 * CHANNELS * LENGTH, CLASSES)
        ids = {id(parameter) for parameter in arch}
        weights = [p for p in [*network.parameters(), *self.head.parameters()] if id(p) not in ids]
        self.weight_optimizer = make_optimizer(weights, Optimizer(lr=1e-3, weight_decay=1e-4))
        self.arch_optimizer = make_optimizer(arch, Optimizer(lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3))

    @abstractmethod
    def embedding(self, inputs: Inputs) -> Tensor:
        """(B, 2 C L)."""

    def forward(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """The loss of one batch."""
        return F.binary_cross_entropy_with_logits(self.head(self.embedding(inputs)), labels)

    @abstractmethod
    def arch_step(self, inputs: Inputs, labels: Tensor) -> None:
        """One step of alpha, beta and gamma."""

    @abstractmethod
    def weight_step(self, inputs: Inputs, labels: Tensor) -> None:
        """One step of all other parameters."""


class OurStep(Step):
    """As `SearchModule` steps: the architecture's gradient alone, then the weights' with fixed mixtures."""

    network: Hypernet

    def __init__(self, pairing: str, dropout: float) -> None:
        space = FusionSpace(
            2,
            1,
            CHANNELS,
            LENGTH,
            dropout,
            attention_dropout=dropout,
            pairing=pairing,  # type: ignore[arg-type]
        )
        network = space.hypernet(INFOS)
        super().__init__(network, list(network.arch.values()))

    def embedding(self, inputs: Inputs) -> Tensor:
        return self.network(inputs).embedding

    def arch_step(self, inputs: Inputs, labels: Tensor) -> None:
        loss = functional_call(self, held_weights(self, self.arch), (inputs, labels))
        gradients = torch.autograd.grad(loss, self.arch)
        for parameter, gradient in zip(self.arch, gradients, strict=True):
            parameter.grad = gradient
        self.arch_optimizer.step()
        self.arch_optimizer.zero_grad()

    def weight_step(self, inputs: Inputs, labels: Tensor) -> None:
        self.weight_optimizer.zero_grad()
        with self.network.weights_only():
            self(inputs, labels).backward()
        self.weight_optimizer.step()


class PlainStep(Step):
    """As the released code steps: both half-steps differentiate with respect to everything."""

    network: PlainHypernet

    def __init__(self, pairing: str, dropout: float) -> None:
        network = PlainHypernet(
            {name: info.shape for name, info in INFOS.items()},  # type: ignore[misc]
            CHANNELS,
            LENGTH,
            dropout=dropout,
            attention_dropout=dropout,
            pairing=pairing,  # type: ignore[arg-type]
        )
        super().__init__(network, [network.alpha, network.beta, network.gamma])

    def embedding(self, inputs: Inputs) -> Tensor:
        return self.network(inputs)

    def _step(self, optimizer: torch.optim.Optimizer, inputs: Inputs, labels: Tensor) -> None:
        self.weight_optimizer.zero_grad()
        self.arch_optimizer.zero_grad()
        self(inputs, labels).backward()
        optimizer.step()

    def arch_step(self, inputs: Inputs, labels: Tensor) -> None:
        self._step(self.arch_optimizer, inputs, labels)

    def weight_step(self, inputs: Inputs, labels: Tensor) -> None:
        self._step(self.weight_optimizer, inputs, labels)


def assert_equal_networks(pairing: str, inputs: Inputs) -> None:
    """Outputs and gradients of ours and of the plain hypernet, without dropout, from the same parameters.

    Gradients in float64: among millions of ReLUs some input lies within float32 rounding of 0, and which side
    it falls on differs between any two orders of summation.

    Raises:
        AssertionError: a tensor differs by more than 1e-10 of its group's largest magnitude (outputs in
            float32: 1e-5).
    """
    ours, plain = OurStep(pairing, 0.0), PlainStep(pairing, 0.0)
    names, theirs = dict(plain_names(ours.network)), plain.network.named()

    def as_plain(name: str, tensor: Tensor) -> Tensor:
        return tensor.T if tensor.ndim == 2 and ".ln_" in name else tensor  # (L, C) to (C, L)

    plain.network.load({name: as_plain(name, parameter.detach()) for name, parameter in names.items()})
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        ours.network.to(dtype)
        plain.network.to(dtype)
        expected, actual = (
            step.embedding({name: feature.to(dtype) for name, feature in inputs.items()})
            for step in (plain, ours)
        )
        assert (actual - expected).abs().max() <= allowed * expected.abs().max(), f"outputs in {dtype}"
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    (actual * direction).sum().backward()
    arch = {"alpha", "beta", "gamma"}
    for group in (*({name} for name in arch), set(theirs) - arch):
        largest = max(float(theirs[name].grad.abs().max()) for name in group)  # type: ignore[union-attr]
        for name in group:
            mine = as_plain(name, names[name].grad)  # type: ignore[arg-type]
            error = float((mine - theirs[name].grad.reshape(mine.shape)).abs().max())  # type: ignore[union-attr]
            assert error <= allowed * largest, f"gradients of {name}: {error} of {largest}"


def plain_names(network: Hypernet) -> Iterator[tuple[str, nn.Parameter]]:
    """Our parameters under the names of the plain hypernet."""
    features = list(INFOS)
    for name, parameter in network.named_parameters():
        own = re.sub(r"^reshape\.(\d+)", lambda m: f"reshape.{features[int(m[1])]}", name)
        own = re.sub(r"^steps\.(\d+)\.(\d+)\.ops", r"cell.\1.step.\2", own)
        own = re.sub(r"^ends\.(\d+)", r"cell.\1", own)
        own = own.replace("flatten.", "head.").replace("arch.", "").replace("linear.", "")
        own = own.replace("linear_glu", "linear_glu.").replace("linear_glu..", "linear_glu.")
        kind = "ln" if parameter.ndim == 2 else "bn"
        yield re.sub(r"norm\.(\w+)$", rf"{kind}_\1", own), parameter


def batches() -> list[tuple[Inputs, Tensor]]:
    """Two batches of features in memory with labels."""
    draw = torch.Generator().manual_seed(0)
    return [
        (
            {name: torch.randn(BATCH, *info.shape, generator=draw) for name, info in INFOS.items()},
            torch.rand(BATCH, CLASSES, generator=draw).lt(0.1).float(),
        )
        for _ in range(2)
    ]


def bench_step(pairing: str, runs: int) -> dict[str, Any]:
    """Target 1: seconds of a search step pair, and the median ratio."""
    torch.manual_seed(0)
    first, second = batches()
    assert_equal_networks(pairing, first[0])
    steps: dict[str, Step] = {"ours": OurStep(pairing, 0.1), "plain": PlainStep(pairing, 0.1)}

    def pair(step: Step) -> Callable[[], None]:
        def both() -> None:
            step.arch_step(*first)
            step.weight_step(*second)

        return both

    flops = {name: flops_of(pair(step)) for name, step in steps.items()}
    times = interleaved({name: pair(step) for name, step in steps.items()}, runs)

    def ratio(clock: int) -> float:
        pairs = zip(times["plain"], times["ours"], strict=True)
        return statistics.median(plain[clock] / ours[clock] for plain, ours in pairs)

    return {
        "ours_ms": 1e3 * statistics.median(wall for wall, _ in times["ours"]),
        "plain_ms": 1e3 * statistics.median(wall for wall, _ in times["plain"]),
        "ratio": ratio(0),
        "cpu_ratio": ratio(1),
        "flop_ratio": flops["plain"] / flops["ours"],
        "target": TARGETS[pairing],
        "runs": runs,
    }


def flops_of(run: Callable[[], None]) -> int:
    """Floating-point operations of its matrix products."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def interleaved(variants: dict[str, Callable[[], None]], runs: int) -> dict[str, list[tuple[float, float]]]:
    """(Wall, CPU) seconds of each run of each variant, in turns, after two runs that are not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for run in range(runs + 2):
        for name, variant in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            variant()
            if run >= 2:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


# ---- a cache to read from ---------------------------------------------------------------------------


def write_cache(folder: Path, rows: int) -> int:
    """A cache of random training features as `compute_features` writes it; its size in bytes."""
    rng = np.random.default_rng(0)
    size = 0
    counts = {"train": rows, "val": 0, "test": 0}
    for name, info in INFOS.items():
        for split, count in counts.items():
            path = array_path(folder, split, name)  # type: ignore[arg-type]
            shape = (1, count, *info.shape)
            array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            for start in range(0, count, 1000):
                block = array[:, start : start + 1000]
                block[:] = rng.standard_normal(block.shape, dtype=np.float32)
            array.flush()
            size += array.nbytes
    statistics_of = {
        f"{name}.{key}": torch.full((info.shape[0],), value)
        for name, info in INFOS.items()
        for key, value in (("mean", 0.0), ("std", 1.0))
    }
    save_file(statistics_of, folder / STATISTICS_FILE)
    layout = {
        "num_views": 0,
        "rows": counts,
        "features": {
            name: {"shape": list(info.shape), "modality": info.modality} for name, info in INFOS.items()
        },
    }
    (folder / FEATURES_FILE).write_text(json.dumps(layout))
    return size


def sequential_seconds(folder: Path) -> float:
    """Seconds to read the arrays' bytes in order through the memory map."""
    start = time.perf_counter()
    for name in INFOS:
        array = np.load(array_path(folder, "train", name), mmap_mode="r")
        flat = array.reshape(-1)
        for begin in range(0, flat.size, 1 << 20):
            np.array(flat[begin : begin + (1 << 20)])
    return time.perf_counter() - start


def bench_cache(
    folder: Path, size: int, rows: int, epoch_samples: int, step_seconds: float
) -> dict[str, Any]:
    """Target 4: a shuffled epoch from the file against reading it in order, and the share spent waiting.

    `ratio` compares reading with reading, both in the file's float16; `converted_ratio` and waiting are of
    the batches that training gets, which are converted to float32 and standardised too. The readings are
    interleaved; the file stays in the page cache for all.
    """
    cache = FeatureCache(folder)
    source = FeatureSource(cache, "train", in_memory_bytes=0)
    order = Batches(source, draw_clean, BATCH, (0, "bench"), whole=True)
    epochs = -(-epoch_samples // rows)

    def gathered(epoch: int) -> float:
        rows_of = order.order(epoch)[: len(order) * BATCH].split(BATCH)
        clean = torch.zeros(BATCH, dtype=torch.long)
        start = time.perf_counter()
        for index in rows_of:
            for name in INFOS:
                cache.gather("train", name, clean, index)
        return time.perf_counter() - start

    def converted(epoch: int) -> float:
        start = time.perf_counter()
        for _ in order.epoch(epoch):
            pass
        return time.perf_counter() - start

    sequential_seconds(folder)
    seconds = [(sequential_seconds(folder), gathered(epoch), converted(epoch)) for epoch in range(epochs)]
    read = len(order) * BATCH / rows * size
    rates = [(size / in_order, read / by_row, read / as_batches) for in_order, by_row, as_batches in seconds]
    waiting = statistics.median(as_batches for *_, as_batches in seconds) / len(order)  # seconds a batch
    return {
        "sequential_mb_s": 1e-6 * statistics.median(rate for rate, *_ in rates),
        "shuffled_mb_s": 1e-6 * statistics.median(rate for _, rate, _ in rates),
        "converted_mb_s": 1e-6 * statistics.median(rate for *_, rate in rates),
        "ratio": statistics.median(by_row / in_order for in_order, by_row, _ in rates),
        "converted_ratio": statistics.median(as_batches / in_order for in_order, _, as_batches in rates),
        "target": TARGETS["read"],
        "batch_ms": 1e3 * waiting,
        "waiting": 2 * waiting / (2 * waiting + step_seconds),  # a step pair reads two batches
        "waiting_target": TARGETS["waiting"],
        "samples": epochs * len(order) * BATCH,
        "file_mb": 1e-6 * size,
    }


# ---- cached features against a live backbone --------------------------------------------------------


def bench_epoch(folder: Path, rows: int, pairs: int, pictures: int) -> dict[str, Any]:
    """Target 3: a search epoch (weights on train, architecture on val) with cached and with live features.

    Live, each sample passes through the convolutions of VGG19 once and then through the same step.
    """
    import timm

    source = FeatureSource(FeatureCache(folder), "train", torch.arange(min(rows, 20 * BATCH)))
    batches_of = Batches(source, draw_clean, BATCH, (0, "bench"), whole=True)
    labels = torch.rand(BATCH, CLASSES).lt(0.1).float()
    step = OurStep("shared", 0.1)

    def half(which: Callable[[Inputs, Tensor], None], epoch: int, index: int) -> float:
        start = time.perf_counter()
        which(batches_of.batch(epoch, index % len(batches_of), order).views[0], labels)
        return time.perf_counter() - start

    order = batches_of.order(0)
    half(step.arch_step, 0, 0)
    half(step.weight_step, 0, 0)
    arch = statistics.median(half(step.arch_step, 1, k) for k in range(pairs))
    weights = statistics.median(half(step.weight_step, 1, k) for k in range(pairs))
    cached = TRAIN / BATCH * weights + VAL / BATCH * arch

    backbone = timm.create_model("vgg19", pretrained=False).features.eval()
    images = torch.randn(PICTURE_BATCH, *PICTURE)
    live_batches = []
    with torch.no_grad():
        for _ in range(pictures + 1):
            start = time.perf_counter()
            backbone(images)
            live_batches.append(time.perf_counter() - start)
    forward = statistics.median(live_batches[1:]) / PICTURE_BATCH
    live = (TRAIN + VAL) * forward + cached
    return {
        "cached_s": cached,
        "live_s": live,
        "ratio": live / cached,
        "target": TARGETS["epoch"],
        "weight_step_ms": 1e3 * weights,
        "arch_step_ms": 1e3 * arch,
        "vgg_ms_a_picture": 1e3 * forward,
        "pairs": pairs,
        "picture_batches": pictures,
    }


# ---- all of it --------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--runs", type=int, default=15, help="paired runs of a step")
    parser.add_argument("--rows", type=int, default=10_000, help="samples in the cache, 66 kB each")
    settings = parser.parse_args()
    results: dict[str, Any] = {"torch": torch.__version__, "load": list(os.getloadavg()), "threads": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_cache(folder, settings.rows)
        for threads in settings.threads:
            torch.set_num_threads(threads)
            found: dict[str, Any] = {
                f"step {pairing}": bench_step(pairing, settings.runs) for pairing in ("shared", "distinct")
            }
            found["epoch"] = bench_epoch(folder, settings.rows, pairs=20, pictures=4)
            step_seconds = found["step shared"]["ours_ms"] / 1e3
            found["cache"] = bench_cache(folder, size, settings.rows, 20_000, step_seconds)
            results["threads"][threads] = found
            print(table(threads, found), flush=True)
    results["load_after"] = list(os.getloadavg())
    if settings.out is not None:
        settings.out.write_text(json.dumps(results, indent=1) + "\n")


def table(threads: int, found: dict[str, Any]) -> str:
    """The results of one number of threads as lines of text."""
    lines = [f"{threads} thread{'s' * (threads > 1)}", f"  {'':16}{'ratio':>8}{'target':>10}"]
    for name, values in found.items():
        detail = "  ".join(
            f"{key} {value:.4g}" for key, value in values.items() if key not in ("ratio", "target", "runs")
        )
        lines.append(f"  {name:16}{values['ratio']:8.2f}{values['target']:>10}   {detail}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""How fast a search step on cells is, as ratios within one run: `python -m benchmarks.bench_cells`.

A step is an architecture half-step and a weight half-step of DARTS' supernet (8 cells, C 16, 32 x 32 images),
gradients only, ours against `plain_supernet`. Variants are interleaved in one process; the ratio is that of
their fastest runs, once of wall-clock time and once of CPU time, which other programs disturb less. Peak
memory is what tensors add during a step. Before it is timed, ours is shown equal to the plain one in the same
process: outputs, all gradients and running statistics, to 1e-10 in float64 (see `check_equal` for float32).
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from benchmarks.plain_supernet import PlainSupernet
from mmnas_lab.search_space.base import Hypernet, held_weights
from mmnas_lab.search_space.cnn_cells.space import CnnCellSpace
from mmnas_lab.types import InputInfo

CLASSES, SIZE = 10, 32
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
FAN = re.compile(r"^(skeleton\.cells\.\d+)\.mixed\.fans\.(\d+)\.(own|shared)\.(\w+)\.(.+)$")


def tensors_by_edge(network: Hypernet) -> dict[str, tuple[Tensor, slice]]:
    """Parameters and running statistics of ours, one edge's operation at a time, as slices of the whole."""
    found: dict[str, tuple[Tensor, slice]] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        match = FAN.match(name)
        if match is None:
            found[name] = (tensor, slice(None))
            continue
        cell, source, form, op, rest = match.groups()
        mixed: Any = network.get_submodule(f"{cell}.mixed")
        own = [mixed.leaving[int(source)][e] for e, _ in mixed.fans[int(source)].edges_of[op]]
        for i, e in enumerate(own):
            size = len(tensor) // len(own) if tensor.ndim else 0
            part = slice(i * size, (i + 1) * size) if form == "own" else slice(None)
            found[f"{cell}.edge.{e}.{op}.{rest}"] = (tensor, part)
    return {name: pair for name, pair in found.items() if not name.endswith("num_batches_tracked")}


class Plain:
    """Both half-steps call backward for everything, as the released code does."""

    def __init__(self, network: PlainSupernet, head: nn.Linear) -> None:
        self.network, self.head = network, head
        self.parameters = [*network.parameters(), *head.parameters()]

    def half(self, image: Tensor, labels: Tensor) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        loss = F.cross_entropy(self.head(self.network(image)), labels)
        loss.backward()
        return loss.detach()

    def step(self, image: Tensor, labels: Tensor) -> None:
        """An architecture and a weight half-step."""
        self.half(image, labels)
        self.half(image, labels)


class Loss(nn.Module):
    """The cross-entropy of a supernet and a head."""

    def __init__(self, network: Hypernet, head: nn.Linear) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.network({"image": image}).embedding), labels)


class Ours:
    """Each half-step holds what it does not move, as those of a search do."""

    def __init__(self, network: Hypernet, head: nn.Linear) -> None:
        self.network, self.head, self.loss = network, head, Loss(network, head)
        self.arch = list(network.arch.values())
        arch = {id(parameter) for parameter in self.arch}
        self.weights = [p for p in network.parameters() if id(p) not in arch] + list(head.parameters())

    def arch_half(self, image: Tensor, labels: Tensor) -> list[Tensor]:
        loss = functional_call(self.loss, held_weights(self.loss, self.arch), (image, labels))
        return list(torch.autograd.grad(loss, self.arch))

    def weight_half(self, image: Tensor, labels: Tensor) -> None:
        for parameter in self.weights:
            parameter.grad = None
        with self.network.weights_only():
            self.loss(image, labels).backward()

    def step(self, image: Tensor, labels: Tensor) -> None:
        """An architecture and a weight half-step."""
        self.arch_half(image, labels)
        self.weight_half(image, labels)


def check_equal(ours: Ours, plain: Plain, image: Tensor, labels: Tensor) -> dict[str, float]:
    """The largest differences after one step, each relative to its tensor's largest magnitude.

    Everything in float64; in float32 outputs and running statistics alone. There a gradient may jump, in the
    plain network as in ours: where the inputs of a ReLU or a max pooling tie within rounding.

    Raises:
        SystemExit: ours differs.
    """
    found: dict[str, float] = {}
    dtypes = (torch.float32, torch.float64)
    for dtype in dtypes:
        pair = copy.deepcopy((ours.network, ours.head, plain.network, plain.head))
        network, head, twin, twin_head = (module.to(dtype) for module in pair)
        errors = _errors(Ours(network, head), Plain(twin, twin_head), image.to(dtype), labels)  # type: ignore[arg-type]
        if dtype == torch.float32:
            errors = {name: error for name, error in errors.items() if "gradient" not in name}
        worst = max(errors, key=lambda name: errors[name])
        if errors[worst] > TOLERANCE[dtype]:
            raise SystemExit(f"ours differs from the plain supernet: {worst} by {errors[worst]:.1e}, {dtype}")
        found[str(dtype).removeprefix("torch.")] = errors[worst]
    return found


def _errors(ours: Ours, plain: Plain, image: Tensor, labels: Tensor) -> dict[str, float]:
    """Relative differences by name.

    A gradient below a hundredth of the largest is held to that, a mean to its standard deviation.
    """
    ours.weight_half(image, labels)
    gradients = ours.arch_half(image, labels)
    plain.step(image, labels)
    theirs = plain.network.by_edge()
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (tensor, part) in tensors_by_edge(ours.network).items():
        if name.startswith("arch"):
            continue
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert theirs[name].grad is not None
            pairs[f"gradient of {name}"] = (tensor.grad[part], theirs[name].grad)  # type: ignore[assignment]
        else:
            pairs[name] = (tensor[part], theirs[name])
    for name, gradient in zip(ours.network.arch, gradients, strict=True):
        pairs[f"gradient of {name}"] = (gradient, theirs[f"arch.{name}"].grad)  # type: ignore[assignment]
    with torch.no_grad():
        pairs["embedding"] = (ours.network({"image": image}).embedding, plain.network(image))
    floor = 0.01 * max(float(b.abs().max()) for name, (_, b) in pairs.items() if "gradient" in name)

    def scale(name: str) -> float:
        largest = float(pairs[name][1].abs().max())
        if name.endswith("running_mean"):
            return max(largest, float(theirs[name.replace("_mean", "_var")].sqrt().max()))
        return max(largest, floor) if "gradient" in name else largest

    return {name: float((a - b).abs().max()) / scale(name) for name, (a, b) in pairs.items()}


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that tensors take at the worst moment of a step, beyond what is held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    held = peak = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def bench(batch: int, runs: int, device: torch.device, cells: int, channels: int) -> dict[str, Any]:
    """Equality, speed and memory at one batch size."""
    torch.manual_seed(0)
    inputs = {"image": InputInfo((3, SIZE, SIZE), "image")}
    network = CnnCellSpace(num_cells=cells, channels=channels).hypernet(inputs).to(device)
    head = nn.Linear(network.info.embedding, CLASSES).to(device)
    twin = PlainSupernet(cells, channels).to(device)
    twin.load({name: tensor[part] for name, (tensor, part) in tensors_by_edge(network).items()})
    plain_head = nn.Linear(network.info.embedding, CLASSES).to(device)
    plain_head.load_state_dict(head.state_dict())
    ours, plain = Ours(network, head), Plain(twin, plain_head)
    image = torch.randn(batch, 3, SIZE, SIZE, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)

    few = slice(min(batch, 4))
    errors = check_equal(ours, plain, image[few], labels[few])

    times: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
    for run in range(runs + 1):
        for which, step in (("plain", plain.step), ("ours", ours.step)):
            if device.type == "cuda":
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            step(image, labels)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run:
                times[which].append((time.perf_counter() - wall, time.process_time() - cpu))
    (ours_wall, ours_cpu), (plain_wall, plain_cpu) = (
        (min(t[0] for t in times[which]), min(t[1] for t in times[which])) for which in ("ours", "plain")
    )
    memory = {
        which: peak_bytes(lambda step=step: step(image, labels), device)  # type: ignore[misc]
        for which, step in (("ours", ours.step), ("plain", plain.step))
    }
    return {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads",
        "batch": batch,
        "largest_error": errors,
        "plain_ms": 1e3 * plain_wall,
        "ours_ms": 1e3 * ours_wall,
        "ratio": plain_wall / ours_wall,
        "cpu_ratio": plain_cpu / ours_cpu,
        "plain_peak_mb": memory["plain"] / 1e6,
        "ours_peak_mb": memory["ours"] / 1e6,
        "memory_ratio": memory["ours"] / memory["plain"],
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    found = bench(
        settings.batch, settings.runs, torch.device(settings.device), settings.cells, settings.channels
    )
    print("\n".join(f"{name:>16}  {value}" for name, value in found.items()))
    if settings.out is not None:
        settings.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

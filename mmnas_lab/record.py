"""What a run leaves behind: one folder, named after everything that its results depend on."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from mmnas_lab import native
from mmnas_lab.config import Config
from mmnas_lab.stage import StageResult, atomically, digest, write_json
from mmnas_lab.training import Point

SCHEMA = 1
_HARDWARE = ("accelerator", "threads", "checkpoint_seconds", "timeout_seconds")


def run_folder(config: Config, fingerprint: str) -> Path:
    """`<output>/<experiment>/<slug>-<8 hex>/seed_<n>`; the hash leaves out paths and hardware."""
    settings = config.model_dump()
    for key in ("seed", "logger", "output"):
        del settings[key]
    for key in _HARDWARE:
        settings["trainer"].pop(key, None)
    settings["dataset"].pop("path", None)
    key = digest({"settings": settings, "data": fingerprint})
    slug = (
        f"{config.scale}_r{config.labelled_share:g}_{config.strategy['_target_'].rsplit('.', 1)[-1].lower()}"
    )
    return Path(config.output) / config.experiment / f"{slug}-{key[:8]}" / f"seed_{config.seed}"


def environment(command: str) -> dict[str, Any]:
    """Commit, versions, hardware and command of this run."""
    names = ("torch", "lightning", "torchmetrics", "timm", "transformers", "hydra-core", "numpy")
    return {
        "command": command,
        "commit": _commit(),
        "python": platform.python_version(),
        "compiler": native.compiler(),  # without one, compiled passes are torch's, dropout draws differently
        "versions": {name: importlib.metadata.version(name) for name in names},
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _commit() -> str | None:
    """Commit of the checkout that the package lies in, with a mark if there are changes beside it.

    Rows that a study has just added under `results/` are none.
    """
    here = Path(__file__).parent
    try:
        options = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()  # type: ignore[call-overload]
        status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results"]
        changed = subprocess.run(status, **options).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}{'+changes' if changed else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def timing(stages: dict[str, StageResult]) -> dict[str, Any]:
    """Seconds of each stage, and whether this run computed it."""
    return {name: {"seconds": round(r.seconds, 3), "reused": r.reused} for name, r in sorted(stages.items())}


def write_config(folder: Path, config: Config) -> None:
    """The resolved configuration."""
    with atomically(folder / "config.yaml") as file:
        file.write(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True).encode())


def write_metrics_csv(path: Path, histories: dict[str, list[Point]]) -> None:
    """All logged values, a row each: stage, run, step, epoch, name, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["stage", "run", "step", "epoch", "name", "value"])
    for label, points in histories.items():
        stage_name, _, run = label.partition(".")
        writer.writerows([stage_name, run or "found", p.step, p.epoch, p.name, repr(p.value)] for p in points)
    with atomically(path) as file:
        file.write(text.getvalue().encode())


def copy(source: Path, target: Path) -> None:
    """Copy a stage's file into the run folder, whole or not at all."""
    with atomically(target) as file, source.open("rb") as original:
        shutil.copyfileobj(original, file)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """The record, with its schema version first."""
    write_json(folder / "record.json", {"schema": SCHEMA, **record})


def read_record(path: Path) -> dict[str, Any]:
    """A record, from its file or its run folder."""
    return json.loads((path / "record.json" if path.is_dir() else path).read_text())


def command_line() -> str:
    """This process's command, without the interpreter's path."""
    return " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def save_module(path: Path, module: torch.nn.Module, more: dict[str, Tensor] | None = None) -> None:
    """Write a module's state, and more tensors beside it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file({**tensors, **(more or {})}, path)


def write_history(folder: Path, history: list[Point]) -> None:
    """Keep a fit's logged values with its stage."""
    write_json(folder / "history.json", [list(point) for point in history])


def read_history(folder: Path) -> list[Point]:
    """What `write_history` wrote."""
    path = folder / "history.json"
    return [Point(*point) for point in json.loads(path.read_text())] if path.exists() else []

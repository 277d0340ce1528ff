"""For studies of many runs in one process: experiments without a command line, and rows that are appended.

A study is a loop over experiments whose rows go into a JSON-lines file under `results/`; what is in the file is
not computed again, and stages under `outputs/` are shared as always.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from mmnas_lab import record
from mmnas_lab.build import check_config
from mmnas_lab.experiment import Experiment
from mmnas_lab.runner import prepare_process
from mmnas_lab.training import Runtime

CONF = Path(__file__).parent.parent / "conf"


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of these overrides, as plain values."""
    import hydra
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        config = hydra.compose("config", overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def open_experiment(values: dict[str, Any]) -> Experiment:
    """The experiment of a composed configuration, with its features at hand. Raises InputError."""
    config = check_config(values)
    prepare_process(config)
    trainer = config.trainer
    experiment = Experiment(config, Runtime(trainer.accelerator, trainer.devices, trainer.precision))
    experiment.cache  # noqa: B018 - computed or opened now, not in the middle of the loop
    return experiment


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSON-lines file; a last line that a killed process left unfinished is passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, whole, also where several processes write."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    with FileLock(path.with_name(f".{path.name}.lock")), path.open("a") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            line = "\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def row_environment(experiment: Experiment) -> dict[str, Any]:
    """What a row of a study must say about where it comes from."""
    environment = record.environment("")
    hardware = environment["hardware"]
    return {
        "commit": environment["commit"],
        "data": experiment.dataset.fingerprint()[:16],
        "hardware": f"{hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads",
    }

"""For studies of many runs in one process: experiments without a command line, and rows that are appended.

A study is a loop over experiments whose rows go into a JSON-lines file under `results/`; what is in the file
is not computed again, and stages under `outputs/` are shared as always.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmnas_lab import record
from mmnas_lab.build import check_config
from mmnas_lab.experiment import Experiment
from mmnas_lab.runner import prepare_process
from mmnas_lab.training import Runtime

CONF = Path(__file__).parent.parent / "conf"


def study_parser(description: str, out: str, datasets: Iterable[str] = ()) -> argparse.ArgumentParser:
    """What studies are told alike.

    Args:
        description: of the study, as it stands in its file.
        out: file of the rows.
        datasets: that the study runs on, each with an option for its folder, None where it is not given.

    Returns:
        A parser of `--<dataset> <folder>`, `--out <file>` and, as `overrides`, Hydra's for every run.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in datasets:
        parser.add_argument(f"--{name}", type=Path, help=f"folder of {name}; left out if not given")
    parser.add_argument("--out", type=Path, default=Path(out), help="file of the rows")
    parser.add_argument("overrides", nargs="*", help="for every run, output=<folder> for instance")
    return parser


def begin_study(name: str, out: Path) -> logging.Logger:
    """The study's own log, with times; the folder of its rows is there afterwards."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    out.parent.mkdir(parents=True, exist_ok=True)
    return logging.getLogger(name)


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
    experiment.data.cache  # noqa: B018 - computed or opened now, not in the middle of the loop
    return experiment


def row_environment(experiment: Experiment) -> dict[str, Any]:
    """What a row of a study must say about where it comes from."""
    environment = record.environment("")
    hardware = environment["hardware"]
    return {
        "commit": environment["commit"],
        "data": experiment.data.dataset.fingerprint()[:16],
        "hardware": f"{hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads",
    }

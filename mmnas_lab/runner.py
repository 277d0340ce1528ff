"""One run: the stages of an experiment, its baselines, and the folder that it leaves behind."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmnas_lab import distributed, record
from mmnas_lab.baselines import run_baselines
from mmnas_lab.build import check_config
from mmnas_lab.config import Config
from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.experiment import Experiment, Found
from mmnas_lab.report.progress import ProgressReport
from mmnas_lab.stage import StageResult
from mmnas_lab.training import Point, Runtime
from mmnas_lab.types import InputError

log = logging.getLogger(__name__)

_LIBRARY_LOGS = (
    "lightning.pytorch",
    "lightning.fabric",
    "pytorch_lightning",
    "timm",
    "transformers",
    "httpx",
)


def run(values: dict[str, Any], overrides: Sequence[str] = ()) -> Path:
    """Run a composed configuration to the end of its stages.

    Args:
        values: the configuration as plain values.
        overrides: what was given on the command line, for the record.

    Returns:
        The run's folder.

    Raises:
        InputError: bad settings or input; TrainingError: a loss that is not finite.
    """
    config = check_config(values)
    prepare_process(config)
    progress = ProgressReport(enabled=distributed.rank() == 0)
    with progress:
        experiment = Experiment(config, runtime(config, progress))
        fingerprint = experiment.data.dataset.fingerprint()
        folder = record.run_folder(config, fingerprint)
        with_log = distributed.rank() == 0
        if with_log:
            folder.mkdir(parents=True, exist_ok=True)
            record.write_config(folder, config)
        handler = _log_file(folder / "log.txt") if with_log else None
        try:
            _stages(experiment, folder, overrides, progress)
        finally:
            if handler is not None:
                logging.getLogger().removeHandler(handler)
                handler.close()
    return folder


def prepare_process(config: Config) -> None:
    """Threads, determinism, quiet libraries, and the process group where there are several ranks."""
    import os
    import warnings
    from datetime import timedelta

    for name in _LIBRARY_LOGS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    trainer = config.trainer
    if trainer.accelerator == "gpu" and torch.cuda.device_count() < trainer.devices:
        raise InputError(
            f"trainer.accelerator=gpu with {trainer.devices} devices, but this machine shows "
            f"{torch.cuda.device_count()}; use trainer=cpu, or fewer devices"
        )
    if trainer.threads is not None:
        torch.set_num_threads(trainer.threads)
    torch.use_deterministic_algorithms(trainer.deterministic, warn_only=True)
    if trainer.devices > 1 and not torch.distributed.is_initialized():
        backend = "nccl" if trainer.accelerator == "gpu" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=trainer.timeout_seconds))


def runtime(config: Config, progress: ProgressReport) -> Runtime:
    """The hardware of a run and who listens to its progress."""
    trainer = config.trainer
    return Runtime(
        trainer.accelerator,
        trainer.devices,
        trainer.precision,
        trainer.checkpoint_seconds,
        trainer.timeout_seconds,
        progress.report,
        progress.step,
    )


def _log_file(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


def _stages(experiment: Experiment, folder: Path, overrides: Sequence[str], progress: ProgressReport) -> None:
    config = experiment.config
    wanted = config.stages
    log.info("%s, seed %d: %s", config.experiment, config.seed, ", ".join(wanted))
    progress.listen(loggers(config, folder))
    experiment.data.cache  # noqa: B018 - the stage `features`
    found: Found | None = None
    baselines: dict[str, Any] = {}
    if {"search", "pretrain", "train", "test"} & set(wanted):
        genotype = experiment.genotype()
        found = experiment.evaluate(genotype, "found")
        experiment.results |= found.stages
        if "test" in wanted:
            baselines = run_baselines(experiment)
    if distributed.rank() == 0:
        summary = assemble(experiment, found, baselines, overrides)
        leave(experiment, found, folder, summary)
        progress.finish(folder, summary)
    distributed.barrier()


def loggers(config: Config, folder: Path) -> list[Any]:
    """The listeners besides the CSV file, on rank 0."""
    if distributed.rank() != 0:
        return []
    if config.logger.name == "wandb":
        from mmnas_lab.report.wandb_run import WandbRun

        name = f"{config.experiment}_{folder.parent.name}_seed_{config.seed}"
        mode = config.logger.mode
        return [
            WandbRun(
                folder,
                config.logger.project,
                name,
                config.model_dump(),
                mode,
                config.experiment,
                [config.scale],
            )
        ]
    if config.logger.name == "tensorboard":
        from mmnas_lab.report.tensorboard_run import TensorBoardRun

        return [TensorBoardRun(folder / "tensorboard")]
    return []


def assemble(
    experiment: Experiment, found: Found | None, baselines: dict[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """The record: results first, then what they rest on; all but timing and environment is reproducible."""
    config, results = experiment.config, experiment.results
    search = results.get("search")
    needs = experiment.objective_needs(config.objective)
    label_free_search = not (experiment.strategy.needs_data and needs.labels)
    selection = {
        name: json.loads((result.folder / "selection.json").read_text())
        for name, result in (("search", search), *(found.stages.items() if found else ()))
        if result is not None and (result.folder / "selection.json").exists()
    }
    # How many micro-benchmarks the store did not have is no part of the result.
    searched = selection.get("search", {})
    timing = record.timing(results)
    if "new_scores" in searched:
        timing["search"]["new_scores"] = searched.pop("new_scores")
    parameters: dict[str, Any] = {}
    if found is not None:
        network = experiment.space.build(found.genotype, experiment.data.cache.infos)
        parameters = {"network": sum(p.numel() for p in network.parameters())}
        if "train" in found.stages:
            from safetensors.torch import load_file

            trained = load_file(found.stages["train"].folder / "network.safetensors")
            head = (value for name, value in trained.items() if name.startswith("objective."))
            parameters["head"] = sum(value.numel() for value in head)
    data: dict[str, Any] = {
        "name": experiment.data.dataset.name,
        "fingerprint": experiment.data.dataset.fingerprint(),
        "counts": {split: len(experiment.data.dataset.ids(split)) for split in SPLITS},
    }
    if found is not None and "train" in found.stages:
        data["labelled"] = len(experiment.data.labelled_rows)
        data["labels"] = experiment.data.dataset.label_fingerprint()
    return {
        "experiment": config.experiment,
        "overrides": [word for word in overrides if not word.startswith(("output=", "logger"))],
        "seed": config.seed,
        "label_free": label_free_search and experiment.data.backbone.label_free,
        "genotype": found.genotype.to_json() if found else None,
        "margins": json.loads((search.folder / "margins.json").read_text()) if search else {},
        "benchmark": _benchmark(experiment, found),
        "metrics": found.metrics if found else {},
        "baselines": baselines,
        "selection": selection,
        "parameters": parameters,
        "flops": flops(experiment, found) if found else None,
        "data": data,
        "inputs": {name: list(info.shape) for name, info in experiment.data.cache.infos.items()},
        "stages": {name: result.key for name, result in sorted(results.items())},
        "timing": timing,
        "environment": record.environment(record.command_line()),
    }


def _benchmark(experiment: Experiment, found: Found | None) -> dict[str, float]:
    """What a tabular benchmark says of the found genotype, where the space has one."""
    look_up = getattr(experiment.space, "benchmark", None)
    return look_up(found.genotype) if look_up is not None and found is not None else {}


def flops(experiment: Experiment, found: Found) -> int:
    """Floating-point operations of one sample through the found network, backbones excluded."""
    from torch.utils.flop_counter import FlopCounterMode

    network = experiment.space.build(found.genotype, experiment.data.cache.infos).eval()
    inputs = {name: torch.zeros(1, *info.shape) for name, info in experiment.data.cache.infos.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(inputs)
    return counter.get_total_flops()


def _draw_search(experiment: Experiment, search: StageResult, folder: Path) -> None:
    """Pictures of how the search went: weights of every edge, reconstructions over the epochs."""
    from safetensors.numpy import load_file

    from mmnas_lab.report.decision_drawing import draw_decisions
    from mmnas_lab.report.edge_weights import draw_edge_weights
    from mmnas_lab.report.reconstructions import draw_reconstructions, picture_names

    if (search.folder / "decisions.json").exists():
        draw_decisions(search.folder / "decisions.json", folder / "decisions.png")
    draw_edge_weights(search.folder / "trace.json", folder / "edge_weights.png")
    if (search.folder / "snapshots.safetensors").exists():
        snapshots = load_file(search.folder / "snapshots.safetensors")
        for name in picture_names(snapshots):
            mean, std = (value.numpy() for value in experiment.data.cache.statistics[name])
            draw_reconstructions(snapshots, name, mean, std, folder / "reconstructions.png")


def leave(experiment: Experiment, found: Found | None, folder: Path, summary: dict[str, Any]) -> None:
    """Write the run's folder: genotype, drawings, metrics, curves, network, and the record last."""
    from mmnas_lab.report.cell_drawing import draw_cells
    from mmnas_lab.report.curves import draw_curves, drawable
    from mmnas_lab.report.fusion_drawing import draw_fusion
    from mmnas_lab.report.mixer_drawing import draw_mixers

    drawings = {"fusion": draw_fusion, "cnn_cells": draw_cells, "mixers": draw_mixers}
    draw = drawings[experiment.space.name]

    histories: dict[str, list[Point]] = {}
    for name, result in experiment.results.items():
        points = record.read_history(result.folder)
        if points:
            label = name if name.count(".") else (name if name == "search" else f"{name}.found")
            histories[label] = points
    record.write_metrics_csv(folder / "metrics.csv", histories)
    search: StageResult | None = experiment.results.get("search")
    if search is not None:
        record.copy(search.folder / "genotype.json", folder / "genotype.json")
        for suffix in ("svg", "png"):
            draw(summary["genotype"], summary["margins"], folder / f"genotype.{suffix}")
        _draw_search(experiment, search, folder)
    if histories:
        trace = search.folder / "trace.json" if search is not None else None
        if drawable(folder / "metrics.csv", trace):
            name = (summary["selection"].get("train") or {}).get("name") or ""
            draw_curves(folder / "metrics.csv", trace, folder / "curves.png", name.removeprefix("val_"))
    if found is not None and "train" in found.stages:
        record.copy(found.stages["train"].folder / "network.safetensors", folder / "network.safetensors")
    record.write_record(folder, summary)

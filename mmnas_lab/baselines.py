"""Fixed networks beside the found one: same features, head, recipe and budget."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file

from mmnas_lab.experiment import Experiment, Found
from mmnas_lab.randomness import generator
from mmnas_lab.testing import late_fusion
from mmnas_lab.types import Split

SPLITS: tuple[Split, ...] = ("val", "test")


def run_baselines(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Metrics of the configured baselines, by name and split."""
    wanted = experiment.config.baselines
    inputs = experiment.data.cache.infos
    modalities = tuple(dict.fromkeys(info.modality for info in inputs.values()))
    needed: list[str] = [name for name in wanted if name not in ("late_fusion", "random_genotype")]
    if "late_fusion" in wanted:
        needed += [modality for modality in modalities if modality not in needed]
    found = {name: _evaluate(experiment, experiment.space.fixed(name, inputs), name) for name in needed}
    metrics: dict[str, dict[str, Any]] = {name: one.metrics for name, one in found.items() if name in wanted}
    if "late_fusion" in wanted:
        metrics["late_fusion"] = _late_fusion(experiment, [found[modality] for modality in modalities])
    if "random_genotype" in wanted:
        metrics["random_genotype"] = _random_genotypes(experiment)
    return metrics


def _evaluate(experiment: Experiment, genotype: Any, name: str) -> Found:
    found = experiment.evaluate(genotype, name)
    experiment.results |= {f"{stage_name}.{name}": result for stage_name, result in found.stages.items()}
    return found


def _late_fusion(experiment: Experiment, unimodal: list[Found]) -> dict[str, Any]:
    """The unimodal networks' logits added, the prior's log-odds subtracted once."""
    stored = [load_file(found.stages["test"].folder / "predictions.safetensors") for found in unimodal]
    task = experiment.data.dataset.task
    return {
        split: experiment.scores(
            late_fusion([logits[f"{split}.logits"] for logits in stored], experiment.prior(), task), split
        )
        for split in SPLITS
    }


def _random_genotypes(experiment: Experiment) -> dict[str, Any]:
    """Genotypes drawn uniformly and not selected: means as val and test, each as `draws`."""
    draws = []
    for k in range(experiment.config.random_draws):
        draw = generator(experiment.config.seed, "random_genotype", k)
        genotype = experiment.space.sample(experiment.data.cache.infos, draw)
        found = _evaluate(experiment, genotype, f"random_{k}")
        draws.append({"genotype": genotype.to_json(), **found.metrics})
    means: dict[str, Any] = {
        split: {
            name: sum(draw[split][name] for draw in draws) / len(draws)
            for name in draws[0][split]
            if name != "per_class"
        }
        for split in SPLITS
    }
    return {**means, "draws": draws}

"""MixMAS' greedy search against every network of a small vocabulary, each of them fully trained.

    python scripts/mixmas_grid.py --utd_mhad <folder> --physionet2012 <folder>

UTD-MHAD: MLP-Mixer or HyperMixer for skeletons and for the inertial sensor, MLP-Mixer for depth, three fusion
functions, two fusion networks: 24 networks. PhysioNet 2012: MLP-Mixer, HyperMixer or Monarch Mixer for the
series, the feed-forward network for the table, the same fusion: 18 networks.

Looked for, written down before the first run:

(a) regret: the greedy choice is within 1 point of the network that is best on val of those of the grid, on
    val and on test, and above the mean of the grid, which is what a random pick has;
(b) Kendall's tau between the micro-benchmark score of a network (the search's budget, on its sample, the mean
    of its seeds) and its val score after full training is above 0; how far it can be is told by tau between
    full trainings under two seeds.

A network's level is its mean over the seeds of the full training; searches and micro-benchmarks run under the
same seeds, each with a sample of its own. The search scores an encoder in the network of its modality alone,
the micro-benchmarks here score whole networks: (b) is about the budget, (a) also about being greedy.

Rows of `results/mixmas_grid.jsonl`: one for each dataset, seed and network, and one for each dataset, seed
and search; what is there is not computed again. Sizes are those of scale=cpu, and those below; nothing here
is to be set beside a paper's figure.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.experiment import Experiment
from mmnas_lab.strategy.bench import Bench, Trial
from mmnas_lab.study import begin_study, compose, open_experiment, row_environment, study_parser
from mmnas_lab.study_rows import append, read_rows

SEEDS = (0, 1, 2)
COMMON = ["scale=cpu", "trainer.threads=1", "baselines=[]"]
OVERRIDES = {
    "utd_mhad": [
        "~search_space.encoders.skeleton.monarch_mixer",
        "~search_space.encoders.series.monarch_mixer",
        "~search_space.encoders.video.hyper_mixer",
        "dataset.depth_frames=8",
        "dataset.depth_height=30",
        "dataset.depth_width=40",
        "search.epochs=15",  # 263 training samples
        "train.epochs=60",
    ],
    "physionet2012": [],
}
REPORTED = ("accuracy", "f1_macro", "auroc", "auprc", "auroc_macro", "auprc_macro")


def grid(experiment: Experiment) -> Iterator[Any]:
    """Every genotype of the vocabulary that reads all modalities."""
    space, inputs = experiment.space, experiment.data.cache.infos
    choices = space.choices(inputs)
    for options in product(*(choice.options for choice in choices)):
        chosen = {choice.name: option for choice, option in zip(choices, options, strict=True)}
        yield space.genotype_of(chosen, inputs)


def name_of(genotype: Any) -> str:
    """A genotype as text: its encoders, fusion function and fusion network."""
    return ", ".join(
        [*(name for _, name in genotype.encoders), genotype.fusion_function, genotype.fusion_network]
    )


def measure(experiment: Experiment, genotype: Any, bench: Bench) -> dict[str, Any]:
    """Micro-benchmark scores of a network, and its metrics after full training."""
    epochs, seed = experiment.config.search.epochs, experiment.config.seed
    trials = [
        Trial("whole", name_of(genotype), genotype, each, epochs)
        for each in experiment.strategy.trial_seeds(seed)
    ]
    started = time.monotonic()
    with bench.processes() as scores_of:
        scores = scores_of(trials)
    micro_seconds = time.monotonic() - started
    found = experiment.evaluate(genotype, "grid")
    selection = json.loads((found.stages["train"].folder / "selection.json").read_text())
    return {
        "micro": [round(score, 6) for score in scores],
        "micro_metric": bench.metric,
        "selected_by": selection["name"],
        **{
            split: {
                name: round(found.metrics[split][name], 6)
                for name in REPORTED
                if name in found.metrics[split]
            }
            for split in ("val", "test")
        },
        "flops": bench.flops(genotype),
        "micro_seconds": round(micro_seconds, 1),
        "train_seconds": round(found.stages["train"].seconds, 1),
    }


def search(experiment: Experiment) -> dict[str, Any]:
    """The greedy choice, and how it was made."""
    genotype = experiment.genotype()
    result = experiment.results["search"]
    selection = json.loads((result.folder / "selection.json").read_text())
    return {"network": name_of(genotype), "selection": selection, "search_seconds": round(result.seconds, 1)}


def main() -> None:
    arguments = study_parser(__doc__ or "", "results/mixmas_grid.jsonl", OVERRIDES).parse_args()
    logging.getLogger("mmnas_lab").setLevel(logging.WARNING)
    log = begin_study("mixmas_grid", arguments.out)
    for (name, own), seed in product(OVERRIDES.items(), SEEDS):
        if (path := getattr(arguments, name)) is None:
            continue
        settings = [f"experiment=mixmas_{name}", *COMMON, *own, f"dataset.path={path}", f"seed={seed}"]
        experiment = open_experiment(compose([*settings, *arguments.overrides]))
        counts = {split: len(experiment.data.dataset.ids(split)) for split in SPLITS}
        environment = {"samples": counts, **row_environment(experiment)}
        identity = {"dataset": name, "seed": seed}
        have = {row["network"] for row in read_rows(arguments.out) if _of(row, "search", identity)}
        if not have:
            row = {"kind": "search", **identity, **search(experiment), **environment}
            append(arguments.out, row)
            log.info("%s, seed %d: %s found in %.0f s", name, seed, row["network"], row["search_seconds"])
        bench = experiment.strategy.bench(experiment.problem())
        have = {row["network"] for row in read_rows(arguments.out) if _of(row, "network", identity)}
        todo = [genotype for genotype in grid(experiment) if name_of(genotype) not in have]
        started = time.monotonic()
        for k, genotype in enumerate(todo):
            row = {"kind": "network", **identity, "network": name_of(genotype)}
            append(arguments.out, {**row, **measure(experiment, genotype, bench), **environment})
            left = (time.monotonic() - started) / (k + 1) * (len(todo) - k - 1)
            log.info("%s, seed %d: %d of %d, about %.0f s left", name, seed, k + 1, len(todo), left)


def _of(row: dict[str, Any], kind: str, identity: dict[str, Any]) -> bool:
    return row["kind"] == kind and identity.items() <= row.items()


if __name__ == "__main__":
    main()

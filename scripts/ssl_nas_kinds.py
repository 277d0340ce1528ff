"""SSL-NAS on other kinds of data: skeletons with sensors and depth, pictures with sound, series with a table.

    python scripts/ssl_nas_kinds.py --utd_mhad <folder> --avmnist <folder> --physionet2012 <folder>
    python scripts/ssl_nas_kinds.py --utd_mhad <folder> --seeds 3 4 5

Looked for, written down before the first run, at r = 0.1 on every dataset:

(a) SSL-NAS (label-free search, contrastive pretraining of the found network, a classifier on the labelled
    share) is above its best single modality, which is chosen on val;
(b) it is above random genotypes that are pretrained and trained in the same way;
(c) its search is above the supervised one on the same labelled share, both found networks pretrained; and the
    whole is above BM-NAS as published, that is supervised search and no pretraining;
(d) it is at least level with late fusion of the pretrained unimodal networks.

Added when UTD-MHAD was seen: depth, which tells little and is sure of itself, spoils late fusion, so that (d)
is asked against late fusion of the subset of modalities that is best on val as well.

Encoders of all kinds are small and, but for that of pictures, trained without labels here; features are
frozen and the same for every method, as is the training recipe. Selection is on val, all of it labelled.
UTD-MHAD has 9 or 10 training samples of each of its 27 classes, so that a stratified tenth has one label of
nearly every class and none of some; it is run at r = 0.3 as well, where every class has two or more, one in
each half of the supervised search. The others have labels of every class at r = 0.1.

To keep it to an hour or so on one core, depth is read as 8 frames of 30 x 40, AV-MNIST has 6,000 training
pairs, and where there are thousands of samples searches and pretrainings have fewer epochs, which leaves them
some 300 steps each, as many as UTD-MHAD gives them. Genotypes are read off alpha (`strategy=bilevel`).

One row of `results/ssl_nas_kinds.jsonl` for each dataset, share and seed; what is there is not computed
again. Sizes are those of scale=cpu, with what is set below; nothing here is to be set beside a paper's
figure.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmnas_lab.baselines import run_baselines
from mmnas_lab.experiment import Experiment, Found
from mmnas_lab.study import begin_study, compose, open_experiment, row_environment, study_parser
from mmnas_lab.study_rows import append, read_rows
from mmnas_lab.testing import late_fusion
from mmnas_lab.types import Split

SEEDS = [0, 1, 2]
SHARES = {"utd_mhad": (0.1, 0.3), "avmnist": (0.1,), "physionet2012": (0.1,)}
COMMON = ["trainer.threads=1", "random_draws=2", "strategy=bilevel"]
OVERRIDES = {
    "utd_mhad": [
        "baselines=[skeleton,inertial,depth,late_fusion,random_genotype]",
        "dataset.depth_frames=8",
        "dataset.depth_height=30",
        "dataset.depth_width=40",
    ],
    "avmnist": [
        "baselines=[image,audio,late_fusion,random_genotype]",
        "dataset.num_train=6000",
        "dataset.num_val=1000",
        "dataset.num_test=2000",
        "encoder_pretrain.epochs=8",
        "search.epochs=12",
        "pretrain.epochs=15",
    ],
    "physionet2012": [
        "baselines=[series,tabular,late_fusion,random_genotype]",
        "search.epochs=22",
        "pretrain.epochs=30",
    ],
}
# The same space and recipe; BM-NAS searches with whole passes in turn, on clean features, in small batches.
SUPERVISED = [
    "objective=supervised",
    "strategy.alternation=epoch",
    "search.views.drop_modality=0",
    "search.batch_size=64",
]
REPORTED = ("accuracy", "f1_macro", "auroc", "auprc", "auroc_macro", "auprc_macro")


def runs(datasets: list[str], seeds: list[int]) -> Iterator[dict[str, Any]]:
    """What identifies each row, dataset by dataset and seed by seed."""
    for dataset in datasets:
        for seed in seeds:
            for share in SHARES[dataset]:
                yield {"dataset": dataset, "labelled_share": share, "seed": seed}


def reported(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics that a row holds, by split, rounded."""
    return {
        split: {name: round(metrics[split][name], 5) for name in REPORTED if name in metrics[split]}
        for split in ("val", "test")
    }


def chosen_late_fusion(experiment: Experiment, metric: str) -> dict[str, Any]:
    """Late fusion of the subset of modalities, of one or more, that is best on val by a metric.

    `run_baselines` must have trained the unimodal networks.
    """
    logits = {
        name: load_file(experiment.results[f"test.{name}"].folder / "predictions.safetensors")
        for name in experiment.data.dataset.modalities
    }
    task, prior = experiment.data.dataset.task, experiment.prior()

    def scores(names: tuple[str, ...], split: Split) -> dict[str, Any]:
        fused = late_fusion([logits[name][f"{split}.logits"] for name in names], prior, task)
        return experiment.scores(fused, split)

    subsets = [names for count in range(1, len(logits) + 1) for names in combinations(logits, count)]
    best = max(subsets, key=lambda names: scores(names, "val")[metric])
    return {"val": scores(best, "val"), "test": scores(best, "test"), "modalities": best}


def selected_by(found: Found) -> str:
    """The metric that selected the checkpoint of a trained network."""
    return json.loads((found.stages["train"].folder / "selection.json").read_text())["name"]


def labels_of(experiment: Experiment) -> dict[str, int]:
    """How many training samples are labelled, of how many classes, and how many of the rarest class."""
    data = experiment.data
    labels = data.labels("train")[data.labelled_rows]
    counts = torch.bincount(labels, minlength=len(data.dataset.classes))
    return {
        "rows": len(labels),
        "of": len(data.labels("train")),
        "classes": int((counts > 0).sum()),
        "classes_of": len(counts),
        "least": int(counts.min()),
    }


def measure(settings: list[str]) -> dict[str, Any]:
    """A row: every network of the comparison, and the genotypes of both searches."""
    label_free = open_experiment(compose(settings))
    supervised = open_experiment(compose([*settings, *SUPERVISED]))
    from_scratch = open_experiment(compose([*settings, *SUPERVISED, "pretrain.epochs=0"]))
    found, with_labels = label_free.genotype(), supervised.genotype()
    ssl_nas = label_free.evaluate(found, "found")
    networks = {
        "ssl_nas": ssl_nas.metrics,
        "supervised_search": label_free.evaluate(with_labels, "supervised").metrics,
        "bm_nas": from_scratch.evaluate(with_labels, "supervised").metrics,
        **run_baselines(label_free),
    }
    fused = chosen_late_fusion(label_free, selected_by(ssl_nas).removeprefix("val_"))
    networks["late_fusion_chosen"] = fused
    searches = {"ssl_nas": (label_free, found), "supervised_search": (supervised, with_labels)}
    return {
        "labelled": labels_of(label_free),
        "selected_by": selected_by(ssl_nas),
        "networks": {name: reported(metrics) for name, metrics in networks.items()},
        "late_fusion_chosen": list(fused["modalities"]),
        "random_draws": [reported(draw) for draw in networks["random_genotype"]["draws"]],
        "genotypes": {name: genotype.to_json() for name, (_, genotype) in searches.items()},
        "margins": {
            name: json.loads((experiment.results["search"].folder / "margins.json").read_text())
            for name, (experiment, _) in searches.items()
        },
        "search_seconds": {
            name: round(experiment.results["search"].seconds, 1) for name, (experiment, _) in searches.items()
        },
        **row_environment(label_free),
    }


def main() -> None:
    parser = study_parser(__doc__ or "", "results/ssl_nas_kinds.jsonl", SHARES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    log = begin_study("ssl_nas_kinds", arguments.out)
    datasets = [name for name in SHARES if getattr(arguments, name) is not None]
    for identity in runs(datasets, arguments.seeds):
        if any(identity.items() <= row.items() for row in read_rows(arguments.out)):
            continue
        name = identity["dataset"]
        settings = [
            f"experiment=ssl_nas_{name}",
            *COMMON,
            *OVERRIDES[name],
            f"dataset.path={getattr(arguments, name)}",
            f"labelled_share={identity['labelled_share']}",
            f"seed={identity['seed']}",
            *arguments.overrides,
        ]
        started = time.monotonic()
        row = {**identity, **measure(settings)}
        append(arguments.out, row)
        log.info("%s done in %.0f s", identity, time.monotonic() - started)


if __name__ == "__main__":
    main()

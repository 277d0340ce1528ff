"""MixMAS against M2-Mixer, a random pick, single modalities and late fusion, on real data at small scale.

    python scripts/mixmas_study.py --physionet2012 <dir> --utd_mhad <dir> --avmnist <dir> --mmimdb <dir>

Looked for, written down before the first run: the found network is above a random pick of its vocabulary and
above M2-Mixer on every dataset, as in the paper's table II; and above the best single modality.

Everything is below the paper's size, so that a dataset takes some minutes a seed on one core. Networks are
those of scale=cpu, with channel MLPs of 512 (paper: 3072), batches and widths those of the experiment:

    physionet2012  3,198 stays; 5 epochs a micro-benchmark (paper: 10), 15 in full training
    utd_mhad       263 performances; 20 and 60 epochs at a rate of 3e-3: at 1e-3 skeletons are 4 points lower;
                   depth of 30 x 40 (60 x 80, of which so few performances are learned by heart)
    avmnist        4,000 pairs of 55,000, 2,000 to test; 5 and 8 epochs. Spectrograms of 28 x 28, each cell
                   the mean power of 4 x 4 (112 x 112), with patches of 14 (56): of finer ones so few noisy
                   recordings are learned by heart within two epochs (accuracy 0.20 from sound alone)
    mmimdb         2,401 movies with posters of 64 x 48 (256 x 160), 32 tokens of MiniLM (512 of BERT), width
                   128 (256), channel MLPs of 256, RaMLP with a block a stage and half its widths; the paper's
                   sample of 23 % and 5 epochs, then 8 with batches of 64; threshold 0.3 (0.5), that of the
                   plain models beside which the page puts it. Posters are read as pixels by networks that
                   start from nothing: far below what a pretrained encoder gives

One row of `results/mixmas.jsonl` for each dataset and seed, with the decisions of the search; what is there
is not computed again. `python scripts/report.py results` makes the page.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmnas_lab.baselines import run_baselines
from mmnas_lab.dataset.base import SPLITS
from mmnas_lab.experiment import Experiment
from mmnas_lab.study import begin_study, compose, open_experiment, row_environment, study_parser
from mmnas_lab.study_rows import append, read_rows, same_run

SEEDS = (0, 1, 2)
OVERRIDES = {
    "physionet2012": ["baselines=[series,tabular,m2_mixer,late_fusion,random_genotype]"],
    "utd_mhad": [
        "baselines=[skeleton,inertial,depth,m2_mixer,late_fusion,random_genotype]",
        "dataset.depth_height=30",
        "dataset.depth_width=40",
        "search.epochs=20",
        "search.optimizer.lr=3e-3",
        "train.epochs=60",
        "train.optimizer.lr=3e-3",
    ],
    "avmnist": [
        "baselines=[image,audio,m2_mixer,late_fusion,random_genotype]",
        "dataset.num_train=4000",
        "dataset.num_val=1000",
        "dataset.num_test=2000",
        "dataset.average=4",
        *(
            f"search_space.encoders.audio.{name}.patch=14"
            for name in ("mlp_mixer", "hyper_mixer", "monarch_mixer")
        ),
        "train.epochs=8",
    ],
    "mmimdb": [
        "baselines=[image,text,m2_mixer,late_fusion,random_genotype]",
        "backbone.size=[64,48]",
        "backbone.tokens=32",
        "search_space.width=128",
        *(
            f"search_space.{node}_mixer.channel_hidden=256"
            for group in ("encoders.image", "encoders.text", "fusion_networks")
            for node in (f"{group}.mlp", f"{group}.hyper")
        ),
        "search_space.encoders.image.ramlp.depths=[1,1,1,1]",
        "+search_space.encoders.image.ramlp.widths=[32,64,128,256]",
        "strategy.fraction=0.23",
        "train.batch_size=64",
        "objective.threshold=0.3",
        "train.objective.threshold=0.3",
        "train.epochs=8",
    ],
}
WITHOUT_GENOTYPE = ("late_fusion", "random_genotype")
HARDWARE = ("trainer.", "strategy.workers", "strategy.store", "output", "logger")
"""Overrides that change no result."""
REPORTED = ("accuracy", "f1_weighted", "f1_macro", "auroc", "auprc")


def reported(metrics: dict[str, Any], split: str) -> dict[str, float]:
    """The metrics of a split that a row holds, rounded."""
    return {name: round(metrics[split][name], 5) for name in REPORTED if name in metrics[split]}


def measure(experiment: Experiment) -> dict[str, Any]:
    """What the search chose, and the scores of its network and of the baselines."""
    genotype = experiment.genotype()
    search = experiment.results["search"]
    baselines = run_baselines(experiment)
    metrics = {"found": experiment.evaluate(genotype, "found").metrics, **baselines}
    config, dataset = experiment.config, experiment.data.dataset
    selection = json.loads((search.folder / "selection.json").read_text())
    return {
        "metric": selection["name"],
        "counts": {split: len(dataset.ids(split)) for split in SPLITS},
        "epochs": {"search": config.search.epochs, "train": config.train.epochs},
        "genotype": genotype.to_json(),
        "selection": selection,
        "search_seconds": round(search.seconds, 1),
        "val": {name: reported(one, "val") for name, one in metrics.items()},
        "test": {name: reported(one, "test") for name, one in metrics.items()},
        "parameters": parameters(experiment, genotype, baselines),
    }


def parameters(experiment: Experiment, found: Any, baselines: dict[str, Any]) -> dict[str, float]:
    """Parameters of every network without its heads; of random picks their mean."""
    space, inputs = experiment.space, experiment.data.cache.infos
    networks = {"found": [found]}
    networks |= {name: [space.fixed(name, inputs)] for name in baselines if name not in WITHOUT_GENOTYPE}
    if "random_genotype" in baselines:
        draws = baselines["random_genotype"]["draws"]
        networks["random_genotype"] = [space.parse(draw["genotype"], inputs) for draw in draws]
    return {
        name: fmean(sum(p.numel() for p in space.build(one, inputs).parameters()) for one in genotypes)
        for name, genotypes in networks.items()
    }


def main() -> None:
    arguments = study_parser(__doc__ or "", "results/mixmas.jsonl", OVERRIDES).parse_args()
    log = begin_study("mixmas_study", arguments.out)
    own = [word for word in arguments.overrides if not word.startswith(HARDWARE)]
    for seed in SEEDS:
        for name, settings in OVERRIDES.items():
            path = getattr(arguments, name)
            identity = {"dataset": name, "seed": seed, **({"overrides": own} if own else {})}
            if path is None or any(same_run(identity, row) for row in read_rows(arguments.out)):
                continue
            started = time.monotonic()
            overrides = [
                f"experiment=mixmas_{name}",
                "scale=cpu",
                *settings,
                f"dataset.path={path}",
                f"seed={seed}",
            ]
            experiment = open_experiment(compose([*overrides, *arguments.overrides]))
            row = {**identity, **measure(experiment), **row_environment(experiment)}
            append(arguments.out, row)
            log.info("%s done in %.0f s: %s", identity, time.monotonic() - started, row["test"])


if __name__ == "__main__":
    main()

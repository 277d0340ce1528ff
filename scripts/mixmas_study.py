"""MixMAS against M2-Mixer, a random pick, single modalities and late fusion, on real data at small scale.

    python scripts/mixmas_study.py --physionet2012 <folder> --utd_mhad <folder> --avmnist <folder>

Looked for, written down before the first run: the found network is above a random pick of its vocabulary and
above M2-Mixer on every dataset, as in the paper's table II; and above the best single modality.

One row of `results/mixmas.jsonl` for each dataset and seed, with the decisions of the search; what is there
is not computed again. Sizes are those of scale=cpu, so nothing here is to be set beside a paper's figure.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmnas_lab.baselines import run_baselines
from mmnas_lab.study import compose, open_experiment, row_environment
from mmnas_lab.study_rows import append, read_rows

SEEDS = (0, 1, 2)
OVERRIDES = {
    "physionet2012": ["baselines=[series,tabular,m2_mixer,late_fusion,random_genotype]"],
    "utd_mhad": [
        "baselines=[skeleton,inertial,depth,m2_mixer,late_fusion,random_genotype]",
        "search.epochs=20",  # 263 training samples
        "train.epochs=100",
    ],
    "avmnist": [
        "baselines=[image,audio,m2_mixer,late_fusion,random_genotype]",
        "dataset.num_train=6000",
        "dataset.num_val=1000",
        "dataset.num_test=2000",
    ],
}
REPORTED = ("accuracy", "f1_macro", "auroc", "auprc")


def reported(metrics: dict[str, Any]) -> dict[str, float]:
    """The test metrics that a row holds, rounded."""
    return {name: round(metrics["test"][name], 5) for name in REPORTED if name in metrics["test"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in OVERRIDES:
        parser.add_argument(f"--{name}", type=Path, help=f"folder of {name}; left out if not given")
    parser.add_argument("--out", type=Path, default=Path("results/mixmas.jsonl"))
    parser.add_argument("overrides", nargs="*", help="for every run, strategy.workers=2 for instance")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log = logging.getLogger("mixmas_study")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        for name, own in OVERRIDES.items():
            path = getattr(arguments, name)
            identity = {"dataset": name, "seed": seed}
            if path is None or any(identity.items() <= row.items() for row in read_rows(arguments.out)):
                continue
            started = time.monotonic()
            settings = [
                f"experiment=mixmas_{name}",
                "scale=cpu",
                *own,
                f"dataset.path={path}",
                f"seed={seed}",
            ]
            experiment = open_experiment(compose([*settings, *arguments.overrides]))
            genotype = experiment.genotype()
            found = experiment.evaluate(genotype, "found")
            search = experiment.results["search"]
            row = {
                **identity,
                "genotype": genotype.to_json(),
                "selection": json.loads((search.folder / "selection.json").read_text()),
                "search_seconds": round(search.seconds, 1),
                "test": {
                    "found": reported(found.metrics),
                    **{k: reported(v) for k, v in run_baselines(experiment).items()},
                },
                **row_environment(experiment),
            }
            append(arguments.out, row)
            log.info("%s done in %.0f s: %s", identity, time.monotonic() - started, row["test"])


if __name__ == "__main__":
    main()

"""What masking and the zero-one loss do to a search of cells, on small supernets and real CIFAR-10.

    python scripts/cell_mechanisms.py dataset.path=<cifar10>                 (a and b; each resumes)
    python scripts/cell_mechanisms.py --study b dataset.path=<cifar10>

(a) masked reconstruction: skip connections in the normal cell against mask ratio and decoder. Looked for,
    before running: fewer skips at 0.5 and above than at 0.1 and 0.3, and fewer with the hierarchical decoder.
(b) sigmoid weights with cross-entropy: with the zero-one loss fewer of them lie between 0.2 and 0.8 at the
    end than without it.

One row of `results/cell_mechanisms.jsonl` for each search; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmnas_lab.study import compose, open_experiment, row_environment
from mmnas_lab.study_rows import append, read_rows

SEEDS = (0, 1, 2)
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
DECODERS = ("hierarchical", "plain")
# 22,500 pictures in each half, batches of 45, two epochs: 1,000 steps of the architecture.
SMALL = [
    "scale=cpu",
    "search.batch_size=45",
    "search.epochs=2",
    "search.min_steps=0",
    "stages=[features,search]",
    "baselines=[]",
]
SIGMOID = [
    "experiment=darts_cifar10",
    "search_space.vocabulary=fairdarts",
    "search_space.relaxation=sigmoid",
    "search_space.init_scale=0",
    "search.arch_optimizer.lr=0.01",
    "search.arch_optimizer.betas=[0.9,0.999]",
]
ZERO_ONE = [
    "+search.regularisers.zero_one.weight=10",
    "+search.regularisers.zero_one.function._target_=mmnas_lab.objective.regularisers.ZeroOne",
]


def searches(study: str) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """What identifies each search of a study, and its overrides."""
    for seed in SEEDS:
        if study == "a":
            for ratio in RATIOS:
                for decoder in DECODERS:
                    yield (
                        {"study": "a", "mask_ratio": ratio, "decoder": decoder, "seed": seed},
                        [
                            "experiment=mae_nas_cifar10",
                            f"objective.mask_ratio={ratio}",
                            f"objective.decoder={decoder}",
                            "objective.patch=2",  # a patch is an eighth of the side, as 4 is of 32
                        ],
                    )
        else:
            for zero_one in (True, False):
                yield (
                    {"study": "b", "zero_one": zero_one, "seed": seed},
                    [*SIGMOID, *(ZERO_ONE if zero_one else [])],
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="for every run, dataset.path=... above all")
    parser.add_argument("--study", choices=["a", "b"], nargs="+", default=["b", "a"])
    parser.add_argument("--out", type=Path, default=Path("results/cell_mechanisms.jsonl"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for study in arguments.study:
        for identity, overrides in searches(study):
            if any(identity.items() <= row.items() for row in read_rows(arguments.out)):
                continue
            values = compose([*overrides, *SMALL, f"seed={identity['seed']}", *arguments.overrides])
            experiment = open_experiment(values)
            genotype = experiment.genotype().to_json()
            result = experiment.results["search"]
            last = json.loads((result.folder / "trace.json").read_text())["records"][-1]
            append(
                arguments.out,
                {
                    **identity,
                    "steps": last["step"],
                    "skips_normal": sum(
                        edge["op"] == "skip_connect"
                        for cell in genotype["cells"]
                        if cell["kind"] == "normal"
                        for node in cell["nodes"]
                        for edge in node
                    ),
                    "mixing": {
                        name: [round(weight, 5) for weight in weights]
                        for name, weights in last["mixing"].items()
                    },
                    "genotype": genotype,
                    "seconds": round(result.seconds, 1),
                    **row_environment(experiment),
                },
            )
            logging.getLogger("cell_mechanisms").info("%s done in %.0f s", identity, result.seconds)


if __name__ == "__main__":
    main()

"""What masking, the zero-one loss and Barlow Twins do to a search of cells: small supernets, real CIFAR-10.

    python scripts/cell_mechanisms.py --path <cifar10>                 (a, b and c; each resumes)
    python scripts/cell_mechanisms.py --study c --path <cifar10> dataset.mu=0.1

Written down before the first run, as what is looked for:

(a) masked reconstruction: skip connections in the normal cell against mask ratio and decoder. Fewer skips at
    0.5 and above than at 0.1 and 0.3, and fewer with the hierarchical decoder than with the plain one.
(b) sigmoid weights with cross-entropy: with the zero-one loss fewer of them lie between 0.2 and 0.8 at the
    end than without it.
(c) long-tailed CIFAR-10 (exponential, mu 0.01): cells found by Barlow Twins have a higher balanced test
    accuracy than those found by cross-entropy, cells found with sigmoid and zero-one a higher one than those
    with softmax, and all a higher one than random cells. All cells keep two operations a node (DARTS' rule),
    so that they are of one size, and are trained in the same way.

The supernet has 3 cells of 2 nodes with C 4 on pictures of 16 x 16 (the papers: 8 cells of 4 nodes, C 16,
32 x 32), the found network 5 cells with C 8 (20, 36), trained for 10 epochs (600). One row of
`results/cell_mechanisms.jsonl` for each search; what is there is not computed again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmnas_lab.experiment import Experiment
from mmnas_lab.randomness import generator
from mmnas_lab.study import begin_study, compose, open_experiment, row_environment, study_parser
from mmnas_lab.study_rows import append, read_rows, same_run

SEEDS = (0, 1, 2)
RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
DECODERS = ("hierarchical", "plain")
RELAXATIONS = ("softmax", "sigmoid_zero_one")
OBJECTIVES = ("supervised", "barlow_twins")
RANDOM_DRAWS = 2
SMALL = [
    "scale=cpu",
    "search_space.num_nodes=2",
    "search.epochs=1",
    "search.min_steps=1000",
    "baselines=[]",
    "trainer.threads=1",
]
# 22,500 pictures in each half, batches of 22: an epoch is 1,022 steps of the architecture.
WHOLE = ["search.batch_size=22", "stages=[features,search]"]
# 5,582 pictures in each half, batches of 32: 6 epochs are 1,044 steps.
LONG_TAIL = [
    "search.batch_size=32",
    "train.epochs=10",
    "train.batch_size=64",
    "stages=[features,search,train,test]",
]
SIGMOID = [
    "search_space.relaxation=sigmoid",
    "search_space.init_scale=0",
    "search.arch_optimizer.lr=0.01",
    "search.arch_optimizer.betas=[0.9,0.999]",
]
ZERO_ONE = [
    "+search.regularisers.zero_one.weight=10",
    "+search.regularisers.zero_one.function._target_=mmnas_lab.objective.regularisers.ZeroOne",
]
PROJECTOR = ["objective.hidden=128", "objective.projection=128"]  # embeddings have 16 channels here

Identity = dict[str, Any]


def searches(study: str) -> Iterator[tuple[Identity, list[str]]]:
    """What identifies each search of a study, and its overrides; seed by seed."""
    for seed in SEEDS:
        rows = {"a": masking, "b": sharpening, "c": long_tail}[study]()
        for identity, overrides in rows:
            yield (
                {"study": study, **identity, "seed": seed},
                [*overrides[:1], *SMALL, *overrides[1:], f"seed={seed}"],
            )


def masking() -> Iterator[tuple[Identity, list[str]]]:
    """Mask ratios and decoders."""
    for ratio in RATIOS:
        for decoder in DECODERS:
            yield (
                {"mask_ratio": ratio, "decoder": decoder},
                [
                    "experiment=mae_nas_cifar10",
                    *WHOLE,
                    f"objective.mask_ratio={ratio}",
                    f"objective.decoder={decoder}",
                    "objective.patch=2",  # a patch is an eighth of the side, as 4 is of 32
                ],
            )


def sharpening() -> Iterator[tuple[Identity, list[str]]]:
    """With and without the zero-one loss."""
    for zero_one in (True, False):
        yield (
            {"zero_one": zero_one},
            [
                "experiment=darts_cifar10",
                *WHOLE,
                "search_space.vocabulary=fairdarts",
                *SIGMOID,
                *(ZERO_ONE if zero_one else []),
            ],
        )


def long_tail() -> Iterator[tuple[Identity, list[str]]]:
    """Relaxations and objectives on a long tail, and cells drawn at random."""
    cells = ["experiment=darts_cifar10", "dataset=cifar10_lt", *LONG_TAIL]
    for relaxation in RELAXATIONS:
        for objective in OBJECTIVES:
            views = [
                "search.pixel_views={crop_padding: 2, flip: true, jitter: 0.5, grey: 0.2, solarise: 0.2}"
            ]
            yield (
                {"relaxation": relaxation, "objective": objective},
                [
                    *cells,
                    f"objective={objective}",
                    *([*PROJECTOR, *views] if objective == "barlow_twins" else []),
                    *([*SIGMOID, *ZERO_ONE] if relaxation == "sigmoid_zero_one" else []),
                ],
            )
    for draw in range(RANDOM_DRAWS):
        yield {"relaxation": "random", "objective": "none", "draw": draw}, cells


def measure(identity: Identity, experiment: Experiment) -> dict[str, Any]:
    """What a search gave: operations, mixing weights and, on the long tail, test accuracies."""
    if identity.get("relaxation") == "random":
        draw = generator(identity["seed"], "random_genotype", identity["draw"])
        genotype, row = experiment.space.sample(experiment.data.cache.infos, draw), {}
    else:
        genotype = experiment.genotype()
        result = experiment.results["search"]
        last = json.loads((result.folder / "trace.json").read_text())["records"][-1]
        row = {
            "steps": last["step"],
            "mixing": {
                name: [round(weight, 5) for weight in weights] for name, weights in last["mixing"].items()
            },
            "seconds": round(result.seconds, 1),
        }
    plain = genotype.to_json()
    row["skips_normal"] = sum(
        edge["op"] == "skip_connect"
        for cell in plain["cells"]
        if cell["kind"] == "normal"
        for node in cell["nodes"]
        for edge in node
    )
    row["genotype"] = plain
    if identity["study"] == "c":
        metrics = experiment.evaluate(genotype, "found").metrics["test"]
        row["test"] = {
            name: round(value, 5) for name, value in metrics.items() if name.startswith("accuracy")
        }
        dataset = experiment.config.dataset
        row |= {name: dataset[name] for name in ("profile", "mu")}
    return row


def main() -> None:
    parser = study_parser(__doc__ or "", "results/cell_mechanisms.jsonl")
    parser.add_argument("--path", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--study", choices=["a", "b", "c"], nargs="+", default=["b", "c", "a"])
    arguments = parser.parse_args()
    log = begin_study("cell_mechanisms", arguments.out)
    own = [override for override in arguments.overrides if override.startswith("dataset.")]
    for study in arguments.study:
        for identity, overrides in searches(study):
            identity |= {"overrides": own} if own else {}
            if any(same_run(identity, row) for row in read_rows(arguments.out)):
                continue
            path = f"dataset.{'dataset.' if study == 'c' else ''}path={arguments.path}"
            started = time.monotonic()
            experiment = open_experiment(compose([*overrides, path, *arguments.overrides]))
            row = {**identity, **measure(identity, experiment), **row_environment(experiment)}
            append(arguments.out, row)
            log.info("%s done in %.0f s", identity, time.monotonic() - started)


if __name__ == "__main__":
    main()

"""Plain models on the study's own subsets: logistic regression a genre on the same frozen features.

    python scripts/sklearn_levels.py dataset.path=<movie_posters>

One row of `results/ssl_nas_posters_sklearn.jsonl` for each (model, labelled share, seed); what is there is
not computed again. The regularisation is chosen on val; late fusion adds the log-odds of the two classifiers
and subtracts the prior's once.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from mmnas_lab.objective.metrics import classification_metrics
from mmnas_lab.study import compose, open_experiment, row_environment
from mmnas_lab.study_rows import append, read_rows
from mmnas_lab.testing import late_fusion

FEATURES = {"image": ("image.3", "image.4"), "text": ("text.1", "text.2")}
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SHARES = (0.05, 0.1, 0.3, 1.0)


def logits_of(experiment, names, rows):
    """Val and test logits of the best regularisation on val, one classifier a genre."""
    from sklearn.linear_model import LogisticRegression

    def matrix(split, rows=None):
        source = experiment.data.source(split, rows, names=names)
        views = source.clean(torch.arange(len(source))).views[0]
        return torch.cat([views[name].flatten(1) for name in names], 1).numpy()

    x = {"train": matrix("train", rows), "val": matrix("val"), "test": matrix("test")}
    labels = experiment.data.labels("train")[rows].numpy()
    best = None
    for strength in STRENGTHS:
        logits = {split: np.zeros((len(x[split]), labels.shape[1]), np.float32) for split in ("val", "test")}
        for genre in range(labels.shape[1]):
            if len(set(labels[:, genre])) == 1:
                constant = 20.0 if labels[0, genre] else -20.0
                for split in logits:
                    logits[split][:, genre] = constant
                continue
            model = LogisticRegression(C=strength, max_iter=300).fit(x["train"], labels[:, genre])
            for split in logits:
                logits[split][:, genre] = model.decision_function(x[split])
        tensors = {split: torch.from_numpy(values) for split, values in logits.items()}
        value = score(experiment, tensors["val"], "val")
        if best is None or value > best[0]:
            best = (value, tensors, strength)
    return best


def score(experiment, logits, split):
    return classification_metrics(logits, experiment.data.labels(split), "multilabel", 0.3)["f1_weighted"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("results/ssl_nas_posters_sklearn.jsonl"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        for share in SHARES:
            have = {(row["seed"], row["labelled_share"]) for row in read_rows(arguments.out)}
            if (seed, share) in have:
                continue
            base = ["experiment=ssl_nas_mmimdb", "scale=cpu", f"seed={seed}", f"labelled_share={share}"]
            experiment = open_experiment(compose([*base, *arguments.overrides]))
            rows = experiment.data.labelled_rows
            fitted = {name: logits_of(experiment, names, rows) for name, names in FEATURES.items()}
            fitted["both concatenated"] = logits_of(experiment, FEATURES["image"] + FEATURES["text"], rows)
            prior = experiment.prior()
            fused = {
                split: late_fusion(
                    [fitted[name][1][split].clamp(-20, 20) for name in FEATURES], prior, "multilabel"
                )
                for split in ("val", "test")
            }
            results = {name: (tensors, strength) for name, (_, tensors, strength) in fitted.items()}
            results["late fusion"] = (fused, None)
            for name, (tensors, strength) in results.items():
                row = {"model": name, "labelled_share": share, "seed": seed, "C": strength}
                row |= {
                    split: round(score(experiment, tensors[split], split), 6) for split in ("val", "test")
                }
                append(arguments.out, {**row, **row_environment(experiment)})
            print(
                f"seed {seed}, r = {share:g}: "
                + ", ".join(
                    f"{name} {score(experiment, tensors['test'], 'test'):.3f}"
                    for name, (tensors, _) in results.items()
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()

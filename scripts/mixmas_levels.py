"""Plain models on the very arrays and splits of `mixmas_study.py`: what its networks should reach.

    python scripts/mixmas_levels.py --physionet2012 <folder> --utd_mhad <folder> --avmnist <folder>

Logistic regression on each modality, coarsened as `COARSE` says, its regularisation chosen on val; the late
fusion that adds log-probabilities; and gradient boosting on PhysioNet 2012's statistics. One row of
`results/mixmas_levels.jsonl` for each; what is there is not computed again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from mixmas_study import OVERRIDES
from torch import Tensor

from mmnas_lab.experiment import Experiment
from mmnas_lab.objective.metrics import classification_metrics
from mmnas_lab.study import compose, open_experiment, row_environment, study_parser
from mmnas_lab.study_rows import append, read_rows

DATASETS = ("physionet2012", "utd_mhad", "avmnist")
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SPLITS = ("train", "val", "test")


def over_time(x: Tensor, steps: int) -> Tensor:
    """(B, T, ...) averaged to so many steps, flattened."""
    return F.adaptive_avg_pool1d(x.flatten(2).transpose(1, 2), steps).flatten(1)


def statistics(x: Tensor) -> Tensor:
    """Mean, standard deviation, smallest, largest and last of each variable of (B, T, C)."""
    return torch.cat([x.mean(1), x.std(1), x.amin(1), x.amax(1), x[:, -1]], 1)


COARSE = {
    "skeleton": ("16 times", lambda x: over_time(x, 16)),
    "inertial": ("32 times", lambda x: over_time(x, 32)),
    "depth": ("4 times of 15 x 20", lambda x: F.adaptive_avg_pool3d(x, (4, 15, 20)).flatten(1)),
    "series": ("statistics over the hours", statistics),
    "tabular": ("as they are", lambda x: x.flatten(1)),
    "image": ("as they are", lambda x: x.flatten(1)),
    "audio": ("28 x 28", lambda x: F.adaptive_avg_pool2d(x, (28, 28)).flatten(1)),
}


def logits_of(model: Any, x: np.ndarray, classes: int) -> Tensor:
    """Log-probabilities of all classes; those that the model has not seen have none to speak of."""
    logits = np.full((len(x), classes), -30.0, np.float32)
    logits[:, model.classes_] = np.log(model.predict_proba(x).clip(1e-13))
    return torch.from_numpy(logits)


def levels(experiment: Experiment, metric: str) -> list[dict[str, Any]]:
    """A row for each plain model of a dataset."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = experiment.data
    labels = {split: data.labels(split) for split in SPLITS}
    x: dict[str, dict[str, np.ndarray]] = {}
    for name in data.cache.infos:
        x[name] = {}
        for split in SPLITS:
            source = data.source(split, None, names=[name])
            array = source.clean(torch.arange(len(source))).views[0][name]
            x[name][split] = COARSE[name][1](array.float()).numpy()

    def scores(logits: dict[str, Tensor]) -> dict[str, float]:
        return {
            split: round(
                classification_metrics(logits[split], labels[split], data.dataset.task, 0.5)[metric], 5
            )
            for split in ("val", "test")
        }

    def predicted(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        model.fit(arrays["train"], labels["train"].numpy())
        return {s: logits_of(model, arrays[s], len(data.dataset.classes)) for s in ("val", "test")}

    rows, fused = [], {split: torch.zeros(()) for split in ("val", "test")}
    for name, arrays in x.items():
        found = []
        for strength in STRENGTHS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
            logits = predicted(model, arrays)
            found.append((scores(logits), strength, logits))
        best = max(found, key=lambda one: one[0]["val"])
        rows.append(
            {
                "inputs": f"{name}, {COARSE[name][0]}",
                "model": "logistic regression",
                "C": best[1],
                **best[0],
            }
        )
        fused = {split: fused[split] + best[2][split] for split in fused}
    rows.append({"inputs": "all", "model": "late fusion of logistic regressions", **scores(fused)})
    if "series" in x:
        every = {split: np.concatenate([arrays[split] for arrays in x.values()], 1) for split in SPLITS}
        logits = predicted(HistGradientBoostingClassifier(random_state=0), every)
        rows.append({"inputs": "all", "model": "gradient boosting", **scores(logits)})
    return rows


def main() -> None:
    arguments = study_parser(__doc__ or "", "results/mixmas_levels.jsonl", DATASETS).parse_args()
    for name in DATASETS:
        path = getattr(arguments, name)
        if path is None or any(row["dataset"] == name for row in read_rows(arguments.out)):
            continue
        settings = [
            f"experiment=mixmas_{name}",
            "scale=cpu",
            *OVERRIDES[name],
            f"dataset.path={path}",
            "seed=0",
        ]
        experiment = open_experiment(compose([*settings, *arguments.overrides]))
        metric = "auroc" if name == "physionet2012" else "accuracy"
        for row in levels(experiment, metric):
            whole = {"dataset": name, "metric": metric, **row, **row_environment(experiment)}
            append(arguments.out, whole)
            print({key: whole[key] for key in ("dataset", "inputs", "model", "val", "test")}, flush=True)


if __name__ == "__main__":
    main()

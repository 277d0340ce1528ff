"""Plain models on the features of `ssl_nas_kinds.py`: what a logistic regression makes of the same labels.

    python scripts/ssl_nas_kinds_levels.py --utd_mhad <folder> --avmnist <folder> --physionet2012 <folder>

For each row of `results/ssl_nas_kinds.jsonl`, one of `results/ssl_nas_kinds_sklearn.jsonl`: the metrics of a
logistic regression on the features that the found network reads, on all features of each modality, and on all
features of all modalities; what is there is not computed again. The regularisation is chosen on val by the
metric that selects the networks' checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from ssl_nas_kinds import COMMON, OVERRIDES, reported

from mmnas_lab.experiment import Experiment
from mmnas_lab.objective.metrics import classification_metrics
from mmnas_lab.study import compose, open_experiment, row_environment, study_parser
from mmnas_lab.study_rows import append, read_rows

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def fitted(experiment: Experiment, names: list[str], metric: str) -> dict[str, Any]:
    """Val and test metrics of the regularisation that is best on val."""
    from sklearn.linear_model import LogisticRegression

    data = experiment.data
    rows = data.labelled_rows

    def matrix(split: Any, rows: torch.Tensor | None = None) -> np.ndarray:
        source = data.source(split, rows, names=names)
        views = source.clean(torch.arange(len(source))).views[0]
        return torch.cat([views[name].flatten(1) for name in names], 1).numpy()

    x = {"train": matrix("train", rows), "val": matrix("val"), "test": matrix("test")}
    labels = data.labels("train")[rows].numpy()
    best: dict[str, Any] = {}
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000).fit(x["train"], labels)
        metrics = {}
        for split in ("val", "test"):
            # A class without a label has no chance; two classes have one score.
            logits = np.full((len(x[split]), len(data.dataset.classes)), -30.0, np.float32)
            logits[:, model.classes_] = model.predict_log_proba(x[split]).clip(-30)
            metrics[split] = classification_metrics(
                torch.from_numpy(logits), data.labels(split), data.dataset.task, 0.5
            )
        if not best or metrics["val"][metric] > best["val"][metric]:
            best = {"C": strength, **reported(metrics)}
    return best


def main() -> None:
    parser = study_parser(__doc__ or "", "results/ssl_nas_kinds_sklearn.jsonl", OVERRIDES)
    parser.add_argument("--rows", type=Path, default=Path("results/ssl_nas_kinds.jsonl"))
    arguments = parser.parse_args()
    for row in read_rows(arguments.rows):
        identity = {name: row[name] for name in ("dataset", "labelled_share", "seed")}
        path = getattr(arguments, row["dataset"])
        if path is None or any(identity.items() <= other.items() for other in read_rows(arguments.out)):
            continue
        settings = [
            f"experiment=ssl_nas_{row['dataset']}",
            *COMMON,
            *OVERRIDES[row["dataset"]],
            f"dataset.path={path}",
            f"seed={row['seed']}",
            f"labelled_share={row['labelled_share']}",
        ]
        experiment = open_experiment(compose([*settings, *arguments.overrides]))
        infos = experiment.data.cache.infos
        cells = row["genotypes"]["ssl_nas"]["cells"]
        read = {name for cell in cells for name in cell["inputs"]}
        modalities = list(dict.fromkeys(info.modality for info in infos.values()))
        sets = {
            "found": [name for name in infos if name in read],
            **{m: [name for name in infos if infos[name].modality == m] for m in modalities},
            "all": list(infos),
        }
        metric = str(row["selected_by"]).removeprefix("val_")
        models = {name: fitted(experiment, names, metric) for name, names in sets.items()}
        append(arguments.out, {**identity, "metric": metric, "models": models, **row_environment(experiment)})
        print(identity, {name: model["test"][metric] for name, model in models.items()}, flush=True)


if __name__ == "__main__":
    main()

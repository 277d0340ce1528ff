"""The stages of an experiment as plain calls, each skipped when its result is there.

    dataset -> backbone features -> search -> genotype -> pretrain -> train -> test -> record

Stages up to pretraining are given the dataset without its labels, unless the objective of the search needs
them. Baselines are the same `pretrain`, `train` and `test` of fixed networks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmnas_lab import distributed
from mmnas_lab.build import build, build_with_facts, near, target
from mmnas_lab.config import Config
from mmnas_lab.data import Data
from mmnas_lab.dataset.long_tail import LongTail
from mmnas_lab.dataset.split import halves
from mmnas_lab.fits import refuse_unfit
from mmnas_lab.loader import Batches, DrawMixed, FixedBatches, JoinedSource, Source, draw_clean, draw_pairs
from mmnas_lab.objective.base import Needs, Objective, Scored, Weighted, union
from mmnas_lab.objective.metrics import selection
from mmnas_lab.randomness import seed_of
from mmnas_lab.record import read_history, save_module, write_history
from mmnas_lab.stage import StageResult, digest, stage, write_json
from mmnas_lab.strategy.base import Problem
from mmnas_lab.testing import log_prior, predict, score
from mmnas_lab.training import Runtime, train
from mmnas_lab.types import InputError, InputInfos, OutputInfo, Split

log = logging.getLogger(__name__)

# Raised when a stage's result changes for the same settings.
VERSIONS = {"search": 3, "pretrain": 3, "train": 3, "test": 1}


@dataclass(frozen=True)
class Found:
    """One network's way through the stages: which architecture, and what came of it."""

    genotype: Any
    stages: dict[str, StageResult]
    metrics: dict[str, dict[str, Any]]


class Experiment:
    """One configuration on one seed.

    Args:
        config: checked settings.
        runtime: hardware and listeners.

    Raises:
        InputError: settings, data or encoders that cannot be used; nothing has been computed then.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.root = Path(config.output) / "stages"
        self.space: Any = build_with_facts(config.search_space, "search_space", {})
        self.strategy: Any = build(config.strategy, "strategy")
        self.numerics = {"devices": config.trainer.devices, "precision": config.trainer.precision}
        self._refuse_what_does_not_fit()
        self.data = Data(config, self.root, self.space.length, runtime, self.objective)
        self._refuse_unknown_baselines()
        self._refuse_unknown_metrics()
        self.results: dict[str, StageResult] = self.data.stages
        if self.needs_labels:
            self.data.labels("train")  # early, before anything is computed
        self._refuse_batches_larger_than_the_data()

    def _refuse_what_does_not_fit(self) -> None:
        refuse_unfit(self.strategy, self.config.objective, self.space)
        if self.config.pretrain.epochs and self.objective_needs(self.config.pretrain.objective).labels:
            raise InputError("pretrain.objective must be label-free, nt_xent for instance")
        if self.config.search.regularisers and not self.strategy.regularised:
            raise InputError(
                f"search.regularisers penalise mixing weights, and strategy={self.strategy.name} has none; "
                "choose strategy=bilevel, or leave them out"
            )

    def _refuse_unknown_baselines(self) -> None:
        own = {"fusion": ["two_stream"], "mixers": ["m2_mixer"]}.get(self.space.name, [])
        known = [*self.data.dataset.modalities, *own, "late_fusion", "random_genotype"]
        for name in self.config.baselines if "test" in self.config.stages else ():
            if name not in known:
                raise InputError(f"baselines={name}: no such option; {near(name, known)}")

    def _refuse_unknown_metrics(self) -> None:
        """A metric to select by that the data has not; better said now than after the features."""
        dataset, config = self.data.dataset, self.config

        def check(node: Mapping[str, Any], path: str) -> None:
            if "select" in node:
                selection(node["select"], dataset.task, len(dataset.classes), f"{path}.select")
            for name, within in node.items():
                if isinstance(within, Mapping) and "_target_" in within:
                    check(within, f"{path}.{name}")

        # A search's objective follows that of `train` unless it is told otherwise, so that comes first.
        if "train" in config.stages:
            check(config.train.objective, "train.objective")
        if "search" in config.stages and self.strategy.needs_data:
            check(config.objective, "objective")

    def _refuse_batches_larger_than_the_data(self) -> None:
        """Contrastive stages need whole batches; better said now than after the features."""
        config = self.config
        rows = {split: len(self.data.dataset.ids(split)) for split in ("train", "val")}
        searched = "search" in config.stages and self.strategy.needs_data
        smallest = {"search": min(rows.values()), "pretrain": min(rows.values())}
        if config.search.on == "train":
            smallest["search"] = rows["train"] // 2
        for name, settings, objective, wanted in (
            ("search", config.search, config.objective, searched),
            ("pretrain", config.pretrain, config.pretrain.objective, config.pretrain.epochs > 0),
        ):
            contrastive = self.objective_needs(objective).views == 2
            if wanted and contrastive and settings.batch_size > smallest[name]:
                raise InputError(
                    f"{name}.batch_size={settings.batch_size} is larger than the {smallest[name]} samples "
                    f"that a contrastive stage has ({rows['train']} in train, {rows['val']} in val); set it "
                    f"to {smallest[name]} or less, or use more data"
                )

    @property
    def needs_labels(self) -> bool:
        """Whether a stage of this run reads labels."""
        supervised_search = self.strategy.needs_data and self.objective_needs(self.config.objective).labels
        return bool({"train", "test"} & set(self.config.stages)) or supervised_search

    # Stages.

    def problem(self) -> Problem:
        """What the search strategy is given; reads the features, and the labels if the objective does."""
        config, settings = self.config, self.config.search
        needs, infos = self.objective_needs(config.objective), self.data.cache.infos
        weights, architecture = self._search_sources(needs)
        return Problem(
            self.space,
            infos,
            lambda info: self.objective(config.objective, info, infos),
            needs,
            weights,
            architecture,
            draw_pairs if needs.views == 2 else DrawMixed(settings.view_probability),
            settings,
            config.seed,
            self.runtime,
            self.regularisers(),
            self.root.parent,
            self.data.stages["features"].key + self._label_key(needs),
            config.objective,
            lambda names: self._search_sources(needs, names),
        )

    def search(self) -> StageResult:
        """The genotype, by the strategy; `genotype.json`, `margins.json` and the trace lie in its folder."""
        config, settings = self.config, self.config.search
        needs = self.objective_needs(config.objective)
        strategy_settings = getattr(self.strategy, "settings", lambda: config.strategy)()
        read: dict[str, Any] = {"space": config.search_space, "strategy": strategy_settings}
        inputs = {"features": digest({k: [*v.shape, v.modality] for k, v in self.data.cache.infos.items()})}
        if self.strategy.needs_data:
            read |= {"search": settings.model_dump(), "objective": config.objective, "seed": config.seed}
            read |= self.numerics
            inputs = {"features": self.data.stages["features"].key}
            if needs.labels:
                read["labelled_share"] = config.labelled_share
                inputs["labels"] = self.data.dataset.label_fingerprint()

        def compute(folder: Path) -> None:
            found = self.strategy.search(self.problem(), folder)
            if distributed.rank() == 0:
                write_json(folder / "genotype.json", found.genotype.to_json())
                write_json(folder / "margins.json", found.margins)
                write_json(folder / "selection.json", found.selection)
                write_json(folder / "trace.json", found.trace)
                write_history(folder, found.history)
                if found.snapshots:
                    save_file(found.snapshots, folder / "snapshots.safetensors")

        slug = f"{config.dataset['_target_'].rsplit('.', 1)[-1]}_{self.strategy.name}_{config.seed}"
        result = stage(self.root, "search", slug, VERSIONS["search"], read, inputs, compute)
        self._replay("search", result)
        self.results["search"] = result
        return result

    def genotype(self) -> Any:
        """The genotype that the search found."""
        return self.space.parse(
            json.loads((self.search().folder / "genotype.json").read_text()), self.data.cache.infos
        )

    def pretrain(self, genotype: Any, name: str) -> StageResult | None:
        """Label-free pretraining of a network; None where `pretrain.epochs` is 0."""
        config, settings = self.config, self.config.pretrain
        draw = draw_pairs if self.objective_needs(settings.objective).views == 2 else draw_clean
        if settings.epochs == 0:
            return None

        def compute(folder: Path) -> None:
            scored, address = self._network(genotype, settings.dropout, settings.objective, "pretrain")
            names = self._feature_names(genotype)
            train_source = self.data.source("train", names=names, settings=settings)
            val_source = self.data.source("val", names=names, settings=settings)
            trained = train(
                scored.network,
                scored.objective,
                Batches(train_source, draw, settings.batch_size, (*address, "batches"), whole=True),
                FixedBatches(val_source, draw, settings.batch_size, (*address, "val"), whole=True),
                settings,
                label=f"pretrain.{name}",
                address=address,
                runtime=self.runtime,
                evaluations=settings.evaluations,
                save_point=folder / "pretrain.ckpt",
            )
            if distributed.rank() == 0:
                save_module(folder / "network.safetensors", trained.scored.network)
                write_json(folder / "selection.json", trained.selection)
                write_history(folder, trained.history)

        read = {
            "space": config.search_space,
            "genotype": genotype.to_json(),
            "pretrain": settings.model_dump(),
            "seed": config.seed,
            **self.numerics,
        }
        inputs = {"features": self.data.stages["features"].key}
        result = stage(
            self.root, "pretrain", f"{name}_{config.seed}", VERSIONS["pretrain"], read, inputs, compute
        )
        self._replay(f"pretrain.{name}", result)
        return result

    def train(self, genotype: Any, name: str, pretrained: StageResult | None) -> StageResult:
        """The classifier on the labelled share, from pretrained or fresh weights."""
        config, settings = self.config, self.config.train

        def compute(folder: Path) -> None:
            scored, address = self._network(genotype, settings.dropout, settings.objective, "train")
            if pretrained is not None:
                scored.network.load_state_dict(load_file(pretrained.folder / "network.safetensors"))
            names = self._feature_names(genotype)
            source: Source = self.data.source("train", self.data.labelled_rows, True, names, settings)
            held: Split | None = "val"
            if settings.on == "train_val":
                source, held = (
                    JoinedSource(source, self.data.source("val", None, True, names, settings)),
                    None,
                )
            if config.test.select == "best_test":
                held = "test"
            batches = Batches(
                source,
                DrawMixed(settings.view_probability),
                settings.batch_size,
                (*address, "batches"),
                whole=False,
            )
            evaluation = None
            if held is not None:
                held_source = self.data.source(held, None, True, names)
                evaluation = FixedBatches(held_source, draw_clean, 1024, (*address, "val"), whole=False)
            trained = train(
                scored.network,
                scored.objective,
                batches,
                evaluation,
                settings,
                label=f"train.{name}",
                address=address,
                runtime=self.runtime,
                num_epochs=max(settings.epochs, -(-settings.min_steps // len(batches))),
                evaluations=settings.evaluations,
                save_point=folder / "train.ckpt",
            )
            if distributed.rank() == 0:
                save_module(folder / "network.safetensors", trained.scored, self._statistics(names))
                write_json(folder / "selection.json", trained.selection)
                write_history(folder, trained.history)

        read = {
            "space": config.search_space,
            "genotype": genotype.to_json(),
            "train": settings.model_dump(),
            "select": config.test.select,
            "labelled_share": config.labelled_share,
            "seed": config.seed,
            **self.numerics,
        }
        inputs = {
            "features": self.data.stages["features"].key,
            "labels": self.data.dataset.label_fingerprint(),
            "pretrain": pretrained.key if pretrained else "from scratch",
        }
        result = stage(self.root, "train", f"{name}_{config.seed}", VERSIONS["train"], read, inputs, compute)
        self._replay(f"train.{name}", result)
        return result

    def test(self, genotype: Any, name: str, trained: StageResult) -> StageResult:
        """Metrics and logits of a trained classifier on val and test."""
        config = self.config
        objective_settings = config.train.objective

        def compute(folder: Path) -> None:
            scored, _ = self._network(genotype, config.train.dropout, objective_settings, "train")
            state = load_file(trained.folder / "network.safetensors")
            scored.load_state_dict({k: v for k, v in state.items() if not k.startswith("standardisation.")})
            scored.to(self.runtime.device)
            names = self._feature_names(genotype)
            logits = {
                f"{split}.logits": predict(scored, self.data.source(split, None, True, names), 1024)
                for split in ("val", "test")
            }
            if distributed.rank() == 0:
                metrics = {split: self.scores(logits[f"{split}.logits"], split) for split in ("val", "test")}
                save_file(logits, folder / "predictions.safetensors")
                write_json(folder / "metrics.json", metrics)

        inputs = {"train": trained.key, "labels": self.data.dataset.label_fingerprint()}
        return stage(self.root, "test", f"{name}_{config.seed}", VERSIONS["test"], {}, inputs, compute)

    # Networks through the stages.

    def evaluate(self, genotype: Any, name: str) -> Found:
        """Pretrain, train and test one architecture, as far as `stages` goes."""
        stages: dict[str, StageResult] = {}
        wanted = self.config.stages
        pretrained = self.pretrain(genotype, name) if "pretrain" in wanted else None
        if pretrained is not None:
            stages["pretrain"] = pretrained
        metrics: dict[str, dict[str, Any]] = {}
        if "train" in wanted:
            stages["train"] = self.train(genotype, name, pretrained)
        if "test" in wanted:
            stages["test"] = self.test(genotype, name, stages["train"])
            metrics = json.loads((stages["test"].folder / "metrics.json").read_text())
            selected = json.loads((stages["train"].folder / "selection.json").read_text())["name"]
            shown = (selected or "").removeprefix("val_")
            shown = shown if shown in metrics["test"] else "f1_weighted"
            log.info("%s: test %s %.4f", name, shown, metrics["test"][shown])
        return Found(genotype, stages, metrics)

    # Small things that several stages need.

    def _search_sources(self, needs: Needs, names: tuple[str, ...] | None = None) -> tuple[Source, Source]:
        """What a search trains weights on, and what it moves or compares architectures on."""
        settings = self.config.search
        parts: tuple[Tensor | None, Tensor | None]
        labelled = needs.labels and self.strategy.needs_data
        split: Split = "train"
        if labelled and not self.strategy.splits_train:
            split, parts = "val", (self.data.labelled_rows, None)
        elif labelled:
            first, second = halves(self.data.labels("train"), self.data.labelled_rows, self.config.seed)
            parts = first.sort().values, second.sort().values
        else:
            split, parts = self._unlabelled_halves()
        weights = self.data.source("train", parts[0], labelled, names, settings)
        return weights, self.data.source(split, parts[1], labelled, names, settings)

    def _label_key(self, needs: Needs) -> str:
        """What the rows of a search depend on besides the inputs' key; empty where it is nothing."""
        if not needs.labels:
            on = self.config.search.on
            return f":{on}:{self.config.seed}" if on == "train" else ""
        return f":{self.data.dataset.label_fingerprint()}:{self.config.labelled_share}:{self.config.seed}"

    def _unlabelled_halves(self) -> tuple[Split, tuple[Tensor | None, Tensor | None]]:
        """The split that moves the architecture of a label-free search; rows of train, and of that split."""
        if self.config.search.on == "train_val":
            return "val", (None, None)
        rows = torch.arange(len(self.data.dataset.ids("train")))
        return "train", halves(None, rows, self.config.seed)

    @staticmethod
    def objective_needs(node: Mapping[str, Any]) -> Needs:
        """What an objective reads: from its class, or from those of the objectives within it."""

        def of(node: Mapping[str, Any]) -> list[Needs]:
            own = getattr(target(dict(node), "objective"), "needs", None)
            within = [value for value in node.values() if isinstance(value, Mapping) and "_target_" in value]
            return [own] if isinstance(own, Needs) else [needs for value in within for needs in of(value)]

        if not (each := of(node)):
            raise InputError("objective: the mix has no terms; add one, as conf/objective/mix_*.yaml do")
        return union(each)

    def objective(
        self, node: Mapping[str, Any], info: OutputInfo, inputs: InputInfos | None = None
    ) -> Objective:
        """An objective with its head, or decoder, for a network's output and inputs."""
        facts: dict[str, Any] = {"embedding": info.embedding, "output": info, "inputs": inputs or {}}
        if self.objective_needs(node).labels:
            facts |= {
                "task": self.data.dataset.task,
                "classes": self.data.dataset.classes,
                "prior": self.prior(),
            }
        return build_with_facts(dict(node), "objective", facts)

    def regularisers(self) -> dict[str, Weighted]:
        """Penalties of the mixing weights by name."""
        return {
            name: Weighted(node.weight, build(dict(node.function), f"search.regularisers.{name}.function"))
            for name, node in self.config.search.regularisers.items()
        }

    def _network(
        self, genotype: Any, dropout: float | None, objective: Mapping[str, Any], stage_name: str
    ) -> tuple[Scored, tuple[int | str, ...]]:
        """A found network with a head, freshly initialised by address (equal for equal shapes)."""
        address = (self.config.seed, stage_name)
        torch.manual_seed(seed_of(*address, "init"))
        network = self.space.build(genotype, self.data.cache.infos, dropout)
        inputs = {name: self.data.cache.infos[name] for name in self._feature_names(genotype)}
        return Scored(network, self.objective(objective, network.info, inputs)), address

    def prior(self) -> Tensor:
        """Log-odds (or log-probabilities) of the classes in the labelled share."""
        labels = self.data.labels("train")[self.data.labelled_rows]
        return log_prior(labels, self.data.dataset.task, len(self.data.dataset.classes))

    def scores(self, logits: Tensor, split: Split) -> dict[str, Any]:
        """All metrics of a split's logits."""
        threshold = self.config.train.objective.get("threshold", 0.3)
        dataset = self.data.dataset
        subsets = dataset.subsets(split) if isinstance(dataset, LongTail) else {}
        return score(logits, self.data.labels(split), dataset.task, threshold, dataset.classes, subsets)

    def _feature_names(self, genotype: Any) -> tuple[str, ...]:
        """Inputs that a genotype's network reads; one that names none reads them all."""
        features = getattr(genotype, "features", tuple(self.data.cache.infos))
        return tuple(features() if callable(features) else features)

    def _statistics(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        statistics = self.data.cache.statistics
        return {
            f"standardisation.{name}.{kind}": value
            for name in names
            for kind, value in zip(("mean", "std"), statistics[name], strict=True)
        }

    def _replay(self, label: str, result: StageResult) -> None:
        """Hand a reused stage's metrics to the loggers, which have not seen them."""
        if result.reused:
            self.runtime.report(label, read_history(result.folder))

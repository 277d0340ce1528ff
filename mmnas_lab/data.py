"""The data of a run: a dataset, its features by frozen encoders, and sources that training reads."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mmnas_lab import distributed
from mmnas_lab.backbone.base import ArrayBackbone, ArrayCache, LiveViews
from mmnas_lab.backbone.feature_cache import FeatureCache, compute_features
from mmnas_lab.backbone.feature_source import FeatureSource
from mmnas_lab.backbone.frozen import Backbone
from mmnas_lab.build import build, build_with_facts
from mmnas_lab.config import Config, Pretrain, Search, Train
from mmnas_lab.dataset.base import SPLITS, Dataset, LabelFree
from mmnas_lab.dataset.families import SIGNALS, view_families
from mmnas_lab.dataset.pixel_views import PixelViews
from mmnas_lab.dataset.split import labelled_share
from mmnas_lab.dataset.views import FeatureViews, ViewFamily
from mmnas_lab.encoder_training import prepare_encoders
from mmnas_lab.loader import Source
from mmnas_lab.objective.base import Objective
from mmnas_lab.stage import StageResult, digest, stage, write_json
from mmnas_lab.training import Runtime
from mmnas_lab.types import InputError, OutputInfo, Split

log = logging.getLogger(__name__)

# Raised when a stage's result changes for the same settings.
VERSIONS = {"data": 1, "features": 1}


class Data:
    """A dataset with its features.

    Args:
        config: checked settings.
        root: folder of all stages.
        length: positions to which backbone maps are pooled; None for a space that reads samples.
        runtime: hardware and listeners.
        objective: makes an objective for a network's output; encoders without weights need one.

    Raises:
        InputError: data or encoders that cannot be used; nothing has been computed then.
    """

    def __init__(
        self,
        config: Config,
        root: Path,
        length: int | None,
        runtime: Runtime,
        objective: Callable[[Mapping[str, Any], OutputInfo], Objective],
    ) -> None:
        self.config, self.root, self.length, self.runtime = config, root, length, runtime
        self.objective = objective
        self.stages: dict[str, StageResult] = {}
        self._labels: dict[Split, Tensor] = {}
        self.dataset: Dataset = build(config.dataset, "dataset")
        self.backbone: Backbone | ArrayBackbone = build_with_facts(
            config.backbone, "backbone", {"modalities": self.dataset.modalities}
        )
        self.backbone.check(self.dataset.modalities)
        self._refuse_what_does_not_fit()
        self.dataset.open()
        self._leave_out_unreadable()

    def _refuse_what_does_not_fit(self) -> None:
        encoded = isinstance(self.backbone, Backbone)
        name = self.config.search_space["_target_"].rsplit(".", 1)[-1]
        if not encoded and self.length is not None:
            raise InputError(f"search space {name} fuses features; choose backbone=offline, or cnn_cells")
        if encoded and self.length is None:
            raise InputError(
                f"search space {name} reads the samples themselves; choose backbone=pixels for pictures "
                "alone, or backbone=raw"
            )

    def _leave_out_unreadable(self) -> None:
        """Find samples that cannot be used, once for this data; stop with all of them, or leave them out."""
        dataset = self.dataset
        if not hasattr(dataset, "on_bad_sample"):
            return

        def compute(folder: Path) -> None:
            if distributed.rank() == 0:
                bad = {
                    split: {str(k): why for k, why in dataset.unreadable(split).items()} for split in SPLITS
                }
                write_json(folder / "unreadable.json", bad)

        result = stage(
            self.root, "data", dataset.name, VERSIONS["data"], {}, {"data": dataset.fingerprint()}, compute
        )
        bad = json.loads((result.folder / "unreadable.json").read_text())
        lines = [
            f"  {split} {dataset.ids(split)[int(k)]}: {why}"
            for split in SPLITS
            for k, why in bad[split].items()
        ]
        if lines and dataset.on_bad_sample == "stop":
            raise InputError(
                f"{len(lines)} samples of dataset '{dataset.name}' cannot be read:\n"
                + "\n".join(lines)
                + "\n"
                "repair or remove them, or leave them out with dataset.on_bad_sample=skip"
            )
        if lines:
            log.warning("left out %d unreadable samples:\n%s", len(lines), "\n".join(lines))
            dataset.drop({split: [int(k) for k in bad[split]] for split in SPLITS})

    def labels(self, split: Split) -> Tensor:
        """All labels of a split, read once."""
        if split not in self._labels:
            self._labels[split] = self.dataset.labels(split)
        return self._labels[split]

    @cached_property
    def labelled_rows(self) -> Tensor:
        """The labelled share of the training rows."""
        return labelled_share(self.labels("train"), self.config.labelled_share, self.config.seed)

    @cached_property
    def families(self) -> dict[str, ViewFamily]:
        """Views of raw samples by modality."""
        settings = self.config.features
        strengths = settings.image_strength, settings.text_strength, settings.signal_strength
        return view_families(LabelFree(self.dataset), *strengths)

    def arrays(self, backbone: ArrayBackbone) -> ArrayCache:
        """All samples as arrays."""

        def compute(folder: Path) -> None:
            if distributed.rank() == 0:
                backbone.write(LabelFree(self.dataset), folder, self._counted)

        inputs = {"data": self.dataset.fingerprint()}
        settings = backbone.settings()
        result = stage(
            self.root, "features", self.dataset.name, VERSIONS["features"], settings, inputs, compute
        )
        # Views drawn live change what later stages learn, not the arrays.
        if live := backbone.views(self.families, self.dataset.modalities):
            read = {name: family.settings() for name, family in live.items()}
            result = replace(result, key=digest([result.key, read]))
        self.stages["features"] = result
        return backbone.open(result.folder)

    def features(self, backbone: Backbone, length: int) -> FeatureCache:
        """Pooled features of all splits by frozen encoders, with cached views of train and val."""
        settings = self.config.features
        kinds = self.dataset.modalities
        signals = {name: f.settings() for name, f in self.families.items() if kinds[name] in SIGNALS}
        read = settings.model_dump(exclude={"signal_strength"}) | ({"signals": signals} if signals else {})
        unlabelled = LabelFree(self.dataset)
        encoder_settings = self.config.encoder_pretrain
        prepared = prepare_encoders(
            backbone,
            unlabelled,
            self.families,
            encoder_settings,
            lambda info: self.objective(encoder_settings.objective, info),
            settings.view_seed,
            self.root,
            self.runtime,
        )
        result = stage(
            self.root,
            "features",
            self.dataset.name,
            VERSIONS["features"],
            {**read, "length": length},
            {"data": self.dataset.fingerprint(), "backbone": backbone.fingerprint(), **prepared},
            lambda folder: compute_features(
                unlabelled,
                backbone,
                self.families,
                settings.num_views,
                settings.view_seed,
                length,
                folder,
                progress=self._counted,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                barrier=distributed.barrier,
                workers=max(1, (os.cpu_count() or 1) // distributed.world_size()),
            ),
        )
        self.stages["features"] = result
        return FeatureCache(result.folder)

    @cached_property
    def cache(self) -> FeatureCache | ArrayCache:
        """The features, or the samples themselves; computed at first use."""
        if isinstance(self.backbone, Backbone):
            assert self.length is not None
            return self.features(self.backbone, self.length)
        return self.arrays(self.backbone)

    def source(
        self,
        split: Split,
        rows: Tensor | None = None,
        labelled: bool = False,
        names: tuple[str, ...] | None = None,
        settings: Search | Pretrain | Train | None = None,
    ) -> Source:
        """Samples of a split, with or without labels, in the views of a stage.

        Args:
            split: of the samples.
            rows: of the split; None: all.
            labelled: whether labels are given.
            names: of the features that are read; None: all.
            settings: of the stage; None: views change nothing.
        """
        labels, device = self.labels(split) if labelled else None, self.runtime.device
        features = FeatureViews(**settings.views.model_dump()) if settings else None
        if isinstance(self.cache, FeatureCache):
            return FeatureSource(self.cache, split, rows, labels, names, features, device=device)
        live = None
        if settings and features and not isinstance(self.backbone, Backbone):
            pixels = PixelViews(**settings.pixel_views.model_dump())
            families = self.backbone.views(self.families, self.dataset.modalities)
            live = LiveViews(pixels, families, features)
        return self.cache.source(split, rows, labels, names, live, device)

    def _counted(self, items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        """Pass items on, and say how many have been taken."""
        for done, item in enumerate(items, 1):
            yield item
            self.runtime.progress(label, done, total)

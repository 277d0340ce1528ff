"""Encoders without weights: pretrained without labels, by the contrast of two views (SimCLR)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmnas_lab import distributed
from mmnas_lab.backbone.frozen import Backbone
from mmnas_lab.config import Pretrain
from mmnas_lab.dataset.base import LabelFree, training_samples
from mmnas_lab.dataset.views import ViewFamily
from mmnas_lab.loader import Batches, FixedBatches, draw_pairs
from mmnas_lab.objective.base import Objective
from mmnas_lab.randomness import seed_of
from mmnas_lab.stage import stage
from mmnas_lab.training import Runtime, train
from mmnas_lab.types import Batch, InputInfos, Inputs, OutputInfo, Split

log = logging.getLogger(__name__)

VERSION = 1


class SampleSource:
    """Raw samples of one modality as an encoder's input tensors; views are drawn live, sample by sample."""

    labels: Tensor | None = None

    def __init__(
        self,
        dataset: LabelFree,
        split: Split,
        modality: str,
        view: ViewFamily,
        tensors: Callable[[list[Any]], Inputs],
    ) -> None:
        self.dataset, self.split, self.modality = dataset, split, modality
        self.view, self.tensors = view, tensors
        self.infos: InputInfos = {}
        self.size = len(dataset.ids(split))

    def __len__(self) -> int:
        return self.size

    def clean(self, index: Tensor) -> Batch:
        """The samples as they are."""
        return Batch((self.tensors(self._read(index)),))

    def views(self, index: Tensor, generator: torch.Generator, count: int) -> Batch:
        """`count` views of each sample, each with draws of its own."""
        samples = self._read(index)
        return Batch(
            tuple(self.tensors([self.view(sample, generator) for sample in samples]) for _ in range(count))
        )

    def mixed(self, index: Tensor, generator: torch.Generator, clean_probability: float) -> Batch:
        """Clean samples and views of samples."""
        clean = torch.rand(len(index), generator=generator) < clean_probability
        samples = [
            sample if keep else self.view(sample, generator)
            for sample, keep in zip(self._read(index), clean.tolist(), strict=True)
        ]
        return Batch((self.tensors(samples),))

    def _read(self, index: Tensor) -> list[Any]:
        return self.dataset.read(self.split, self.modality, index.tolist())


def prepare_encoders(
    backbone: Backbone,
    dataset: LabelFree,
    views: Mapping[str, ViewFamily],
    settings: Pretrain,
    objective: Callable[[OutputInfo], Objective],
    seed: int,
    root: Path,
    runtime: Runtime,
) -> dict[str, str]:
    """Pretrain every encoder that has no weights, or read what an earlier run learned.

    Args:
        backbone: the encoders.
        dataset: without its labels.
        views: a view family for each modality.
        settings: of the pretraining.
        objective: makes the contrastive objective for an encoder's output.
        seed: of the pretraining; not the run's, so that all seeds share their features.
        root: folder of all stages.
        runtime: hardware and listeners.

    Returns:
        Keys of the stages that ran or were reused, for the features' key.
    """
    keys: dict[str, str] = {}
    for modality, encoder in backbone.encoders.items():
        if not encoder.untrained:
            continue
        view = views[modality]

        def compute(folder: Path, modality: str = modality, encoder: Any = encoder, view: Any = view) -> None:
            log.info("the %s encoder has no weights: pretraining it without labels", modality)
            _pretrain(encoder, dataset, modality, view, settings, objective, seed, folder, runtime)
            if distributed.rank() == 0:
                encoder.save(folder / "encoder.safetensors")

        read: dict[str, Any] = {
            "modality": modality,
            "pretrain": settings.model_dump(),
            "view": view.settings(),
            "seed": seed,
            "devices": runtime.devices,
            "precision": runtime.precision,
        }
        inputs = {"data": dataset.fingerprint(), "encoder": encoder.fingerprint()}
        result = stage(root, "backbone", f"{dataset.name}_{modality}", VERSION, read, inputs, compute)
        encoder.restore(result.folder / "encoder.safetensors")
        keys[f"backbone.{modality}"] = result.key
    return keys


def _pretrain(
    encoder: Any,
    dataset: LabelFree,
    modality: str,
    view: ViewFamily,
    settings: Pretrain,
    objective: Callable[[OutputInfo], Objective],
    seed: int,
    folder: Path,
    runtime: Runtime,
) -> None:
    address = (seed, f"backbone.{modality}")
    torch.manual_seed(seed_of(*address, "init"))
    encoder.load()
    if encoder.fitted:
        encoder.fit(training_samples(dataset, modality))
    network = encoder.network()
    sources = {
        split: SampleSource(dataset, split, modality, view, encoder.tensors) for split in ("train", "val")
    }
    trained = train(
        network,
        objective(network.info),
        Batches(sources["train"], draw_pairs, settings.batch_size, address, whole=True),
        FixedBatches(sources["val"], draw_pairs, settings.batch_size, (*address, "val"), whole=True),
        settings,
        label=f"backbone.{modality}",
        address=address,
        runtime=runtime,
        evaluations=settings.evaluations,
        save_point=folder / "encoder.ckpt",
        unused_parameters=True,  # an image model's own classifier
    )
    trained.scored.network.cpu()

"""Features of a frozen backbone, computed once and read memory-mapped."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmnas_lab.backbone.base import Progress
from mmnas_lab.backbone.feature_writer import (
    FEATURES_FILE,
    STATISTICS_FILE,
    FeatureWriter,
    array_path,
    read_json,
)
from mmnas_lab.dataset.base import LabelFree
from mmnas_lab.native import library, pointer, threads_for
from mmnas_lab.types import InputError, InputInfo, InputInfos, Split

if TYPE_CHECKING:
    from mmnas_lab.backbone.frozen import Backbone
    from mmnas_lab.dataset.views import ViewFamily


def compute_features(
    dataset: LabelFree,
    backbone: Backbone,
    views: dict[str, ViewFamily],
    num_views: int,
    view_seed: int,
    length: int,
    folder: Path,
    progress: Progress | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
    workers: int | None = None,
) -> None:
    """Write the features of all splits into a folder that `FeatureCache` opens.

    `<split>.<feature>.npy` is (V + 1, n, C_i, L_i) float16: the clean samples, then V views of train and val;
    test has the clean samples only. A feature with values beyond float16 is kept in float32. What is written
    does not depend on the number of ranks or workers, nor on interruptions: chunks have fixed rows, a view's
    randomness comes from (seed, modality, sample id, view), and a call on an unfinished folder goes on.

    Encoders that need fitting are fitted on the clean training samples; rank 0 saves them as
    `encoder.<modality>`.

    Args:
        dataset: an opened dataset without its labels.
        backbone: encoders of exactly the dataset's modalities.
        views: label-free views by modality; needed where `num_views` > 0.
        num_views: V, views cached of each train and val sample.
        view_seed: of the views.
        length: positions to which maps are pooled.
        folder: where to write; made if it is not there.
        progress: wraps the chunks as they are done.
        rank: this process; ranks share the chunks.
        world_size: W, number of processes.
        barrier: waits for all ranks; needed where W > 1.
        workers: threads that encode, one core each; None: as many as torch may use.

    Raises:
        InputError: modalities that do not match, or a modality without views.
    """
    backbone.check(dataset.modalities)
    if num_views < 0:
        raise InputError(f"features need num_views >= 0, got {num_views}")
    if num_views and (lacking := sorted(set(dataset.modalities) - set(views))):
        raise InputError(f"no family of views for modality '{lacking[0]}'; give one, or cache no views")
    FeatureWriter(
        dataset=dataset,
        backbone=backbone,
        views=views,
        num_views=num_views,
        view_seed=view_seed,
        length=length,
        folder=folder,
        progress=progress,
        rank=rank,
        world_size=world_size,
        barrier=barrier or (lambda: None),
        workers=workers or torch.get_num_threads(),
    ).run()


class FeatureCache:
    """What `compute_features` wrote.

    Attributes:
        infos: names, shapes and modalities of the features.
        num_views: V, views of each train and val sample.
        statistics: per feature the mean and standard deviation (C_i,) of each channel over the clean
            training samples; a constant channel has a deviation of 1.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises:
            InputError: it holds no complete features.
        """
        if not (folder / STATISTICS_FILE).exists():
            raise InputError(f"'{folder}' holds no complete features; run the features stage again")
        from safetensors.torch import load_file

        layout = read_json(folder / FEATURES_FILE)
        self.folder = folder
        self.num_views: int = layout["num_views"]
        self.infos: InputInfos = {
            name: InputInfo(tuple(feature["shape"]), feature["modality"])
            for name, feature in layout["features"].items()
        }
        tensors = load_file(folder / STATISTICS_FILE)
        self.statistics = {name: (tensors[f"{name}.mean"], tensors[f"{name}.std"]) for name in self.infos}
        self._rows: dict[Split, int] = layout["rows"]
        self._arrays: dict[tuple[Split, str], np.ndarray[Any, Any]] = {}

    def rows(self, split: Split) -> int:
        """Number of samples in a split."""
        return self._rows[split]

    def views_of(self, split: Split) -> int:
        """Number of views cached of each sample of a split."""
        return 0 if split == "test" else self.num_views

    def array(self, split: Split, name: str) -> np.ndarray[Any, Any]:
        """A feature of a split, (V + 1, n, C_i, L_i), memory-mapped; 0 are the clean samples."""
        key = (split, name)
        if key not in self._arrays:
            path = array_path(self.folder, split, name)
            self._arrays[key] = np.load(path, mmap_mode="r" if self.rows(split) else None)
        return self._arrays[key]

    def gather(self, split: Split, name: str, views: Tensor, rows: Tensor) -> Tensor:
        """One cached view of each of B samples.

        Args:
            split: of the samples.
            name: of the feature.
            views: (B,) int, 0 for the clean sample.
            rows: (B,) int, rows of the split.

        Returns:
            (B, C_i, L_i) in the precision in which it is kept.
        """
        flat, index = self._located(split, name, views, rows)
        # `clip` spares numpy a buffered second copy; the bounds are checked.
        return torch.from_numpy(np.take(flat, index.numpy(), 0, mode="clip"))

    def standardised(self, split: Split, name: str, views: Tensor, rows: Tensor) -> Tensor:
        """As `gather`, in float32 with each channel standardised."""
        flat, index = self._located(split, name, views, rows)
        mean, std = self.statistics[name]
        half = flat.dtype == np.float16 and flat.flags.c_contiguous
        compiled = library(Path(__file__).with_name("gather.c")) if half else None
        if compiled is None:
            return self.gather(split, name, views, rows).float().sub_(mean[:, None]).div_(std[:, None])
        out = torch.empty(len(index), *flat.shape[1:])
        compiled.gather(
            *(c_int64(size) for size in out.shape),
            *(c_void_p(flat.ctypes.data), pointer(index), pointer(mean), pointer(std), pointer(out)),
            threads_for(out),
        )
        return out

    def _located(
        self, split: Split, name: str, views: Tensor, rows: Tensor
    ) -> tuple[np.ndarray[Any, Any], Tensor]:
        """All views of all samples in one dimension, and where the chosen ones are in it."""
        array = self.array(split, name)
        copies, count = array.shape[:2]
        for numbers, stop in ((rows, count), (views, copies)):
            if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < stop:
                raise IndexError(f"rows and views must lie within ({count}, {copies}) of '{split}'")
        return array.reshape(copies * count, *array.shape[2:]), (views.long() * count + rows.long())

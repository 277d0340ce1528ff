"""What training reads: standardised features of chosen samples, clean or in random cached views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmnas_lab.backbone.feature_cache import FeatureCache
from mmnas_lab.types import Batch, InputError, InputInfos, Inputs, Split

if TYPE_CHECKING:
    from mmnas_lab.dataset.views import FeatureViews

BLOCK_ROWS = 4096


class FeatureSource:
    """Samples of one split, by position.

    Each feature is standardised by channel with the statistics of the clean training samples. All
    randomness comes from the generators that the methods are given.

    Attributes:
        infos: names, shapes and modalities of the features that are read.
        labels: labels of the samples, (n, Y) float or (n,) long; None where they are hidden.
        num_views: views cached of each sample; 0 for the test split.
    """

    def __init__(
        self,
        cache: FeatureCache,
        split: Split,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        features: Sequence[str] | None = None,
        feature_views: FeatureViews | None = None,
        in_memory_bytes: int = 4 << 30,
        device: torch.device | str = "cpu",
    ) -> None:
        """Open the features; preload them where they fit.

        Args:
            cache: the computed features.
            split: which samples.
            rows: (n,) long, rows of the split that are the samples, in this order; None: all.
            labels: aligned with the rows of the split: (rows, Y) multi-hot or (rows,) class indices.
            features: names to read; None: all.
            feature_views: random changes of features, on top of the cached views.
            in_memory_bytes: up to this size the samples' features are kept in memory, standardised.
            device: where batches are given.

        Raises:
            InputError: an unknown feature, rows outside the split, or labels of another number.
        """
        count = cache.rows(split)
        names = list(cache.infos if features is None else features)
        if unknown := [name for name in names if name not in cache.infos]:
            raise InputError(f"no feature '{unknown[0]}' was computed; there are {', '.join(cache.infos)}")
        rows = torch.arange(count) if rows is None else rows.cpu().long()
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            raise InputError(f"rows of '{split}' must lie in [0, {count}), got {rows.min()} to {rows.max()}")
        if labels is not None and len(labels) != count:
            raise InputError(f"'{split}' has {count} samples, got labels of {len(labels)}")
        self.infos: InputInfos = {name: cache.infos[name] for name in names}
        self.num_views = cache.views_of(split)
        self.device = torch.device(device)
        self.labels: Tensor | None = None
        if labels is not None:
            chosen = labels.cpu()[rows]
            self.labels = (chosen.float() if chosen.ndim == 2 else chosen.long()).to(self.device)
        self._cache = cache
        self._split: Split = split
        self._rows = rows
        self._feature_views = feature_views
        self._modality_of = {name: info.modality for name, info in self.infos.items()}
        self._statistics = {
            name: [value[:, None].to(self.device) for value in cache.statistics[name]] for name in names
        }
        values = sum(info.shape[0] * info.shape[1] for info in self.infos.values())
        size = 4 * values * (self.num_views + 1) * len(rows)
        self._memory: Inputs | None = self._preload() if size <= in_memory_bytes else None

    def __len__(self) -> int:
        return len(self._rows)

    def clean(self, index: Tensor) -> Batch:
        """One view of each sample: the sample itself.

        Args:
            index: (B,) long, positions in this source.

        Returns:
            One view of (B, C_i, L_i) float32 inputs, and labels.
        """
        index = index.cpu()
        return self._batch(index, self._gather(torch.zeros_like(index), index))

    def views(self, index: Tensor, generator: torch.Generator, count: int) -> Batch:
        """One or two random views of each sample.

        A pair is two different cached views, drawn for each sample. Of a single cached view the pair is
        that view and the clean sample; without any it is the clean sample twice, and only the feature views
        differ. A single view is any of the cached ones.

        Args:
            index: (B,) long, positions in this source.
            generator: source of all randomness.
            count: 1 or 2.
        """
        if count not in (1, 2):
            raise ValueError(f"FeatureSource.views gives 1 or 2 views, got count={count}")
        index = index.cpu()
        first = self._random_view(len(index), generator)
        if count == 1:
            return self._batch(index, self._changed(first, index, generator))
        second = torch.zeros_like(first)
        if self.num_views > 1:
            # A step of 1 to V - 1 around the circle of views never comes back to the first.
            step = torch.randint(1, self.num_views, first.shape, generator=generator, device=generator.device)
            second = (first - 1 + step.cpu()) % self.num_views + 1
        return self._batch(
            index, self._changed(first, index, generator), self._changed(second, index, generator)
        )

    def mixed(self, index: Tensor, generator: torch.Generator, clean_probability: float) -> Batch:
        """One view of each sample: clean with a probability, else a random cached view.

        Args:
            index: (B,) long, positions in this source.
            generator: source of all randomness.
            clean_probability: in [0, 1].
        """
        index = index.cpu()
        draws = torch.rand(len(index), generator=generator, device=generator.device).cpu()
        views = self._random_view(len(index), generator)
        views = torch.where(draws < clean_probability, 0, views)
        return self._batch(index, self._changed(views, index, generator))

    def _random_view(self, count: int, generator: torch.Generator) -> Tensor:
        """(B,) numbers of cached views, 1 to V; 0 where there are none."""
        if self.num_views == 0:
            return torch.zeros(count, dtype=torch.long)
        draws = torch.randint(1, self.num_views + 1, (count,), generator=generator, device=generator.device)
        return draws.cpu()

    def _batch(self, index: Tensor, *views: Inputs) -> Batch:
        labels = None if self.labels is None else self.labels[index.to(self.device)]
        return Batch(views, labels)

    def _changed(self, views: Tensor, index: Tensor, generator: torch.Generator) -> Inputs:
        inputs = self._gather(views, index)
        if self._feature_views is None:
            return inputs
        return self._feature_views(inputs, self._modality_of, generator)

    def _gather(self, views: Tensor, index: Tensor) -> Inputs:
        if self._memory is None:
            rows = self._rows[index]
            return {name: self._standardised(name, views, rows) for name in self.infos}
        flat = (views * len(self) + index).to(self.device)
        return {name: values.index_select(0, flat) for name, values in self._memory.items()}

    def _standardised(self, name: str, views: Tensor, rows: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return self._cache.standardised(self._split, name, views, rows)
        # Converted on the device, which is faster at it.
        values = self._cache.gather(self._split, name, views, rows).to(self.device).float()
        mean, std = self._statistics[name]
        return values.sub_(mean).div_(std)

    def _preload(self) -> Inputs:
        """All views of all samples, ((V + 1) * n, C_i, L_i) standardised."""
        memory: Inputs = {}
        for name, info in self.infos.items():
            values = torch.empty((self.num_views + 1) * len(self), *info.shape, device=self.device)
            start = 0
            for view in range(self.num_views + 1):
                for block in range(0, len(self), BLOCK_ROWS):
                    rows = self._rows[block : block + BLOCK_ROWS]
                    views = torch.full_like(rows, view)
                    values[start : start + len(rows)] = self._standardised(name, views, rows)
                    start += len(rows)
            memory[name] = values
        return memory

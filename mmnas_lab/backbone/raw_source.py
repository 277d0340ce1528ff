"""What training reads of raw arrays: standardised samples, clean or in views that are drawn live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmnas_lab.backbone.base import LiveViews
from mmnas_lab.backbone.moments import standardised
from mmnas_lab.dataset.views import ViewFamily, kept_where
from mmnas_lab.types import Batch, InputError, InputInfos, Inputs, Split

if TYPE_CHECKING:
    from mmnas_lab.backbone.raw import RawCache


class RawSource:
    """Samples of one split by position; a `loader.Source`.

    Each modality is standardised by channel with the statistics of the training samples; positions after a
    text's end are zero. A view's randomness is drawn for each sample and modality by itself, so that it
    depends neither on the samples nor on the modalities beside it.

    Where views may lose a modality (one of those that are read, never the only one), every batch has inputs
    `present.<modality>`, (B,) bool.

    Attributes:
        infos: names, shapes and kinds of the modalities that are read.
        labels: labels of the samples; None where they are hidden.
    """

    def __init__(
        self,
        cache: RawCache,
        split: Split,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        names: Sequence[str] | None = None,
        views: LiveViews | None = None,
        in_memory_bytes: int = 4 << 30,
        device: torch.device | str = "cpu",
    ) -> None:
        """Open the arrays; load them where they fit.

        Args:
            cache: the written arrays.
            split: which samples.
            rows: (n,) long, rows of the split that are the samples; None: all.
            labels: aligned with the rows of the split: (rows, Y) multi-hot or (rows,) class indices.
            names: of the modalities that are read; None: all.
            views: random changes of `views` and `mixed`; None: views change nothing.
            in_memory_bytes: up to this size the arrays are kept in memory, as they are stored.
            device: where batches are given.

        Raises:
            InputError: an unknown modality, rows outside the split, or labels of another number.
        """
        count = cache.rows(split)
        names = list(cache.infos if names is None else names)
        if unknown := [name for name in names if name not in cache.infos]:
            raise InputError(f"no modality '{unknown[0]}' was written; there are {', '.join(cache.infos)}")
        rows = torch.arange(count) if rows is None else rows.cpu().long()
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            raise InputError(f"rows of '{split}' must lie in [0, {count}), got {rows.min()} to {rows.max()}")
        if labels is not None and len(labels) != count:
            raise InputError(f"'{split}' has {count} samples, got labels of {len(labels)}")
        self.infos: InputInfos = {name: cache.infos[name] for name in names}
        self.device = torch.device(device)
        self.labels: Tensor | None = None
        if labels is not None:
            chosen = labels.cpu()[rows]
            self.labels = (chosen.float() if chosen.ndim == 2 else chosen.long()).to(self.device)
        self._views = views or LiveViews()
        self._modalities = list(cache.infos)
        self._rows = rows
        self._arrays = {name: cache.array(split, name) for name in names}
        lengths = {name: cache.lengths(split, name) for name in names}
        self._lengths = {
            name: torch.from_numpy(of_split.astype(np.int64))[rows]
            for name, of_split in lengths.items()
            if of_split is not None
        }
        self._statistics = {
            name: (mean.to(self.device), std.to(self.device))
            for name, (mean, std) in cache.statistics.items()
        }
        size = sum(len(rows) * array[:1].nbytes for array in self._arrays.values())
        self._memory: Inputs = {}
        if size <= in_memory_bytes:
            self._memory = {
                name: torch.from_numpy(np.take(array, rows.numpy(), 0)).to(self._home(name))
                for name, array in self._arrays.items()
            }

    def __len__(self) -> int:
        return len(self._rows)

    def clean(self, index: Tensor) -> Batch:
        """The samples as they are, standardised, float32."""
        index = index.cpu()
        inputs = {name: self._clean(name, index) for name in self.infos}
        return self._batch(index, inputs | self._all_present(index))

    def views(self, index: Tensor, generator: torch.Generator, count: int) -> Batch:
        """One or two random views of each sample."""
        if count not in (1, 2):
            raise ValueError(f"RawSource.views gives 1 or 2 views, got count={count}")
        index = index.cpu()
        return self._batch(index, *(self._view(index, generator, second=bool(k)) for k in range(count)))

    def mixed(self, index: Tensor, generator: torch.Generator, clean_probability: float) -> Batch:
        """One view of each sample: itself with a probability, else a random view."""
        index = index.cpu()
        draws = torch.rand(len(index), generator=generator, device=generator.device).cpu()
        inputs = self._view(index, generator, second=False)
        is_clean = (draws < clean_probability).to(self.device)
        if is_clean.any():
            itself = self.clean(index).views[0]
            inputs = {
                name: torch.where(is_clean.view(-1, *[1] * (value.ndim - 1)), itself[name], value)
                for name, value in inputs.items()
            }
        return self._batch(index, inputs)

    def _home(self, name: str) -> torch.device:
        """Where a modality is kept: on the device, unless its views are made sample by sample."""
        return torch.device("cpu") if name in self._views.families else self.device

    def _stored(self, name: str, index: Tensor) -> Tensor:
        """(B, ...) as they are kept."""
        if name in self._memory:
            return self._memory[name].index_select(0, index.to(self._home(name)))
        return torch.from_numpy(np.take(self._arrays[name], self._rows[index].numpy(), 0))

    def _clean(self, name: str, index: Tensor) -> Tensor:
        lengths = self._lengths[name][index] if name in self._lengths else None
        return self._standardised(name, self._stored(name, index), lengths)

    def _standardised(self, name: str, samples: Tensor, lengths: Tensor | None) -> Tensor:
        values = samples.to(self.device).float()
        if self.infos[name].kind == "image":
            values = values.div_(255)
        values = standardised(values, *self._statistics[name], self.infos[name].kind)
        return values if lengths is None else _ended(values, lengths)

    def _view(self, index: Tensor, generator: torch.Generator, second: bool) -> Inputs:
        seeds = torch.randint(
            2**62, (len(self._modalities) + 1,), generator=generator, device=generator.device
        )
        lost, *own = (torch.Generator().manual_seed(seed) for seed in seeds.tolist())
        draws = dict(zip(self._modalities, own, strict=True))
        views = {name: self._viewed(name, index, draws[name], second) for name in self.infos}
        if self._views.features.drop_modality == 0:
            return views
        present = self._views.features.present(list(self.infos), len(index), lost)
        views = {name: kept_where(present[name], value) for name, value in views.items()}
        return views | {f"present.{name}": present[name].to(self.device) for name in self.infos}

    def _viewed(self, name: str, index: Tensor, draws: torch.Generator, second: bool) -> Tensor:
        lengths = self._lengths[name][index] if name in self._lengths else None
        if self.infos[name].kind == "image":
            pictures = self._stored(name, index).to(self.device)
            values = self._views.pixels(pictures, *self._statistics[name], draws, second)
        elif name in self._views.families:
            samples, lengths = self._changed(name, self._views.families[name], index, lengths, draws)
            values = self._standardised(name, samples, lengths)
        else:
            values = self._clean(name, index)
        values = self._views.features.perturbed(values, draws)
        return values if lengths is None else _ended(values, lengths)

    def _changed(
        self, name: str, family: ViewFamily, index: Tensor, lengths: Tensor | None, draws: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """A view of each sample, and the new lengths of texts."""
        stored = self._stored(name, index).float().numpy()
        seeds = torch.randint(2**62, (len(index),), generator=draws).tolist()
        ends = [len(sample) for sample in stored] if lengths is None else lengths.tolist()
        views: list[np.ndarray[Any, Any]] = [
            family(sample[:end] if lengths is not None else sample, torch.Generator().manual_seed(seed))
            for sample, end, seed in zip(stored, ends, seeds, strict=True)
        ]
        if lengths is None:
            return torch.from_numpy(np.stack(views)), None
        for sample, view in zip(stored, views, strict=True):
            sample[: len(view)], sample[len(view) :] = view.copy(), 0
        return torch.from_numpy(stored), torch.tensor([len(view) for view in views], dtype=torch.long)

    def _all_present(self, index: Tensor) -> Inputs:
        if self._views.features.drop_modality == 0:
            return {}
        present = torch.ones(len(index), dtype=torch.bool, device=self.device)
        return {f"present.{name}": present for name in self.infos}

    def _batch(self, index: Tensor, *views: Inputs) -> Batch:
        labels = None if self.labels is None else self.labels[index.to(self.device)]
        return Batch(views, labels)


def _ended(values: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, D), zero after each text's end."""
    valid = torch.arange(values.shape[1]) < lengths[:, None]  # (B, T)
    return values * valid.to(values.device)[..., None]

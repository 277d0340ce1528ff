"""Batches as a function of (seed, stage, epoch, step): resuming, ranks and order of use change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmnas_lab import distributed
from mmnas_lab.randomness import generator
from mmnas_lab.types import Batch, InputError, InputInfos


class Source(Protocol):
    """Samples by row, as features in memory or on disk (`backbone.feature_source.FeatureSource`)."""

    infos: InputInfos
    labels: Tensor | None

    def __len__(self) -> int: ...

    def clean(self, index: Tensor) -> Batch:
        """The samples as they are."""

    def views(self, index: Tensor, generator: torch.Generator, count: int) -> Batch:
        """`count` differently drawn views of each sample."""

    def mixed(self, index: Tensor, generator: torch.Generator, clean_probability: float) -> Batch:
        """Each sample as it is with that probability, else a view of it."""


Draw = Callable[[Source, Tensor, torch.Generator], Batch]


def draw_pairs(source: Source, index: Tensor, generator: torch.Generator) -> Batch:
    """Two views of each sample."""
    return source.views(index, generator, 2)


def draw_clean(source: Source, index: Tensor, generator: torch.Generator) -> Batch:
    """The samples as they are."""
    return source.clean(index)


@dataclass(frozen=True)
class DrawMixed:
    """Each sample as it is with probability `1 - view_probability`, else a view of it."""

    view_probability: float

    def __call__(self, source: Source, index: Tensor, generator: torch.Generator) -> Batch:
        """The batch of these rows."""
        if self.view_probability == 0:
            return source.clean(index)
        return source.mixed(index, generator, 1 - self.view_probability)


class Batches:
    """Shuffled batches of one source; every epoch drops the rows that do not fill a batch.

    Args:
        source: the samples.
        draw: what to take of them.
        batch_size: over all ranks.
        address: (seed, stage, ...) that all draws derive from.
        whole: refuse a batch larger than the data (contrastive losses depend on the batch size); else the
            whole data is one batch.
    """

    def __init__(
        self, source: Source, draw: Draw, batch_size: int, address: tuple[int | str, ...], whole: bool
    ) -> None:
        if len(source) == 0:
            raise InputError(
                f"no sample to draw from in {address[1]}; use more data or a larger labelled_share"
            )
        if whole and batch_size > len(source):
            raise InputError(
                f"{address[1]}: batch_size={batch_size} is larger than the {len(source)} samples at hand; "
                f"set {str(address[1]).split('.')[0]}.batch_size to {len(source)} or less, or use more data"
            )
        self.source, self.draw, self.address = source, draw, address
        self.world, self.rank = distributed.world_size(), distributed.rank()
        self.batch_size = min(batch_size, len(source) // self.world * self.world)
        if self.batch_size == 0 or self.batch_size % self.world:
            raise InputError(
                f"{address[1]}: batch_size={batch_size} over {len(source)} samples does not split over "
                f"{self.world} devices; choose a multiple of {self.world}"
            )

    def __len__(self) -> int:
        return len(self.source) // self.batch_size

    def order(self, epoch: int) -> Tensor:
        """The permutation of the rows in an epoch."""
        return torch.randperm(len(self.source), generator=generator(*self.address, "order", epoch))

    def batch(self, epoch: int, step: int, order: Tensor | None = None) -> Batch:
        """This rank's part of one batch."""
        order = self.order(epoch) if order is None else order
        index = order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world]
        return self.draw(self.source, index, generator(*self.address, "draw", epoch, step, self.rank))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step `start` on."""
        order = self.order(epoch)
        for step in range(start, len(self)):
            yield self.batch(epoch, step, order)


class FixedBatches:
    """The same batches, with the same views, at every call: what evaluation and selection read.

    Ranks take turns batch by batch; rows that do not fill a batch are dropped where `whole` is set.
    """

    def __init__(
        self, source: Source, draw: Draw, batch_size: int, address: tuple[int | str, ...], whole: bool
    ) -> None:
        self.source, self.draw, self.address = source, draw, address
        self.batch_size = min(batch_size, len(source))
        rows = torch.arange(len(source))
        if whole:  # a fixed shuffle, so that the dropped rows are not the last ones of the file
            rows = torch.randperm(len(source), generator=generator(*address, "order"))
            rows = rows[: len(source) // self.batch_size * self.batch_size]
        self.rows = rows

    def __iter__(self) -> Iterator[Batch]:
        for i, index in enumerate(self.rows.split(self.batch_size)):
            if i % distributed.world_size() == distributed.rank():
                yield self.draw(self.source, index, generator(*self.address, "draw", i))


class SubSource:
    """Some rows of a source, by position.

    Attributes:
        rows: (n,) positions within the source.
    """

    def __init__(self, source: Source, rows: Tensor) -> None:
        self.source, self.rows = source, rows
        self.infos = source.infos
        self.labels = None if source.labels is None else source.labels[rows.to(source.labels.device)]

    def __len__(self) -> int:
        return len(self.rows)

    def clean(self, index: Tensor) -> Batch:
        """The samples as they are."""
        return self.source.clean(self.rows[index])

    def views(self, index: Tensor, generator: torch.Generator, count: int) -> Batch:
        """`count` views of each sample."""
        return self.source.views(self.rows[index], generator, count)

    def mixed(self, index: Tensor, generator: torch.Generator, clean_probability: float) -> Batch:
        """Clean samples and views of samples."""
        return self.source.mixed(self.rows[index], generator, clean_probability)


class JoinedSource:
    """Two sources one after the other: training on train and val together."""

    def __init__(self, first: Source, second: Source) -> None:
        self.first, self.second = first, second
        self.infos = first.infos
        parts = [source.labels for source in (first, second)]
        self.labels = None if any(part is None for part in parts) else torch.cat(parts)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def clean(self, index: Tensor) -> Batch:
        """The samples as they are."""
        return self._join(index, lambda source, rows: source.clean(rows))

    def views(self, index: Tensor, generator: torch.Generator, count: int) -> Batch:
        """`count` views of each sample."""
        return self._join(index, lambda source, rows: source.views(rows, generator, count))

    def mixed(self, index: Tensor, generator: torch.Generator, clean_probability: float) -> Batch:
        """Clean samples and views of samples."""
        return self._join(index, lambda source, rows: source.mixed(rows, generator, clean_probability))

    def _join(self, index: Tensor, take: Callable[[Source, Tensor], Batch]) -> Batch:
        """Both parts' batches, put back into the order of the index."""
        inside = index < len(self.first)
        parts = [(self.first, index[inside]), (self.second, index[~inside] - len(self.first))]
        batches = [take(source, rows) for source, rows in parts if len(rows)]
        order = torch.argsort(torch.cat([inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]]))
        views = tuple(
            {
                name: torch.cat([batch.views[v][name] for batch in batches])[order]
                for name in batches[0].views[v]
            }
            for v in range(len(batches[0].views))
        )
        if batches[0].labels is None:
            return Batch(views)
        return Batch(views, torch.cat([batch.labels for batch in batches if batch.labels is not None])[order])

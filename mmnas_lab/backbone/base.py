"""What a backbone is: frozen encoders of raw samples, or the arrays of the samples themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmnas_lab.dataset.pixel_views import PixelViews
from mmnas_lab.dataset.views import FeatureViews, ViewFamily
from mmnas_lab.types import InputInfos, Inputs, Settings, Split

if TYPE_CHECKING:
    from torch import Tensor, device

    from mmnas_lab.dataset.base import LabelFree
    from mmnas_lab.loader import Source
    from mmnas_lab.search_space.base import Network


class Encoder(Protocol):
    """One frozen encoder of one modality.

    Constructors take plain settings and check them (an unknown model name is an `InputError` there),
    but load no weights; `load` does. `encode` may be called from several threads at once.

    Attributes:
        modality: the modality of the dataset that it reads.
        fitted: True where `fit` must see the training samples before `encode` (TF-IDF, vocabularies).
        untrained: True where the weights are random, so that a label-free pretraining should run first.
        label_free: False where the weights were trained with labels of this very dataset.
    """

    modality: str
    untrained: bool
    label_free: bool

    @property
    def fitted(self) -> bool: ...

    def fingerprint(self) -> str:
        """Hash of the weights (file contents, not names) and of every setting that changes `encode`."""

    def load(self) -> None:
        """Load the weights, in eval mode. Calling it again does nothing.

        Raises:
            InputError: weights that are not there or do not fit, with the remedy.
        """

    def fit(self, samples: Iterable[Any]) -> None:
        """Learn what `encode` needs from raw training samples, without labels (only if `fitted`)."""

    def infos(self, length: int) -> InputInfos:
        """Names and shapes of the features, `"<modality>.<level>"` -> (C_i, L_i), L_i in {1, length}.

        Levels run from early to late. Known before any weights are loaded, except after `fit`.
        """

    def encode(self, samples: list[Any], length: int) -> Inputs:
        """Features of raw samples, float32 on the CPU, maps max-pooled to `length` positions, no gradient."""

    def save(self, path: Path) -> None:
        """Write what `fit` or a pretraining learned (only if `fitted` or `untrained`)."""

    def restore(self, path: Path) -> None:
        """Read what `save` wrote."""


class TrainableEncoder(Encoder, Protocol):
    """An encoder whose random weights can be pretrained: pixels or tokens to an embedding."""

    def network(self) -> Network:
        """The encoder as a network: reads `tensors(samples)`, gives its last level pooled as embedding."""

    def tensors(self, samples: list[Any]) -> Inputs:
        """Raw samples as the network's input tensors."""


@dataclass(frozen=True)
class LiveViews:
    """Random changes that are drawn in each step, of samples that no encoder reads.

    Attributes:
        pixels: of pictures.
        families: of other samples, by modality; a modality without one is left as it is.
        features: of standardised values, after the others.
    """

    pixels: PixelViews = field(default_factory=PixelViews)
    families: dict[str, ViewFamily] = field(default_factory=dict)
    features: FeatureViews = field(default_factory=FeatureViews)


class ArrayCache(Protocol):
    """The arrays of all samples, opened.

    Attributes:
        infos: the inputs, under the names of their modalities.
        statistics: mean and standard deviation by channel of the training samples.
    """

    infos: InputInfos
    statistics: dict[str, tuple[Tensor, Tensor]]

    def source(
        self,
        split: Split,
        rows: Tensor | None,
        labels: Tensor | None,
        names: tuple[str, ...] | None,
        views: LiveViews | None,
        device: device | str,
    ) -> Source:
        """Samples of a split in these views; all rows and names where None are given."""


class ArrayBackbone(Protocol):
    """A backbone for networks that read the samples themselves."""

    @property
    def label_free(self) -> bool: ...

    def check(self, dataset_modalities: dict[str, str]) -> None:
        """Refuse a dataset that it has no arrays for. Raises InputError."""

    def settings(self) -> Settings:
        """Everything that decides the arrays."""

    def views(self, families: dict[str, ViewFamily], modalities: dict[str, str]) -> dict[str, ViewFamily]:
        """Of the families by modality, those that its sources draw live, in the form that they need."""

    def write(self, dataset: LabelFree, folder: Path, progress: Progress | None = None) -> None:
        """Write the arrays of all samples; an unfinished folder is gone on with."""

    def open(self, folder: Path) -> ArrayCache:
        """What `write` wrote. Raises InputError where it is not complete."""


Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]

"""What a backbone encoder is: raw samples of one modality to pooled features of several levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmnas_lab.types import InputInfos, Inputs, OutputInfo, Settings

if TYPE_CHECKING:
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
    fitted: bool
    untrained: bool
    label_free: bool

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


Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
__all__ = ["Encoder", "InputInfos", "OutputInfo", "Progress", "Settings", "TrainableEncoder"]

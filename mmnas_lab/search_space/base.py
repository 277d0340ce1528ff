"""What a search space is: choices, networks built from them, and for some a hypernet that holds all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmnas_lab.types import InputError, InputInfos, Inputs, Output, OutputInfo


class Genotype(Protocol):
    """A discrete architecture: frozen, hashable, JSON in and out."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the name of the space and a schema version."""


class Derived(NamedTuple):
    """A genotype read off a hypernet, and by how much each choice won over its runner-up."""

    genotype: Any
    margins: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """One decision of a space: a name and its options."""

    name: str
    options: tuple[str, ...]


class Network(nn.Module, ABC):
    """A module from named inputs to an embedding."""

    info: OutputInfo
    unread: bool = False
    """Whether it may have parameters on which its output does not depend; DDP must be told."""

    @abstractmethod
    def forward(self, inputs: Inputs, present: dict[str, Tensor] | None = None) -> Output:
        """The embedding (B, D) and taps; `present[m]` (B,) bool marks samples that have modality m."""

    def at_epoch(self, epoch: int, epochs: int) -> None:
        """Called as an epoch begins, counted from 0: what grows over the epochs (drop-path) is set here."""


class Hypernet(Network):
    """A weight-sharing network that holds all candidate architectures.

    Attributes:
        arch: the architecture logits (alpha, beta, gamma); every other parameter is a weight.
    """

    arch: nn.ParameterDict
    _weights_only: bool = False
    _pinned: dict[str, Tensor] | None = None

    @abstractmethod
    def mixing(self) -> dict[str, Tensor]:
        """The relaxed weights by name, each normalised over its last dimension where it is a choice."""

    @abstractmethod
    def derive(self) -> Derived:
        """The genotype of the present logits."""

    @abstractmethod
    def choice_names(self) -> dict[str, list[str]]:
        """A name for each entry of `mixing`, flattened: what plots and traces write beside it."""

    def monitors(self, genotype: Any) -> dict[str, float]:
        """Counts of a derived genotype that are worth a curve over the search; none by default."""
        return {}

    def alarm(self, genotype: Any) -> str | None:
        """What is wrong with a derived genotype and what helps, where it has degenerated."""
        return None

    @contextmanager
    def weights_only(self) -> Iterator[None]:
        """Within it the mixing weights carry no gradient: the weight half-step wastes nothing on them."""
        self._weights_only = True
        try:
            yield
        finally:
            self._weights_only = False

    def one_hot(self, genotype: Any) -> dict[str, Tensor]:
        """Mixing weights by name that leave one genotype: 1 for what it holds, 0 for all else.

        Raises:
            InputError: the hypernet cannot stand for single genotypes.
        """
        raise InputError(f"{type(self).__name__} cannot stand for single genotypes")

    @contextmanager
    def pinned(self, genotype: Any) -> Iterator[None]:
        """Within it the hypernet is one of its networks, with the weights that all share.

        Raises:
            InputError: the hypernet cannot stand for single genotypes.
        """
        device = next(iter(self.arch.values())).device
        self._pinned = {name: weights.to(device) for name, weights in self.one_hot(genotype).items()}
        try:
            yield
        finally:
            self._pinned = None

    def revised(self, genotype: Any, decision: int) -> list[Any]:
        """The genotypes that differ from one in a single decision at most, itself first.

        Args:
            genotype: one of the hypernet's.
            decision: its number, from 0; decisions on which others build come first.

        Returns:
            None at all where there are no more decisions.

        Raises:
            InputError: the hypernet cannot stand for single genotypes.
        """
        raise InputError(f"{type(self).__name__} cannot stand for single genotypes")

    def logits(self, name: str) -> Tensor:
        """An architecture logit tensor, detached in the weight half-step."""
        parameter = self.arch[name]
        return parameter.detach() if self._weights_only else parameter


def held_weights(module: nn.Module, arch: Iterable[nn.Parameter]) -> dict[str, Tensor]:
    """A module's parameters but for the logits, by name and without gradients, for `functional_call`.

    An architecture half-step then keeps nothing that only gradients of weights would need.
    """
    logits = {id(parameter) for parameter in arch}
    named = module.named_parameters()
    return {name: parameter.detach() for name, parameter in named if id(parameter) not in logits}


class SearchSpace(Protocol):
    """All that random, fixed and sampling strategies need.

    Attributes:
        length: positions to which backbone maps are pooled; None where the space reads images as they are.
    """

    @property
    def length(self) -> int | None: ...

    def choices(self, inputs: InputInfos) -> list[Choice]:
        """The decisions that make a genotype."""

    def sample(self, inputs: InputInfos, generator: torch.Generator) -> Any:
        """A genotype drawn uniformly."""

    def parse(self, data: dict[str, Any], inputs: InputInfos) -> Any:
        """A genotype from its JSON form, checked against the inputs. Raises InputError."""

    def build(self, genotype: Any, inputs: InputInfos, dropout: float | None = None) -> Network:
        """The found network with fresh weights; `dropout` overrides the space's."""

    def fixed(self, name: str, inputs: InputInfos) -> Any:
        """A genotype or network recipe of a baseline, by name."""


class Relaxed(SearchSpace, Protocol):
    """A space that gradient strategies can search."""

    def hypernet(self, inputs: InputInfos) -> Hypernet:
        """The hypernet with fresh weights and logits."""

"""What a search strategy is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mmnas_lab.config import Search
from mmnas_lab.loader import Draw, Source
from mmnas_lab.objective.base import Needs, Objective, Weighted
from mmnas_lab.training import Point, Runtime
from mmnas_lab.types import InputInfos, OutputInfo


@dataclass(frozen=True)
class Problem:
    """One search.

    Attributes:
        space: the search space.
        inputs: what its networks read.
        objective: makes the objective for a network's output.
        needs: of that objective.
        weights: samples on which shared weights (or a draw's weights) are trained.
        architecture: samples on which architectures are moved and compared.
        draw: what a training batch takes of its samples.
        settings: the stage's.
        seed: of the run.
        runtime: hardware and listeners.
        regularisers: of the mixing weights, for strategies that have them.
        root: folder for what outlives this search.
        data: key of the data that the sources read.
        objective_settings: of the objective, as plain values.
        restricted: the sources of weights and architecture with some of the inputs alone; None gives all.
    """

    space: Any
    inputs: InputInfos
    objective: Callable[[OutputInfo], Objective]
    needs: Needs
    weights: Source
    architecture: Source
    draw: Draw
    settings: Search
    seed: int
    runtime: Runtime
    regularisers: dict[str, Weighted] = field(default_factory=dict)
    root: Path = Path("outputs")
    data: str = ""
    objective_settings: dict[str, Any] = field(default_factory=dict)
    restricted: Callable[[tuple[str, ...]], tuple[Source, Source]] | None = None


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        genotype: the best architecture.
        margins: by how much each of its choices won, in mixing weights or, where single genotypes were
            compared, in their loss.
        selection: how it was chosen among the candidates: name, value, epoch or draw.
        history: everything logged.
        trace: relaxed weights over the search, `{"names": ..., "records": [...]}`; empty without a hypernet.
        snapshots: what the objective showed of a few samples over the search, `<epoch>/<name>`.
    """

    genotype: Any
    margins: dict[str, float]
    selection: dict[str, Any]
    history: list[Point] = field(default_factory=list)
    trace: dict[str, Any] = field(default_factory=dict)
    snapshots: dict[str, Tensor] = field(default_factory=dict)


class Strategy(Protocol):
    """A way to search.

    Attributes:
        space_needs: methods of the search space that it calls, besides `parse` and `build`.
        needs_data: whether it reads samples.
        regularised: whether regularisers of the mixing weights play a part.
        splits_train: whether a search with labels divides the labelled share; else it scores on val.
    """

    name: str
    space_needs: tuple[str, ...]
    needs_data: bool
    regularised: bool
    splits_train: bool

    def search(self, problem: Problem, folder: Path) -> SearchResult:
        """Find a genotype; save points go into `folder`, and are taken up again from there."""

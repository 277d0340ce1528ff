"""Genotypes of a trained hypernet, compared one by one instead of read off its mixing weights.

Mixing weights say how much a feature adds to a mixture of all; they need not say which single pair works best
once the others are gone. Here each genotype is scored as itself, with the weights that all share.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmnas_lab.search_space.base import Hypernet
from mmnas_lab.types import TrainingError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Discretised:
    """The genotype that a descent ends at.

    Attributes:
        genotype: of the lowest loss among its revisions.
        loss: its own.
        start: the loss of the genotype that the descent began with.
        compared: number of genotypes that were scored.
        margins: by choice, how much higher the loss of the best revision is that chooses otherwise there.
    """

    genotype: Any
    loss: float
    start: float
    compared: int
    margins: dict[str, float]


def descend(network: Hypernet, genotype: Any, loss_of: Callable[[Hypernet], float]) -> Discretised:
    """Revise a genotype decision by decision, as long as the loss falls.

    In each decision all genotypes are scored that differ in it alone (224 pairs and operations for a fusion
    cell of 8 features), and the best is taken; in a tie the present one stays, then the first one wins.
    After the last decision it begins anew, until a whole round changes nothing.

    Args:
        network: the trained hypernet, in the mode in which losses are to be taken.
        genotype: where to begin.
        loss_of: loss of the network as it is pinned; one that is not finite counts as the highest.

    Raises:
        InputError: a hypernet that cannot stand for single genotypes.
        TrainingError: no genotype with a finite loss.
    """
    losses: dict[Any, float] = {}

    def loss(one: Any) -> float:
        if one not in losses:
            with network.pinned(one):
                value = loss_of(network)
            losses[one] = value if math.isfinite(value) else math.inf
        return losses[one]

    start = loss(genotype)
    while True:
        before, decision = genotype, 0
        margins: dict[str, float] = {}
        while options := network.revised(genotype, decision):
            genotype = min(options, key=loss)
            margins |= _margins(genotype, options, loss)
            decision += 1
        if genotype == before:
            break
    if not math.isfinite(loss(genotype)):
        raise TrainingError(
            "no single genotype has a finite loss with the weights of the search; lower search.optimizer.lr, "
            "set search.clip_norm or strategy.decide=weights"
        )
    return Discretised(genotype, loss(genotype), start, len(losses), margins)


def _margins(best: Any, options: list[Any], loss: Callable[[Any], float]) -> dict[str, float]:
    """Of the choices in which the options differ; left out where no other one has a finite loss."""
    margins = {}
    for name, chosen in best.choices().items():
        others = [loss(option) for option in options if option.choices()[name] != chosen]
        if others and math.isfinite(min(others)):
            margins[name] = min(others) - loss(best)
    return margins

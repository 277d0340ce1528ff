"""Genotypes of a trained hypernet, compared one by one instead of read off its mixing weights.

Mixing weights say how much a feature adds to a mixture of all; they need not say which single pair works best
once the others are gone. Here each genotype is scored as itself, with the weights that all share.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmnas_lab import distributed
from mmnas_lab.search_space.base import Hypernet
from mmnas_lab.stage import write_json
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


def descend(
    network: Hypernet, genotype: Any, loss_of: Callable[[Hypernet], float], store: Path | None = None
) -> Discretised:
    """Revise a genotype decision by decision, as long as the loss falls.

    In each decision all genotypes are scored that differ in it alone (224 pairs and operations for a fusion
    cell of 8 features), and the best is taken; in a tie the present one stays, so that what no output depends
    on stays as it was, then the first one wins. After the last decision it begins anew, until a whole round
    changes nothing.

    Args:
        network: the trained hypernet, in the mode in which losses are to be taken.
        genotype: where to begin.
        loss_of: loss of the network as it is pinned, equal on all ranks; one that is not finite counts as the
            highest.
        store: file that holds the losses while the comparison goes on. What an interrupted one, with the same
            weights, left there is not computed again.

    Raises:
        InputError: a hypernet that cannot stand for single genotypes.
        TrainingError: no genotype with a finite loss.
    """
    losses = _Losses(network, loss_of, store)
    start = losses(genotype)
    while True:
        before, decision = genotype, 0
        margins: dict[str, float] = {}
        while options := network.revised(genotype, decision):
            genotype = min(options, key=losses)
            margins |= _margins(genotype, options, losses)
            losses.keep()
            decision += 1
            log.info("decision %d of single genotypes: loss %.3f", decision, losses(genotype))
        if genotype == before:
            break
    if not math.isfinite(losses(genotype)):
        raise TrainingError(
            "no single genotype has a finite loss with the weights of the search; lower search.optimizer.lr, "
            "set search.clip_norm or strategy.decide=weights"
        )
    losses.forget()
    return Discretised(genotype, losses(genotype), start, len(losses.known), margins)


class _Losses:
    """Losses of single genotypes, each computed once."""

    def __init__(self, network: Hypernet, loss_of: Callable[[Hypernet], float], store: Path | None) -> None:
        self.network, self.loss_of, self.store = network, loss_of, store
        found = json.loads(store.read_text()) if store is not None and store.exists() else {}
        self.known: dict[str, float | None] = distributed.broadcast(found)

    def __call__(self, genotype: Any) -> float:
        key = json.dumps(genotype.to_json(), sort_keys=True)
        if key not in self.known:
            with self.network.pinned(genotype):
                value = self.loss_of(self.network)
            self.known[key] = value if math.isfinite(value) else None
        kept = self.known[key]
        return math.inf if kept is None else kept

    def keep(self) -> None:
        """Write what is known, on rank 0."""
        if self.store is not None and distributed.rank() == 0:
            write_json(self.store, self.known)

    def forget(self) -> None:
        """Remove the file, on rank 0."""
        if self.store is not None and distributed.rank() == 0:
            self.store.unlink(missing_ok=True)


def _margins(best: Any, options: list[Any], loss: Callable[[Any], float]) -> dict[str, float]:
    """Of the choices in which the options differ; left out where no other one has a finite loss.

    Inputs in another order with exactly the same loss, as a sum has them, are no other choice.
    """
    margins = {}
    for name, chosen in best.choices().items():
        others = [
            loss(option)
            for option in options
            if (other := option.choices()[name]) != chosen
            and not (sorted(other) == sorted(chosen) and loss(option) == loss(best))
        ]
        if others and math.isfinite(min(others)):
            margins[name] = min(others) - loss(best)
    return margins

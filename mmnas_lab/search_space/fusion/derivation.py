"""From architecture weights to a genotype, with the margin of every choice.

All rules enumerate the admissible candidates in lexicographic order and take the first best one, so that
ties have a defined break; the margin is the winner's score minus the runner-up's, 0 for a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement, permutations
from typing import Literal, Protocol

from torch import Tensor

from mmnas_lab.search_space.base import Derived
from mmnas_lab.search_space.fusion.genotype import CellGenotype, FusionGenotype, StepGenotype

Pairing = Literal["shared", "distinct"]
Pair = tuple[int, int]


def edge_slices(num_features: int, num_cells: int) -> list[slice]:
    """Rows of alpha that belong to each cell: the features, then the earlier cells."""
    starts = [i * num_features + i * (i - 1) // 2 for i in range(num_cells + 1)]
    return [slice(starts[i], starts[i + 1]) for i in range(num_cells)]


def inner_slices(num_steps: int) -> list[slice]:
    """Rows of a cell's beta that belong to each step: x, y, then the earlier steps."""
    return edge_slices(2, num_steps)


class Rule(Protocol):
    """How pairs of inputs are read off relaxed weights."""

    def cell_pair(self, alpha: Tensor, num_features: int, taken: Sequence[Pair]) -> tuple[Pair, float]:
        """The two inputs of the next cell, as indices into features and earlier cells, and the margin."""

    def step_pair(self, beta: Tensor) -> tuple[Pair, float]:
        """The two operands of a step, as indices into [x, y, s_0, ...], and the margin."""


class ReleasedRule:
    """The released implementation's: pairs of features only, each with at least one not picked before.

    Where all features are picked already (few features, many cells), every pair is admitted again.
    """

    def cell_pair(self, alpha: Tensor, num_features: int, taken: Sequence[Pair]) -> tuple[Pair, float]:
        skip = alpha[:, 1].tolist()
        used = {index for pair in taken for index in pair}
        every = list(combinations(range(num_features), 2))
        pairs = [pair for pair in every if not used.issuperset(pair)] or every
        return best(pairs, [skip[j] * skip[k] for j, k in pairs])

    def step_pair(self, beta: Tensor) -> tuple[Pair, float]:
        skip = beta[:, 1].tolist()
        ranked = sorted(range(len(skip)), key=lambda q: -skip[q])  # stable: the earlier state wins a tie
        runner_up = skip[ranked[2]] if len(skip) > 2 else 0.0
        return (ranked[0], ranked[1]), skip[ranked[0]] * (skip[ranked[1]] - runner_up)


class PaperRule:
    """Eq. 3 as printed: features and earlier cells, the largest alpha_g alpha_g over g in {Zero, Identity}.

    A pair is taken by one cell at most; a step may take one predecessor twice. Read to the letter the
    latter makes the best predecessor both operands of every step.
    """

    def cell_pair(self, alpha: Tensor, num_features: int, taken: Sequence[Pair]) -> tuple[Pair, float]:
        every = list(combinations(range(len(alpha)), 2))
        pairs = [pair for pair in every if pair not in taken] or every
        return best(pairs, self._scores(alpha, pairs))

    def step_pair(self, beta: Tensor) -> tuple[Pair, float]:
        pairs = list(combinations_with_replacement(range(len(beta)), 2))
        return best(pairs, self._scores(beta, pairs))

    @staticmethod
    def _scores(weights: Tensor, pairs: Sequence[Pair]) -> list[float]:
        rows = weights.tolist()
        return [max(a * b for a, b in zip(rows[j], rows[k], strict=True)) for j, k in pairs]


class DistinctRule:
    """Ours: x and y have mixtures of their own, and the ordered pair with the largest product is taken.

    The only step of a cell reads (x, y) in this order: which is which is decided by alpha already.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def cell_pair(self, alpha: Tensor, num_features: int, taken: Sequence[Pair]) -> tuple[Pair, float]:
        return self._ordered(alpha)

    def step_pair(self, beta: Tensor) -> tuple[Pair, float]:
        if self.num_steps == 1:
            return (0, 1), float(beta[0, 0] * beta[1, 1])
        return self._ordered(beta)

    @staticmethod
    def _ordered(weights: Tensor) -> tuple[Pair, float]:
        first, second = weights.tolist()
        pairs = list(permutations(range(len(first)), 2))
        return best(pairs, [first[j] * second[k] for j, k in pairs])


def best(candidates: Sequence[Pair], scores: Sequence[float]) -> tuple[Pair, float]:
    """The first candidate with the largest score, and its lead over the others (its score if alone)."""
    winner = max(range(len(scores)), key=lambda c: (scores[c], -c))
    others = [score for c, score in enumerate(scores) if c != winner]
    return candidates[winner], scores[winner] - max(others, default=0.0)


def derive(
    alpha: Sequence[Tensor],
    beta: Sequence[Sequence[Tensor]],
    gamma: Tensor,
    features: Sequence[str],
    ops: Sequence[str],
    head_cells: int,
    rule: Rule,
) -> Derived:
    """The genotype of relaxed weights.

    Args:
        alpha: for each cell, weights of its candidates (rule's form: (n + i, 2) shared, (2, n + i) distinct).
        beta: for each cell and step, weights of its predecessors ((2 + m, 2) or (2, 2 + m)).
        gamma: (N, M, K) weights of the operations.
        features: names of the n backbone features.
        ops: names of the K operations.
        head_cells: number of last cells that feed the head.
        rule: how pairs are chosen.

    Returns:
        The genotype and the margins of `cell.0.inputs`, `cell.0.step.0.inputs`, `cell.0.step.0.op`, ...
    """
    cells: list[CellGenotype] = []
    taken: list[Pair] = []
    margins: dict[str, float] = {}
    for i, alpha_i in enumerate(alpha):
        names = [*features, *(f"cell.{c}" for c in range(i))]
        pair, margins[f"cell.{i}.inputs"] = rule.cell_pair(alpha_i.detach().cpu(), len(features), taken)
        taken.append(pair)
        steps = []
        for m, beta_im in enumerate(beta[i]):
            operands, margins[f"cell.{i}.step.{m}.inputs"] = rule.step_pair(beta_im.detach().cpu())
            (op, _), margins[f"cell.{i}.step.{m}.op"] = best(
                [(k, k) for k in range(len(ops))], gamma[i, m].tolist()
            )
            steps.append(StepGenotype(operands, ops[op]))
        cells.append(CellGenotype((names[pair[0]], names[pair[1]]), tuple(steps)))
    return Derived(FusionGenotype(tuple(cells), head_cells), margins)

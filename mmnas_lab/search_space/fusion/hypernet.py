"""The fusion hypernets: every feature and every operation at once, weighted by alpha, beta and gamma.

`SharedHypernet` is the published one (BM-NAS eq. 1, 2, 10): each edge has its own (none, skip) weights, and
one mixture is both inputs of a cell. `DistinctHypernet` is ours: x and y are two mixtures, each relaxed over
its candidates, so that which input carries the residual, and which attends to which, is learned.

Neither computes a thing twice: all feature mixtures of all cells are one contraction, `none` costs nothing,
and equal operands are projected once (see `LinearOp.of_joined`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import permutations, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmnas_lab.search_space.base import Derived, Hypernet
from mmnas_lab.search_space.fusion.cell import Flatten, MixedStep, reshape_all
from mmnas_lab.search_space.fusion.derivation import (
    DistinctRule,
    Rule,
    derive,
    edge_slices,
    inner_slices,
)
from mmnas_lab.search_space.fusion.fused import weighted_sum
from mmnas_lab.search_space.fusion.genotype import CellGenotype, FusionGenotype, StepGenotype
from mmnas_lab.search_space.relaxation import gumbel_noise, relax
from mmnas_lab.types import InputError, InputInfos, Inputs, Output, OutputInfo

if TYPE_CHECKING:
    from mmnas_lab.search_space.fusion.space import FusionSpace


class FusionHypernet(Hypernet):
    """What both pairings have in common.

    Args:
        space: the settings (N cells, M steps, C channels, L length, ...).
        inputs: the backbone features, in the order of alpha's columns.
        rule: how the genotype is read off.
        shapes: shapes of alpha, beta and gamma; drawn as 1e-3 N(0, 1), as released.
    """

    def __init__(
        self, space: FusionSpace, inputs: InputInfos, rule: Rule, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.features = tuple(inputs)
        self.modality_of = {name: info.modality for name, info in inputs.items()}
        self.ops = tuple(space.ops)
        self.num_cells, self.num_steps, self.head_cells = space.num_cells, space.num_steps, space.head_cells
        self.rule = rule
        self.relaxation, self.temperature = space.relaxation, space.temperature
        self.edges = edge_slices(len(inputs), space.num_cells)
        self.inner = inner_slices(space.num_steps)

        self.reshape = nn.ModuleList(space.reshape(name, info) for name, info in inputs.items())
        self.steps = nn.ModuleList(
            nn.ModuleList(
                MixedStep({name: make() for name, make in space.ops.items()}) for _ in range(self.num_steps)
            )
            for _ in range(self.num_cells)
        )
        self.ends = nn.ModuleList(space.cell_end() for _ in range(self.num_cells))
        self.flatten: Flatten = space.flatten()
        self.arch = nn.ParameterDict({k: nn.Parameter(1e-3 * torch.randn(s)) for k, s in shapes.items()})
        self.info = OutputInfo(
            space.head_cells * space.channels * space.length,
            {f"cell.{i}": (space.channels, space.length) for i in range(self.num_cells)},
        )

    def one_hot(self, genotype: FusionGenotype) -> dict[str, Tensor]:
        raise InputError(
            "the shared hypernet has one mixture for both inputs of a cell, so it cannot stand for single "
            "genotypes; set search_space.pairing=distinct"
        )

    def _weights(self, name: str) -> Tensor:
        """The weights of this forward of a logit tensor whose last dimension is one choice."""
        if self._pinned is not None:
            return self._pinned[name]
        return self.relaxed(self.logits(name), sampled=True)

    def relaxed(self, logits: Tensor, sampled: bool = False) -> Tensor:
        """Weights of the options in the last dimension; drawn in a training step if `sampled`."""
        noisy = sampled and self.training and self.relaxation == "gumbel"
        return relax(logits, self.relaxation, gumbel_noise(logits) if noisy else None, self.temperature)

    @abstractmethod
    def operands(
        self,
    ) -> tuple[Tensor, Tensor, Callable[[int, int, Sequence[Tensor]], tuple[Tensor, Tensor]]]:
        """Mixing weights of this forward.

        Returns:
            Feature weights of all cell inputs (S, n), earlier-cell weights of all cell inputs (S, N), and a
            function from (cell, step, states) to the step's two operands.
        """

    @abstractmethod
    def cell_inputs(self, i: int, sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The inputs x and y of cell i, among the S cell inputs."""

    def _candidates(self, i: int) -> list[str]:
        return [*self.features, *(f"cell.{c}" for c in range(i))]

    def _states(self, m: int) -> list[str]:
        return ["x", "y", *(f"s{q}" for q in range(m))]

    def _op_names(self) -> list[str]:
        steps = [(i, m) for i in range(self.num_cells) for m in range(self.num_steps)]
        return [f"cell.{i} step {m}: {op}" for i, m in steps for op in self.ops]

    def forward(self, inputs: Inputs, present: dict[str, Tensor] | None = None) -> Output:
        layers: Any = self.reshape
        features = [masked(inputs[name], present, self.modality_of[name]) for name in self.features]
        h = reshape_all(list(layers), features)  # (n, B, L, C)
        feature_weights, cell_weights, step_operands = self.operands()
        gamma = self._weights("gamma")  # (N, M, K)
        mixtures = (feature_weights @ h.flatten(1)).view(-1, *h.shape[1:]).unbind()  # S of (B, L, C)

        per_cell = len(mixtures) // self.num_cells
        cells: list[Tensor] = []
        for i in range(self.num_cells):
            rows = range(i * per_cell, (i + 1) * per_cell)
            sources = [mixtures[s] for s in rows]
            if cells:
                pairs = zip(sources, rows, strict=True)
                sources = [weighted_sum(cell_weights[s, : len(cells)], cells, [u]) for u, s in pairs]
            states = list(self.cell_inputs(i, sources))
            steps: Any = self.steps[i]
            for m, step in enumerate(steps):
                first, second = step_operands(i, m, states)
                states.append(step(first, second, gamma[i, m]))
            cells.append(self.ends[i](states))
        taps = {f"cell.{i}": cell.transpose(1, 2) for i, cell in enumerate(cells)}
        return Output(self.flatten(cells), taps)


class SharedHypernet(FusionHypernet):
    """One mixture a cell, (none, skip) on each edge: alpha (E, 2), beta (N, I, 2), gamma (N, M, K)."""

    def __init__(self, space: FusionSpace, inputs: InputInfos, rule: Rule) -> None:
        shapes = {
            "alpha": (edge_slices(len(inputs), space.num_cells)[-1].stop, 2),
            "beta": (space.num_cells, inner_slices(space.num_steps)[-1].stop, 2),
            "gamma": (space.num_cells, space.num_steps, len(space.ops)),
        }
        super().__init__(space, inputs, rule, shapes)

    def mixing(self) -> dict[str, Tensor]:
        return {name: self.relaxed(self.logits(name)) for name in self.arch}

    def choice_names(self) -> dict[str, list[str]]:
        cells, steps, edges = range(self.num_cells), range(self.num_steps), ("none", "skip")
        return {
            "alpha": [f"cell.{i} {e}: {name}" for i in cells for name in self._candidates(i) for e in edges],
            "beta": [
                f"cell.{i} step {m} {e}: {state}"
                for i in cells
                for m in steps
                for state in self._states(m)
                for e in edges
            ],
            "gamma": self._op_names(),
        }

    def operands(
        self,
    ) -> tuple[Tensor, Tensor, Callable[[int, int, Sequence[Tensor]], tuple[Tensor, Tensor]]]:
        alpha, beta = self._weights("alpha")[:, 1], self._weights("beta")[..., 1]  # (E,), (N, I)
        n = len(self.features)
        by_cell = [alpha[edges] for edges in self.edges]
        feature_weights = torch.stack([a[:n] for a in by_cell])
        cell_weights = torch.stack(
            [nn.functional.pad(a[n:], (0, self.num_cells - i)) for i, a in enumerate(by_cell)]
        )

        def step_operands(i: int, m: int, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            b = beta[i, self.inner[m]]
            weights = torch.cat([b[:2].sum().view(1), b[2:]])  # x and y are one tensor
            z = weighted_sum(weights, states[1:])
            return z, z

        return feature_weights, cell_weights, step_operands

    def cell_inputs(self, i: int, sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return sources[0], sources[0]

    def derive(self) -> Derived:
        with torch.no_grad():
            mixing = self.mixing()
        alpha = [mixing["alpha"][edges] for edges in self.edges]
        beta = [[cell[inner] for inner in self.inner] for cell in mixing["beta"]]
        return derive(alpha, beta, mixing["gamma"], self.features, self.ops, self.head_cells, self.rule)


class DistinctHypernet(FusionHypernet):
    """Two mixtures a cell and a step: alpha (2, E), beta (N, 2, I), gamma (N, M, K).

    alpha is relaxed over the candidates of each cell, beta over the predecessors of each step.
    """

    def __init__(self, space: FusionSpace, inputs: InputInfos) -> None:
        shapes = {
            "alpha": (2, edge_slices(len(inputs), space.num_cells)[-1].stop),
            "beta": (space.num_cells, 2, inner_slices(space.num_steps)[-1].stop),
            "gamma": (space.num_cells, space.num_steps, len(space.ops)),
        }
        super().__init__(space, inputs, DistinctRule(space.num_steps), shapes)

    def mixing(self) -> dict[str, Tensor]:
        return {**self._mixtures(sampled=False), "gamma": self.relaxed(self.logits("gamma"))}

    def one_hot(self, genotype: FusionGenotype) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(logits, device="cpu") for name, logits in self.arch.items()}
        for i, cell in enumerate(genotype.cells):
            names = self._candidates(i)
            for port, name in enumerate(cell.inputs):
                found["alpha"][port, self.edges[i]][names.index(name)] = 1
            for m, step in enumerate(cell.steps):
                for operand, state in enumerate(step.inputs):
                    found["beta"][i, operand, self.inner[m]][state] = 1
                found["gamma"][i, m, self.ops.index(step.op)] = 1
        return found

    def revised(self, genotype: FusionGenotype, decision: int) -> list[FusionGenotype]:
        if decision >= self.num_cells * self.num_steps:
            return []
        i, m = divmod(decision, self.num_steps)
        cell = genotype.cells[i]
        # The first step is chosen along with the cell's inputs; if it is the only one, it reads x and y.
        pairs = list(permutations(self._candidates(i), 2)) if m == 0 else [cell.inputs]
        operands = list(permutations(range(2 + m), 2)) if self.num_steps > 1 else [(0, 1)]
        ops = [op for op in self.ops if op != "zero" or cell.steps[m].op == "zero"]  # nothing is chosen anew
        found = {genotype: None}
        for pair, states, op in product(pairs, operands, ops):
            steps = (*cell.steps[:m], StepGenotype(states, op), *cell.steps[m + 1 :])
            cells = (*genotype.cells[:i], CellGenotype(pair, steps), *genotype.cells[i + 1 :])
            found[FusionGenotype(cells, genotype.head_cells)] = None
        return list(found)

    def _mixtures(self, sampled: bool) -> dict[str, Tensor]:
        alpha, beta = self.logits("alpha"), self.logits("beta")
        return {
            "alpha": torch.cat([self.relaxed(alpha[:, edges], sampled) for edges in self.edges], -1),
            "beta": torch.cat([self.relaxed(beta[..., inner], sampled) for inner in self.inner], -1),
        }

    def choice_names(self) -> dict[str, list[str]]:
        cells, steps = range(self.num_cells), range(self.num_steps)
        return {
            "alpha": [
                f"cell.{i} {port}: {name}" for port in "xy" for i in cells for name in self._candidates(i)
            ],
            "beta": [
                f"cell.{i} step {m} {operand}: {state}"
                for i in cells
                for operand in ("first", "second")
                for m in steps
                for state in self._states(m)
            ],
            "gamma": self._op_names(),
        }

    def operands(
        self,
    ) -> tuple[Tensor, Tensor, Callable[[int, int, Sequence[Tensor]], tuple[Tensor, Tensor]]]:
        mixtures = self._mixtures(sampled=True) if self._pinned is None else self._pinned
        alpha, beta = mixtures["alpha"], mixtures["beta"]
        n = len(self.features)
        by_cell = [alpha[:, edges] for edges in self.edges]
        feature_weights = torch.cat([a[:, :n] for a in by_cell])  # (2N, n): x and y of cell 0, of cell 1, ...
        cell_weights = torch.cat(
            [nn.functional.pad(a[:, n:], (0, self.num_cells - i)) for i, a in enumerate(by_cell)]
        )

        def step_operands(i: int, m: int, states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            b = beta[i, :, self.inner[m]]  # (2, 2 + m)
            first, second = (weighted_sum(row, states) for row in b)
            return first, second

        return feature_weights, cell_weights, step_operands

    def cell_inputs(self, i: int, sources: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return sources[0], sources[1]

    def derive(self) -> Derived:
        with torch.no_grad():
            mixing = self.mixing()
        alpha = [mixing["alpha"][:, edges] for edges in self.edges]
        beta = [[cell[:, inner] for inner in self.inner] for cell in mixing["beta"]]
        return derive(alpha, beta, mixing["gamma"], self.features, self.ops, self.head_cells, self.rule)


def masked(feature: Tensor, present: dict[str, Tensor] | None, modality: str) -> Tensor:
    """The feature with the samples that miss its modality set to zero, the mean of standardised features."""
    if present is None or modality not in present:
        return feature
    return feature * present[modality].view(-1, 1, 1).to(feature.dtype)

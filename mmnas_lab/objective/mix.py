"""A weighted sum of objectives, with weights of its own in each half-step of a bilevel search."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from mmnas_lab.objective.base import Half, Objective, Run, union
from mmnas_lab.types import Batch, InputError, Inputs, Losses, Output


class Term:
    """One objective of a mix.

    Args:
        objective: with its head.
        arch: its weight in the architecture half-step; 0 leaves it out there.
        weights: its weight in the half-step of the weights, and in plain training. With 0 the network learns
            nothing from it, but its own head still does, on the network's output as it is: without that it
            would judge architectures by a random head.
    """

    def __init__(self, objective: Objective, arch: float = 1.0, weights: float = 1.0) -> None:
        self.objective, self.arch, self.weights = objective, arch, weights


class Mix(Objective):
    """The weighted sum of objectives; each one's parts are logged as `<term>_<part>`.

    A batch has what the terms need together: two views if one of them reads two, labels if one reads labels.
    A view that several terms read goes through the network once.

    `evaluate` gives each term's quantities as `<term>_<quantity>`, `loss`, their losses weighted as in the
    architecture half-step, by which a search compares architectures, and `weights_loss`, weighted as in the
    other. A network's state is selected by the metric of the first term with labels that the weights learn
    from, else by `weights_loss`.

    Args:
        terms: by the name under which each is logged.

    Raises:
        InputError: a negative weight, or a half-step in which no term counts.
    """

    def __init__(self, **terms: Term) -> None:
        super().__init__()
        for name, term in terms.items():
            if term.arch < 0 or term.weights < 0:
                raise InputError(
                    f"objective.{name}: weights must not be negative, got arch={term.arch:g} and "
                    f"weights={term.weights:g}"
                )
        for half in ("arch", "weights"):
            if not any(getattr(term, half) > 0 for term in terms.values()):
                raise InputError(
                    f"objective: no term of the mix counts in the half-step '{half}'; set "
                    f"objective.<term>.{half} above 0 for one of: {', '.join(terms) or 'no terms'}"
                )
        self.objectives = nn.ModuleDict({name: term.objective for name, term in terms.items()})
        self.terms = terms
        self.needs = union(term.objective.needs for term in terms.values())
        self.shows = any(term.objective.shows for term in terms.values())
        self.selects: tuple[str, Literal["min", "max"]] = ("weights_loss", "min")
        for name, term in reversed(terms.items()):
            if term.objective.needs.labels and term.weights > 0:
                quantity, direction = term.objective.selects
                self.selects = (f"{name}_{quantity}", direction)

    def forward(self, run: Run, batch: Batch, half: Half = "weights") -> Losses:
        shared = _Once(run, batch)
        losses: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        # Those that the network learns from come first, so that the others find its outputs computed.
        for name, term in sorted(self.terms.items(), key=lambda item: getattr(item[1], half) == 0):
            weight = getattr(term, half)
            if weight == 0 and half == "arch":
                continue
            total, own = term.objective(shared if weight else shared.detached, batch, half)
            if weight == 0:  # a filled input reaches no loss here, and DDP wants every parameter to reach one
                total = total + 0 * sum(parameter.sum() for parameter in term.objective.parameters())
            losses.append(weight * total if weight else total)
            parts |= {f"{name}_{part}": value for part, value in own.items()}
            parts["loss"] = parts.get("loss", 0) + weight * total.detach()
        return Losses(torch.stack(losses).sum(), parts)

    def at_epoch(self, epoch: int, epochs: int) -> None:
        for term in self.terms.values():
            term.objective.at_epoch(epoch, epochs)

    def evaluate(self, run: Run, batches: Iterable[Batch]) -> dict[str, float]:
        """Quantities of all terms; `batches` is gone through once a term."""
        values: dict[str, float] = {"loss": 0.0, "weights_loss": 0.0}
        for name, term in self.terms.items():
            own = term.objective.evaluate(run, batches)
            values["loss"] += term.arch * own["loss"]
            values["weights_loss"] += term.weights * own["loss"]
            values |= {f"{name}_{quantity}": value for quantity, value in own.items()}
        return values

    def snapshot(self, run: Run, batch: Batch) -> dict[str, Tensor]:
        """What the terms show, together."""
        shown = (term.objective.snapshot(run, batch) for term in self.terms.values())
        return {name: tensor for one in shown for name, tensor in one.items()}


class _Once:
    """The network, run once on each view of a batch however many terms read it."""

    def __init__(self, run: Run, batch: Batch) -> None:
        self.run, self.views = run, batch.views
        self.outputs: dict[int, Output] = {}

    def __call__(self, inputs: Inputs) -> Output:
        number = self._number(inputs)
        if number is None:
            return self.run(inputs)
        if number not in self.outputs:
            self.outputs[number] = self.run(inputs)
        return self.outputs[number]

    def detached(self, inputs: Inputs) -> Output:
        """The output as a constant: nothing of the network learns from it."""
        number = self._number(inputs)
        if number is not None and number in self.outputs:
            output = self.outputs[number]
        else:
            with torch.no_grad():
                output = self.run(inputs)
        return Output(output.embedding.detach(), {name: tap.detach() for name, tap in output.taps.items()})

    def _number(self, inputs: Inputs) -> int | None:
        return next((k for k, view in enumerate(self.views) if view is inputs), None)

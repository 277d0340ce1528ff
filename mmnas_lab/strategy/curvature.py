"""The curvature of the validation loss in the architecture, and when it says that a search should stop.

RobustDARTS (arXiv 1909.09656): cells found where the dominant eigenvalue of the Hessian has grown lose much
of their accuracy when they are made discrete.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import nn
from torch.func import functional_call

from mmnas_lab import distributed
from mmnas_lab.objective.base import Scored
from mmnas_lab.search_space.base import held_weights
from mmnas_lab.types import Batch, InputError

SMALL = 8
"""Up to so many logits the whole Hessian is formed; Lanczos iteration needs more than a few dimensions."""


def dominant_eigenvalue(
    scored: Scored, arch: list[nn.Parameter], batch: Batch, weight_decay: float = 0.0
) -> float:
    """The largest eigenvalue of the Hessian of the architecture's loss with respect to the logits.

    Found by Lanczos iteration (ARPACK) on products of the Hessian with vectors, averaged over the ranks. The
    products differentiate twice, so the kinks of ReLU and max-pooling count as flat, as in the released code.
    Neither weights nor BatchNorm's statistics change, nor what is drawn after.

    Args:
        scored: network, objective and regularisers, in the mode in which the Hessian is meant.
        arch: the logits.
        batch: of the architecture half.
        weight_decay: of the architecture's optimizer, added to the diagonal as released.
    """
    buffers = {name: buffer.clone() for name, buffer in scored.named_buffers()}
    with torch.random.fork_rng():
        loss = functional_call(scored, held_weights(scored, arch), (batch, "arch")).total
        gradients = torch.autograd.grad(loss, arch, create_graph=True, allow_unused=True)
        gradient = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for g, p in zip(gradients, arch, strict=True)
            ]
        )
        size = gradient.numel()

        def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
            direction = torch.from_numpy(np.asarray(vector).ravel()).to(gradient)
            columns = torch.autograd.grad(
                gradient, arch, direction, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            (whole,) = distributed.mean_over_ranks([torch.cat([column.flatten() for column in columns])])
            return whole.double().cpu().numpy()

        value = _largest(LinearOperator((size, size), matvec=product, dtype=np.float64))
    with torch.no_grad():
        for name, buffer in scored.named_buffers():
            buffer.copy_(buffers[name])
    return value + weight_decay


def _largest(operator: LinearOperator) -> float:
    size = operator.shape[0]
    if size <= SMALL:
        return float(np.linalg.eigvalsh(operator @ np.eye(size))[-1])
    start = np.random.default_rng(0).standard_normal(size)  # ARPACK's own start differs from call to call
    try:
        (value,) = eigsh(operator, k=1, which="LA", v0=start, tol=1e-4, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        return float(error.eigenvalues[-1]) if len(error.eigenvalues) else math.nan
    return float(value)


@dataclass(frozen=True)
class Stop:
    """The end of a search by its curvature: the epoch whose genotype is taken, and the growth seen."""

    epoch: int
    growth: float


class CurvatureStop:
    """RobustDARTS' early stopping (DARTS-ES), with the values of its released code.

    Every so many epochs the dominant eigenvalue is measured, and smoothed by a centred average. When the
    newest average is more than `factor` times that of `delta` measurements before, the search has gone too
    far, and the genotype of that earlier measurement is the result.

    Args:
        every: epochs between two measurements.
        window: measurements in an average; odd.
        delta: measurements between the two averages that are compared.
        factor: least growth that stops, above 1 (the paper prints its inverse, 0.75); null never stops, so
            that the eigenvalue is only logged.
        start_epoch: no genotype of an epoch before this one is taken.

    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        every: int = 2,
        window: int = 5,
        delta: int = 4,
        factor: float | None = 1.3,
        start_epoch: int = 10,
    ) -> None:
        for name, value in (("every", every), ("window", window), ("delta", delta)):
            if value < 1:
                raise InputError(f"strategy.early_stop.{name} must be at least 1, got {value}")
        if window % 2 == 0:
            raise InputError(
                f"strategy.early_stop.window must be odd, since the average is centred, got {window}"
            )
        if factor is not None and factor <= 1:
            raise InputError(
                f"strategy.early_stop.factor must be above 1, got {factor:g}: it is the growth that stops; "
                "null never stops"
            )
        if start_epoch < 0:
            raise InputError(f"strategy.early_stop.start_epoch must be at least 0, got {start_epoch}")
        self.every, self.window, self.delta = every, window, delta
        self.factor, self.start_epoch = factor, start_epoch

    def measures(self, epoch: int) -> bool:
        """Whether the eigenvalue is measured after this epoch, counted from 0."""
        return epoch % self.every == 0

    def decide(self, values: list[float], first_epoch: int = 0) -> Stop | None:
        """What the measurements of epochs 0, `every`, 2 `every`, ... so far say; None goes on.

        Args:
            values: the measurements.
            first_epoch: in which the architecture moved first; no genotype of an earlier one is taken.
        """
        half = self.window // 2
        now = len(values) - 1 - half  # the last measurement whose average is centred and whole
        before = now - self.delta
        if self.factor is None or before < 0 or before * self.every < max(self.start_epoch, first_epoch):
            return None
        if (reference := self._average(values, before)) <= 0:
            return None
        growth = self._average(values, now) / reference
        return Stop(before * self.every, growth) if growth > self.factor else None

    def _average(self, values: list[float], centre: int) -> float:
        """Mean around a measurement, over the fewer that there are near the start."""
        half = self.window // 2
        part = values[max(centre - half, 0) : centre + half + 1]
        return sum(part) / len(part)

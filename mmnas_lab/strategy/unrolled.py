"""The gradient of the architecture through one virtual step of the weights (DARTS, 1806.09055, eq. 5-8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmnas_lab.objective.base import Scored
from mmnas_lab.randomness import reseed
from mmnas_lab.types import Batch, Losses

Order = Literal["first", "second_released", "second_exact"]
RADIUS = 0.01
"""Length of the step of the finite difference over the norm of its direction, as released."""


@dataclass(frozen=True)
class VirtualStep:
    """What w' = w - lr (momentum * buffer + gradient + weight_decay * w) is made with.

    Attributes:
        lr: the weight optimizer's present rate.
        momentum: of SGD; 0 for other optimizers, whose step is taken for one of plain gradient descent.
        weight_decay: of the weight optimizer.
        buffers: momentum buffers by parameter name; empty before the first step.
    """

    lr: float
    momentum: float
    weight_decay: float
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> VirtualStep:
        """The step that an optimizer of these parameters would make."""
        group = optimizer.param_groups[0]
        states = ((name, optimizer.state.get(parameter, {})) for parameter, name in names.items())
        buffers = {
            name: state["momentum_buffer"]
            for name, state in states
            if state.get("momentum_buffer") is not None
        }
        return cls(group["lr"], group.get("momentum", 0.0), group["weight_decay"], buffers)

    def moved(self, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights after the step, differentiable in the gradients."""
        moved = {}
        for name, weight in weights.items():
            direction = gradients[name] + self.weight_decay * weight.detach()
            if name in self.buffers:
                direction = direction + self.momentum * self.buffers[name]
            moved[name] = weight.detach() - self.lr * direction
        return moved


def unrolled_gradient(
    scored: Scored,
    weights: dict[str, nn.Parameter],
    arch: list[nn.Parameter],
    arch_batch: Batch,
    weight_batch: Batch,
    step: VirtualStep,
    order: Literal["second_released", "second_exact"],
) -> tuple[list[Tensor], Losses]:
    """Gradient of L_val(w'(alpha), alpha) with respect to the logits.

    `second_exact` differentiates through the virtual step. `second_released` takes the product with the mixed
    second derivative from the finite difference of two gradients at w +- RADIUS v / |v|; where activations
    cross kinks between these points it is a smoothed derivative, not the exact one. Neither changes the
    weights, nor BatchNorm's buffers.

    Args:
        scored: network and objective.
        weights: w by parameter name within `scored`.
        arch: the logits.
        arch_batch: of the architecture half.
        weight_batch: of the weight half.
        step: the virtual step.
        order: which of the two.

    Returns:
        A gradient for each of `arch`, and the losses of the architecture batch at w'.
    """
    names = list(weights)

    seed = int(torch.randint(2**62, ()))

    def losses(values: dict[str, Tensor], batch: Batch, half: str) -> Losses:
        buffers = {name: buffer.clone() for name, buffer in scored.named_buffers()}
        with torch.random.fork_rng():  # the same dropout and masks in every evaluation
            reseed(seed)
            found: Losses = functional_call(scored, {**values, **buffers}, (batch, half))
        return found

    exact = order == "second_exact"
    train_loss = losses(dict(weights), weight_batch, "weights").total
    gradients = torch.autograd.grad(
        train_loss, [weights[name] for name in names], create_graph=exact, allow_unused=True
    )
    filled = {
        name: torch.zeros_like(weights[name]) if gradient is None else gradient
        for name, gradient in zip(names, gradients, strict=True)
    }
    moved = step.moved(dict(weights), filled)
    if exact:
        found = losses(moved, arch_batch, "arch")
        return _filled(torch.autograd.grad(found.total, arch, allow_unused=True), arch), found

    moved = {name: value.detach().requires_grad_() for name, value in moved.items()}
    found = losses(moved, arch_batch, "arch")
    both: Any = torch.autograd.grad(found.total, [*arch, *moved.values()], allow_unused=True)
    direct = _filled(both[: len(arch)], arch)
    direction = _filled(both[len(arch) :], list(moved.values()))
    epsilon = RADIUS / torch.sqrt(sum((v.square().sum() for v in direction), torch.zeros(())))

    def shifted(sign: float) -> list[Tensor]:
        values = {
            name: weights[name].detach() + sign * epsilon * v
            for name, v in zip(names, direction, strict=True)
        }
        loss = losses(values, weight_batch, "weights").total
        return _filled(torch.autograd.grad(loss, arch, allow_unused=True), arch)

    pairs = zip(direct, shifted(1.0), shifted(-1.0), strict=True)
    return [own - step.lr * (plus - minus) / (2 * epsilon) for own, plus, minus in pairs], found


def _filled(gradients: Any, like: list[Any]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, like, strict=True)]

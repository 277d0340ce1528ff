"""The few collective operations that the stages need; on one process each of them does nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_module(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.detach(), src=0)


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank the buffers (BatchNorm statistics) of rank 0."""
    if world_size() > 1:
        for tensor in module.buffers():
            dist.broadcast(tensor, src=0)


def mean_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor's mean over the ranks, bit-identical on all of them; one collective for all tensors."""
    if world_size() == 1 or not tensors:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / world_size()).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class _Gather(torch.autograd.Function):
    """All ranks' rows; backward sums the gradients that all ranks have for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        local = local.contiguous()
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient).chunk(world_size())[rank()]  # itself differentiable


def gather_with_grad(local: Tensor) -> Tensor:
    """(B, D) of each rank to (W B, D) in rank order; gradients flow back to the rank that a row came from."""
    return _Gather.apply(local) if world_size() > 1 else local


class _Sum(torch.autograd.Function):
    """The sum over ranks; backward sums the gradients that all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def sum_with_grad(local: Tensor) -> Tensor:
    """Sum over the ranks of tensors of one shape; gradients flow back to all of them."""
    return _Sum.apply(local) if world_size() > 1 else local


def gather_rows(local: Tensor, total: int) -> Tensor:
    """All `total` rows in order, of which rank r holds rows r, r + W, ...; carries no gradient."""
    if world_size() == 1:
        return local
    per_rank = -(-total // world_size())
    padded = local.new_zeros(per_rank, *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:total]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values

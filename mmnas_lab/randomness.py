"""Random numbers by address: one (seed, stage, epoch, step) gives one draw, whatever came before."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*address: int | str) -> int:
    """A 63-bit seed for an address such as `(seed, "search", epoch, step)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in address)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*address: int | str) -> torch.Generator:
    """A CPU generator seeded for an address."""
    return torch.Generator().manual_seed(seed_of(*address))


def reseed(seed: int) -> None:
    """Seed torch's global generators, of the CPU and of CUDA devices in use, as `torch.manual_seed` does.

    Cheap enough for every step: for devices not in use, `torch.manual_seed` formats and keeps a stack
    trace each, which takes 3 ms on a CPU and grows with every call.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)

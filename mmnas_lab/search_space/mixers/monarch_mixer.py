"""Monarch Mixer (arXiv 2310.12109): Monarch matrices across tokens and across channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmnas_lab.search_space.mixers.encoder import Encoder, Protocol, Stem, at_least_one


class MonarchMatrix(nn.Module):
    """P R P L P on the last dimension of size S^2: L and R have S blocks of S x S on the diagonal.

    P turns an index (i, j) into (j, i). 2 S^3 parameters for S^4 entries.

    Args:
        side: S.
        std: of the initial blocks; null for S^(-1/2), which keeps the variance of what is multiplied.
    """

    def __init__(self, side: int, std: float | None = None) -> None:
        super().__init__()
        std = side**-0.5 if std is None else std
        self.left = nn.Parameter(std * torch.randn(side, side, side))
        self.right = nn.Parameter(std * torch.randn(side, side, side))

    def forward(self, x: Tensor) -> Tensor:
        """(..., S^2) to the same shape."""
        side = len(self.left)
        x = x.unflatten(-1, (side, side))
        x = torch.einsum("bnm,...mb->...nb", self.left, x)
        return torch.einsum("bnm,...bm->...nb", self.right, x).flatten(-2)


class MonarchBlock(nn.Module):
    """Gated Monarch matrices across tokens, then across channels, each on a residual with LayerNorm first.

    Across tokens M2 (K * M1 X), across channels M4 relu(k * M3 X), with gates K and k that start at 1. Sizes
    that are no square are filled up with zeros.

    Args:
        count: N.
        width: D.
        dropout: on both branches.
    """

    def __init__(self, count: int, width: int, dropout: float) -> None:
        super().__init__()
        token_side, channel_side = (math.isqrt(size - 1) + 1 for size in (count, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.m1, self.m2 = MonarchMatrix(token_side), MonarchMatrix(token_side)
        self.m3, self.m4 = MonarchMatrix(channel_side), MonarchMatrix(channel_side)
        self.token_gate = nn.Parameter(torch.ones(width, token_side**2))
        self.channel_gate = nn.Parameter(torch.ones(channel_side**2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = self.norm1(x) if mask is None else self.norm1(x) * mask[..., None]
        x = x + self.dropout(self.across_tokens(tokens))
        return x + self.dropout(self.across_channels(self.norm2(x)))

    def across_tokens(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same shape."""
        padded = F.pad(x.transpose(1, 2), (0, self.token_gate.shape[1] - x.shape[1]))
        return self.m2(self.token_gate * self.m1(padded))[..., : x.shape[1]].transpose(1, 2)

    def across_channels(self, x: Tensor) -> Tensor:
        """(B, N, D) to the same shape."""
        padded = F.pad(x, (0, len(self.channel_gate) - x.shape[2]))
        return self.m4(F.relu(self.channel_gate * self.m3(padded)))[..., : x.shape[2]]


class ReleasedMonarchBlock(nn.Module):
    """The layer of MixMAS' released code: LN(Y + X~), with no residual from its input X.

    X~ is X mixed across tokens, Y is X~ mixed across channels; everything starts from N(0, 1), so Y is
    hundreds of times X~.

    Args:
        token_side: square root of N.
        channel_side: square root of D.
    """

    def __init__(self, token_side: int, channel_side: int) -> None:
        super().__init__()
        self.m1, self.m2 = MonarchMatrix(token_side, 1.0), MonarchMatrix(token_side, 1.0)
        self.m3, self.m4 = MonarchMatrix(channel_side, 1.0), MonarchMatrix(channel_side, 1.0)
        self.token_gate = nn.Parameter(torch.randn(channel_side**2, token_side**2))
        self.channel_gate = nn.Parameter(torch.randn(channel_side**2))
        self.norm = nn.LayerNorm(channel_side**2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.m2(self.token_gate * self.m1(x.transpose(1, 2))).transpose(1, 2)
        return self.norm(self.m4(F.relu(self.channel_gate * self.m3(mixed))) + mixed)


class MonarchMixer(Encoder):
    """Tokens, Monarch blocks, LayerNorm.

    The released code of MixMAS has no LayerNorm at the end and no dropout, and cuts tokens and channels down
    to the next square.

    Args:
        shape: of one sample.
        kind: of the input.
        width: D.
        num_blocks: blocks.
        patch: see `Stem`.
        dropout: on each branch of a block.
        protocol: of the wiring.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: str,
        width: int,
        num_blocks: int = 4,
        patch: int | list[int] | None = None,
        dropout: float = 0.0,
        protocol: Protocol = "intended",
    ) -> None:
        super().__init__()
        at_least_one(width=width, num_blocks=num_blocks)
        self.stem = Stem(shape, kind, width, patch)
        self.released = protocol == "released_code"
        self.size = (self.stem.count, width)
        self.blocks: nn.ModuleList
        self.norm: nn.Module
        if self.released:
            sides = math.isqrt(self.stem.count), math.isqrt(width)
            self.size = (sides[0] ** 2, sides[1] ** 2)
            self.blocks = nn.ModuleList(ReleasedMonarchBlock(*sides) for _ in range(num_blocks))
            self.norm = nn.Identity()
        else:
            self.blocks = nn.ModuleList(MonarchBlock(*self.size, dropout) for _ in range(num_blocks))
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        if self.released:
            x = x if mask is None else x * mask[..., None]
            x = x[:, : self.size[0], : self.size[1]]
            for block in self.blocks:
                x = block(x)
        else:
            for block in self.blocks:
                x = block(x, mask)
        return self.norm(x)

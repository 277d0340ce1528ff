"""HyperMixer (Mai et al., arXiv 2203.03691): an MLP across tokens whose weights are made from the tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from mmnas_lab.search_space.mixers.encoder import Encoder, Protocol, Stem, at_least_one
from mmnas_lab.types import InputError


def position_encoding(length: int, width: int) -> Tensor:
    """(N, D) sines in even and cosines in odd columns, positions counted from 1.

    Column i has the frequency 10000^(-2i/D): the exponent counts columns, not pairs of them, as in the
    HyperMixing of the paper's authors.
    """
    column = torch.arange(width, dtype=torch.float64)
    position = torch.arange(1, length + 1, dtype=torch.float64)
    angle = position[:, None] / 10000 ** (2 * column / width)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


class HyperMixing(nn.Module):
    """Mixing across any number of tokens: Y = LN(W2 GELU(W1^T X)), (B, N, D) to the same shape.

    W1 and W2 (N, K) have a row a token, GELU(P A^T) B^T of P = sqrt(D) X + positions, and A and B of their
    own. Each head mixes D / heads features with K / heads of the hidden width.

    Args:
        width: D.
        hidden: K.
        num_heads: divides D and K.
        length: tokens for which positions are made in advance.

    Raises:
        InputError: heads that do not divide D and K.
    """

    positions: Tensor

    def __init__(self, width: int, hidden: int, num_heads: int = 1, length: int = 1) -> None:
        super().__init__()
        at_least_one(width=width, hidden=hidden, num_heads=num_heads)
        if width % num_heads or hidden % num_heads:
            raise InputError(
                f"HyperMixing of width {width} and hidden width {hidden} has no {num_heads} heads; set "
                "num_heads to a divisor of both"
            )
        self.width, self.num_heads = width, num_heads
        features = width // num_heads
        for name, rows in (("a1", features), ("b1", hidden // num_heads)):
            for which in (name, name.replace("1", "2")):
                weight = torch.empty(num_heads, rows, features)
                for head in weight:  # torch's own would count heads as part of the fans
                    nn.init.xavier_uniform_(head, gain=math.sqrt(2.0))
                self.register_parameter(which, nn.Parameter(weight))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("positions", position_encoding(length, width), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D); tokens where `mask` (B, N) is false are mixed into no other."""
        count = x.shape[1]
        positions = self.positions[:count]
        if len(positions) < count:
            positions = position_encoding(count, self.width).to(x.device)
        tokens = self._by_head(x * math.sqrt(self.width) + positions.to(x.dtype))
        w1, w2 = (self._generate(tokens, which) for which in "12")  # (B, H, N, K/H)
        if mask is not None:
            w1 = w1 * mask[:, None, :, None]
        hidden = F.gelu(w1.transpose(-2, -1) @ self._by_head(x))
        return self.norm((w2 @ hidden).transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, N, D) as (B, H, N, D/H)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _generate(self, tokens: Tensor, which: str) -> Tensor:
        a, b = self.get_parameter(f"a{which}"), self.get_parameter(f"b{which}")
        return F.gelu(tokens @ a.transpose(-2, -1)) @ b.transpose(-2, -1)


class HyperMixerBlock(nn.Module):
    """X + HyperMixing(LN X), then X + MLP(LN X)."""

    def __init__(
        self, count: int, width: int, hidden: int, channel_hidden: int, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixing = HyperMixing(width, hidden, num_heads, count)
        self.channels = Mlp(width, channel_hidden, drop=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.mixing(self.norm1(x), mask)
        return x + self.channels(self.norm2(x))


class ReleasedHyperMixerBlock(nn.Module):
    """The block of MixMAS' released code: channels are mixed in the place of tokens, K = D.

    The second residual is the block's input, so what was mixed passes through the MLP alone.
    """

    def __init__(self, count: int, width: int, channel_hidden: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixing = HyperMixing(count, width, num_heads, width)
        self.channels = Mlp(width, channel_hidden, drop=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.norm1(x) if mask is None else self.norm1(x) * mask[..., None]
        mixed = x + self.mixing(normed.transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(mixed))


class HyperMixer(Encoder):
    """Tokens, HyperMixer blocks, LayerNorm. With intended wiring it reads any number of tokens.

    Args:
        shape: of one sample.
        kind: of the input.
        width: D.
        token_hidden: K, hidden width of the made MLP; the released code has D.
        channel_hidden: hidden width of the MLP across channels.
        num_blocks: blocks.
        num_heads: of HyperMixing; divides D and K, in the released code D and the number of tokens.
        patch: see `Stem`.
        dropout: in the MLP across channels.
        protocol: of the wiring.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: str,
        width: int,
        token_hidden: int = 32,
        channel_hidden: int = 3072,
        num_blocks: int = 4,
        num_heads: int = 1,
        patch: int | list[int] | None = None,
        dropout: float = 0.0,
        protocol: Protocol = "intended",
    ) -> None:
        super().__init__()
        at_least_one(width=width, channel_hidden=channel_hidden, num_blocks=num_blocks)
        self.stem = Stem(shape, kind, width, patch)
        count = self.stem.count
        self.blocks = nn.ModuleList(
            HyperMixerBlock(count, width, token_hidden, channel_hidden, num_heads, dropout)
            if protocol == "intended"
            else ReleasedHyperMixerBlock(count, width, channel_hidden, num_heads, dropout)
            for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.size = (count, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

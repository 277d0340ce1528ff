"""MLP-Mixer (arXiv 2105.01601): one MLP across tokens, one across channels."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.mlp_mixer import MixerBlock
from torch import Tensor, nn

from mmnas_lab.search_space.mixers.encoder import SEQUENCES, Encoder, Protocol, Stem, at_least_one


class MLPMixer(Encoder):
    """Tokens, timm's mixer blocks, LayerNorm.

    In the released code of MixMAS the blocks of sequences have `channel_hidden` as the hidden width across
    tokens and 1 across channels.

    Args:
        shape: of one sample.
        kind: of the input.
        width: D.
        token_hidden: hidden width of the MLP across tokens.
        channel_hidden: hidden width of the MLP across channels.
        num_blocks: mixer blocks.
        patch: see `Stem`.
        dropout: in both MLPs.
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
        patch: int | list[int] | None = None,
        dropout: float = 0.0,
        protocol: Protocol = "intended",
    ) -> None:
        super().__init__()
        at_least_one(
            width=width, token_hidden=token_hidden, channel_hidden=channel_hidden, num_blocks=num_blocks
        )
        self.stem = Stem(shape, kind, width, patch)
        if protocol == "released_code" and kind in SEQUENCES:
            token_hidden, channel_hidden = channel_hidden, 1
        # timm takes hidden widths as ratios to D and rounds their product down.
        ratios = ((token_hidden + 0.5) / width, (channel_hidden + 0.5) / width)
        norm: Any = partial(nn.LayerNorm, eps=1e-5)
        self.blocks = nn.ModuleList(
            MixerBlock(width, self.stem.count, ratios, norm_layer=norm, drop=dropout)
            for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.size = (self.stem.count, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if mask is None else _masked(block, x, mask)
        return self.norm(x)


def _masked(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    """A mixer block whose MLP across tokens reads zeros in the place of masked ones."""
    tokens = (block.norm1(x) * mask[..., None]).transpose(1, 2)
    x = x + block.mlp_tokens(tokens).transpose(1, 2)
    return x + block.mlp_channels(block.norm2(x))

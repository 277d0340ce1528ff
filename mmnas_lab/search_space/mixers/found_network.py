"""The network of one genotype: an encoder a modality, their fusion, and a network on the fused tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmnas_lab.search_space.base import Network
from mmnas_lab.search_space.mixers.encoder import FUSED, SEQUENCES
from mmnas_lab.search_space.mixers.fusion_function import fusion_function
from mmnas_lab.search_space.mixers.genotype import MixerGenotype
from mmnas_lab.types import InputInfo, InputInfos, Inputs, Output, OutputInfo

if TYPE_CHECKING:
    from mmnas_lab.search_space.mixers.space import MixerSpace

PRESENT = "present."
"""Before a modality's name: the input (B,) that marks the samples that have it."""


class MixerNetwork(Network):
    """Encoders, fusion function, fusion network; the embedding is the mean over the tokens that exist.

    The taps are the means over each modality's tokens, by its name, zeros where a sample lacks it. A network
    without fusion has no taps; in the released code its embedding of a sequence is the mean over features.

    Args:
        space: the settings.
        genotype: names of the parts.
        inputs: what is known of each input.
        dropout: overrides the space's and the candidates' own.
    """

    def __init__(
        self,
        space: MixerSpace,
        genotype: MixerGenotype,
        inputs: InputInfos,
        dropout: float | None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        sizes: list[tuple[int, int]] = []
        for modality, name in genotype.encoders:
            encoder = space.encoder(name, inputs[modality], dropout)
            self.encoders[modality] = encoder
            sizes.append(encoder.size)
        self.function: nn.Module | None = None
        self.over_features = False
        if genotype.fusion_function is None or genotype.fusion_network is None:
            kind = inputs[genotype.encoders[0][0]].kind
            self.over_features = space.protocol == "released_code" and kind in SEQUENCES
            count, width = sizes[0]
            self.info = OutputInfo(count if self.over_features else width)
            return
        width = space.fusion_width or max(own for _, own in sizes)
        function = fusion_function(genotype.fusion_function, sizes, width, space.protocol)
        self.function = function
        self.fusion = space.fusion_network(
            genotype.fusion_network, InputInfo(function.size, FUSED, FUSED), dropout
        )
        taps: dict[str, tuple[int, ...]] = {
            modality: (own,) for modality, (_, own) in zip(genotype.features, sizes, strict=True)
        }
        self.info = OutputInfo(self.fusion.size[1], taps)

    def forward(self, inputs: Inputs, present: dict[str, Tensor] | None = None) -> Output:
        present = {
            name.removeprefix(PRESENT): mark for name, mark in inputs.items() if name.startswith(PRESENT)
        } | (present or {})
        present = {name: mark.bool() for name, mark in present.items() if name in self.encoders}
        tokens = {}
        for modality, encoder in self.encoders.items():
            x = inputs[modality]
            if modality in present:
                x = x.masked_fill(~present[modality].view(-1, *[1] * (x.ndim - 1)), 0.0)
            tokens[modality] = encoder(x)
        means = {modality: own.mean(2 if self.over_features else 1) for modality, own in tokens.items()}
        means = {
            modality: mean * present[modality][:, None] if modality in present else mean
            for modality, mean in means.items()
        }
        if self.function is None:
            (embedding,) = means.values()
            return Output(embedding, {})
        marks = None
        if present:
            every = torch.ones_like(next(iter(present.values())))
            marks = torch.stack([present.get(modality, every) for modality in tokens], 1)  # (B, M)
        fused, mask = self.function(list(tokens.values()), marks)
        fused = self.fusion(fused, mask)
        if mask is None or mask.shape[1] != fused.shape[1]:
            return Output(fused.mean(1), means)
        embedding = (fused * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return Output(embedding, means)

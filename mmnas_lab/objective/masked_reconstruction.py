"""Reconstruction of what a mask hides (MAE, arXiv 2111.06377), as MAE-NAS (2311.12086) searches by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmnas_lab.objective.base import Half, Needs, Objective, Run, evaluation_means
from mmnas_lab.objective.decoder import FeatureDecoder, ImageDecoder, Kind
from mmnas_lab.objective.masking import (
    Fill,
    Unit,
    Units,
    draw_masks,
    draw_noise,
    masked_count,
    normalised,
    visible_mean,
)
from mmnas_lab.randomness import generator
from mmnas_lab.types import Batch, InputError, InputInfos, Inputs, Losses, OutputInfo


class Reconstruction(NamedTuple):
    """What a picture shows: the inputs, what the network saw of them, and what the decoder made of that.

    Each holds (B, *shape) by name; `output` is in the units of the input, visible parts included.
    """

    input: Inputs
    masked: Inputs
    output: Inputs


class MaskedReconstruction(Objective):
    """Hide units of the inputs, and reconstruct them from what the network makes of the rest.

    The units of all inputs are drawn from together, the same number in each sample, anew in each step and for
    each sample: for an image they are patches of pixels; for pooled features they are positions, channels or
    whole features of all modalities, so that one modality is reconstructed from another. A CNN cannot leave
    patches out, so the network sees the full grid with the masked units filled.

    The loss is the mean over a unit's values of the squared error, averaged over the masked units of the
    batch. Since each sample has as many, the mean over ranks is that of the whole batch.

    Args:
        output: of the network.
        inputs: what the network reads and the decoder gives: images (C, H, W), or features (C_i, L_i) or
            (F,).
        mask_ratio: share of the units that is hidden, between 0 and 1.
        unit: what is hidden as a whole, see `masking.Units`.
        patch: side of a patch in pixels, or its positions in a pooled feature; must divide the input.
        fill: what stands in masked units: `zero`, the mean of standardised inputs; `mean`, that of the
            visible values of the channel in the sample; `learned`, a value a channel that belongs to the
            weights; `noise`, standard normal values.
        decoder: `hierarchical` reads all levels of the network, `plain` the last alone.
        width: of the decoder.
        loss_on: `masked` units, or `all` of them.
        normalise_patches: compare with each unit standardised by its own values (MAE's norm_pix).

    Raises:
        InputError: a ratio of 0 or 1, or one that hides nothing or everything of so few units; a patch size
            that does not divide an input; inputs or taps that cannot be decoded.
    """

    needs = Needs(views=1, labels=False)
    shows = True
    selects = ("loss", "min")

    def __init__(
        self,
        output: OutputInfo,
        inputs: InputInfos,
        mask_ratio: float = 0.5,
        unit: Unit = "patch",
        patch: int = 4,
        fill: Fill = "zero",
        decoder: Kind = "hierarchical",
        width: int = 64,
        loss_on: Literal["masked", "all"] = "masked",
        normalise_patches: bool = False,
    ) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"objective.width must be at least 1, got {width}")
        dimensions = {len(info.shape) for info in inputs.values()}
        if not inputs or (3 in dimensions and dimensions != {3}):
            shapes = {name: info.shape for name, info in inputs.items()}
            raise InputError(
                f"masked_reconstruction needs images or pooled features of known shapes, got {shapes}"
            )
        self.units = {name: Units(name, info.shape, unit, patch) for name, info in inputs.items()}
        self.counts = [units.count for units in self.units.values()]
        self.hidden = masked_count(mask_ratio, sum(self.counts), unit)
        self.fill: Fill = fill
        self.loss_on, self.normalise_patches = loss_on, normalise_patches
        if normalise_patches and any(units.size < 2 for units in self.units.values()):
            raise InputError("objective.normalise_patches needs units of two values or more; set it to false")
        build = ImageDecoder if 3 in dimensions else FeatureDecoder
        self.decoder: nn.Module = build(output, inputs, decoder, width)
        self.tokens = nn.ParameterList(
            nn.Parameter(torch.zeros(units.channels, *[1] * (len(units.shape) - 1)))
            for units in self.units.values()
            if fill == "learned"
        )

    def masks(self, inputs: Inputs, draw: torch.Generator | None = None) -> dict[str, Tensor]:
        """Fresh masks (B, U_i) by name, True where hidden; together they hide as many in each sample."""
        first = inputs[next(iter(self.units))]
        masks = draw_masks(len(first), sum(self.counts), self.hidden, first.device, draw)
        return dict(zip(self.units, masks.split(self.counts, 1), strict=True))

    def filled(self, inputs: Inputs, masks: dict[str, Tensor], draw: torch.Generator | None = None) -> Inputs:
        """The inputs as the network sees them: masked units filled."""
        given = {name: inputs[name] for name in self.units}
        values: dict[str, Tensor] = {}
        if self.fill == "learned":
            values = dict(zip(self.units, self.tokens, strict=True))
        elif self.fill == "noise":
            values = draw_noise(given, draw)
        seen: Inputs = {}
        for name, units in self.units.items():
            mask = units.expand(masks[name])
            if self.fill == "mean":
                values[name] = visible_mean(inputs[name], mask)
            fill = values.get(name, inputs[name].new_zeros(()))
            seen[name] = torch.where(mask, fill.to(inputs[name].dtype), inputs[name])
        return {**inputs, **seen}

    def loss(self, inputs: Inputs, masks: dict[str, Tensor], output: Inputs) -> Tensor:
        """() loss of a decoder's output (B, *shape) by name against the unmasked inputs."""
        errors = []
        for name, units in self.units.items():
            truth = units.split(inputs[name])
            if self.normalise_patches:
                truth = normalised(truth)[0]
            errors.append((units.split(output[name]) - truth).square().mean(-1))
        error, mask = torch.cat(errors, 1), torch.cat(list(masks.values()), 1)  # (B, U)
        return error.mean() if self.loss_on == "all" else (error * mask).sum() / mask.sum()

    @classmethod
    def unfit(cls, space: Any, settings: Mapping[str, Any]) -> str | None:
        if space.name == "mixers":
            return "masked reconstruction decodes maps and pooled features, and mixers give neither"
        patches = settings.get("unit", "patch") == "patch" and settings.get("patch", 4) > 1
        if space.length is not None and patches:
            return (
                f"objective.patch={settings.get('patch', 4)} hides patches of pictures, and search space "
                f"'{space.name}' reads pooled features"
            )
        return None

    def forward(self, run: Run, batch: Batch, half: Half = "weights") -> Losses:
        inputs = batch.views[0]
        masks = self.masks(inputs)
        loss = self.loss(inputs, masks, self.decoder(run(self.filled(inputs, masks))))
        return Losses(loss, {"loss": loss.detach()})

    @torch.no_grad()
    def evaluate(self, run: Run, batches: Iterable[Batch]) -> dict[str, float]:
        """The loss under fixed masks: equal at every call, and on any number of ranks."""

        def values() -> Iterator[tuple[tuple[Tensor], int]]:
            for batch in batches:
                inputs, draw = batch.views[0], self._fixed()
                masks = self.masks(inputs, draw)
                output = self.decoder(run(self.filled(inputs, masks, draw)))
                yield (self.loss(inputs, masks, output),), next(iter(masks.values())).shape[0]

        return evaluation_means(("loss",), values(), next(self.decoder.parameters()).device)

    @torch.no_grad()
    def reconstruct(self, run: Run, batch: Batch) -> Reconstruction:
        """A batch under fixed masks, for pictures that are comparable over a search."""
        inputs, draw = {name: batch.views[0][name] for name in self.units}, self._fixed()
        masks = self.masks(inputs, draw)
        seen = self.filled(batch.views[0], masks, draw)
        output: Inputs = self.decoder(run(seen))
        if self.normalise_patches:
            for name, units in self.units.items():
                _, mean, std = normalised(units.split(inputs[name]))
                output[name] = units.join(units.split(output[name]) * std + mean)
        return Reconstruction(inputs, {name: seen[name] for name in self.units}, output)

    def snapshot(self, run: Run, batch: Batch) -> dict[str, Tensor]:
        """Reconstructions as `<input's name>/input`, `/masked` and `/output`, each (B, *shape)."""
        shown = self.reconstruct(run, batch)._asdict()
        return {f"{name}/{kind}": values[name] for kind, values in shown.items() for name in values}

    @staticmethod
    def _fixed() -> torch.Generator:
        """The generator of a held batch's masks: the k-th sample of every batch has the same mask."""
        return generator("masked_reconstruction", "held")

"""Any image model of timm as an encoder of maps."""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor, nn

from mmnas_lab.build import near
from mmnas_lab.search_space.mixers.encoder import Encoder, ForeignEncoder, map_shape
from mmnas_lab.types import InputError


class TimmModel(Encoder):
    """The positions of a timm model's last features as tokens, class tokens included.

    Models with a fixed input size are made for the map at hand.

    Args:
        shape: (C, H, W) of one sample.
        kind: `image` or `audio`.
        model: timm's name.
        pretrained: start from timm's weights, which are downloaded where they are not in its cache.
        settings: further arguments of the model (`drop_rate`, `num_blocks`, ...).

    Raises:
        InputError: no such model, or one that cannot read the map.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: str,
        model: str,
        pretrained: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        channels, *sides = map_shape(shape, kind)
        if not timm.is_model(model):
            raise InputError(f"timm has no model '{model}'; {near(model, timm.list_models())}")
        arguments: dict[str, Any] = {"in_chans": channels, "num_classes": 0, **(settings or {})}
        config = timm.get_pretrained_cfg(model)
        if config is not None and config.fixed_input_size:
            arguments.setdefault("img_size", tuple(sides))
        try:
            module = timm.create_model(model, pretrained=pretrained, **arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise InputError(f"timm cannot make {model} for a map of shape {shape}: {error}") from error
        self.encoder = ForeignEncoder(_Features(module), shape, f"timm's {model}")
        self.size = self.encoder.size

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.encoder(x)


class _Features(nn.Module):
    """A timm model without its pooling and classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        model.reset_classifier(0, "")

    def forward(self, x: Tensor) -> Tensor:
        features = self.model.forward_features(x)
        return features.flatten(1, 2) if self.channels_last else features

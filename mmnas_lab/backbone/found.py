"""A trained network of a finished run as an encoder: cells found on pictures feed a fusion search."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from mmnas_lab.backbone.image import square_root
from mmnas_lab.backbone.pixels import Pixels
from mmnas_lab.backbone.weights import device_of, fit_state, hash_files, hash_settings, read_checkpoint
from mmnas_lab.build import build_with_facts
from mmnas_lab.search_space.base import Network
from mmnas_lab.types import InputError, InputInfo, InputInfos, Inputs

if TYPE_CHECKING:
    from PIL.Image import Image

FILES = ("config.yaml", "genotype.json", "record.json", "network.safetensors")


class FoundImage:
    """The found network of a finished run on pictures, its taps as levels and its embedding as the last one.

    Pictures are brought to the size and standardised by the statistics of that run.
    """

    fitted = False
    untrained = False

    def __init__(
        self,
        run: str,
        modality: str = "image",
        taps: list[str] | None = None,
        label_free: bool = False,
        batch_size: int = 32,
        device: str = "auto",
    ) -> None:
        """Read what the run left, but not the weights.

        Args:
            run: folder of a finished run whose search space reads pictures (`search_space=cnn_cells`).
            modality: the modality of the dataset that is read.
            taps: of the network that are the levels, from early to late; null for all `stage.<k>`.
            label_free: set it true only where the run's labelled pictures are no samples of this dataset;
                its weights were trained with labels, and nobody but you can tell.
            batch_size: pictures in one pass.
            device: `auto`, `cpu` or `cuda`.

        Raises:
            InputError: no such run, one that trained no network, or one on something else than pictures; a
                tap that the network has not.
        """
        self.folder, self.modality, self.label_free = Path(run), modality, label_free
        for name in FILES:
            if not (self.folder / name).is_file():
                raise InputError(
                    f"encoder of modality '{modality}': no '{name}' in run='{run}'; give the folder of a "
                    "finished run, the last line that it printed, with the stages search, train and test"
                )
        if batch_size < 1:
            raise InputError(
                f"encoder of modality '{modality}': batch_size must be positive, got {batch_size}"
            )
        config: dict[str, Any] = yaml.safe_load((self.folder / "config.yaml").read_text())
        self.record: dict[str, Any] = json.loads((self.folder / "record.json").read_text())
        self.space: Any = build_with_facts(config["search_space"], "search_space", {})
        pixels = config["backbone"]["_target_"].endswith(".Pixels")
        if self.space.name != "cnn_cells" or not pixels:
            raise InputError(
                f"run='{run}' searched the space '{self.space.name}' on "
                f"{config['backbone']['_target_'].rsplit('.', 1)[-1]}; only cells on backbone=pixels can be "
                "encoders of pictures"
            )
        self.size: int | None = config["backbone"].get("size")
        self.batch_size, self._device = batch_size, device
        self._loading = threading.Lock()
        self.taps = self._checked(taps)

    def _checked(self, taps: list[str] | None) -> list[str]:
        given = self._network.info.taps
        found = taps if taps is not None else sorted(name for name in given if name.startswith("stage."))
        for name in found:
            if len(given.get(name, ())) != 3:
                maps = ", ".join(tap for tap, shape in given.items() if len(shape) == 3)
                raise InputError(f"run='{self.folder}' has no map '{name}'; its maps are {maps}")
        return found

    @cached_property
    def _state(self) -> Mapping[str, Tensor]:
        return read_checkpoint(self.folder / "network.safetensors")

    @cached_property
    def _statistics(self) -> tuple[str, Tensor, Tensor]:
        """Name of the network's input, and mean and standard deviation (3, 1, 1) of its pixels."""
        names = [name.split(".")[1] for name in self._state if name.startswith("standardisation.")]
        mean, std = (self._state[f"standardisation.{names[0]}.{kind}"] for kind in ("mean", "std"))
        return names[0], mean.view(3, 1, 1), std.view(3, 1, 1)

    @cached_property
    def _network(self) -> Network:
        """The network with fresh weights, in eval mode."""
        genotype = json.loads((self.folder / "genotype.json").read_text())
        name, _, _ = self._statistics
        side = self.size or int(self.record["inputs"][name][-1])
        inputs = {name: InputInfo((3, side, side), name)}
        with torch.random.fork_rng(devices=[]):
            network: Network = self.space.build(self.space.parse(genotype, inputs), inputs)
        return network.eval()

    @cached_property
    def _loaded(self) -> Network:
        weights = {
            name.removeprefix("network."): value
            for name, value in self._state.items()
            if name.startswith("network.")
        }
        fit_state(self._network, weights, str(self.folder / "network.safetensors"))
        return self._network.to(device_of(self._device)).eval()

    def fingerprint(self) -> str:
        """Hash of the weights, of the architecture and of what is read of it."""
        files = hash_files([self.folder / name for name in ("genotype.json", "network.safetensors")])
        return hash_settings(kind="found", files=files, size=self.size, taps=self.taps)

    def load(self) -> None:
        """Load the weights. Raises InputError where they do not fit the genotype."""
        with self._loading:
            self._loaded  # noqa: B018 - made once

    def fit(self, samples: Iterable[Any]) -> None:
        """Nothing to learn."""

    def infos(self, length: int) -> InputInfos:
        """Names and shapes of the levels: maps (C_i, length), the embedding (D, 1)."""
        square_root(length)
        info = self._network.info
        shapes = [*((info.taps[tap][0], length) for tap in self.taps), (info.embedding, 1)]
        return {f"{self.modality}.{i}": InputInfo(shape, self.modality) for i, shape in enumerate(shapes)}

    def encode(self, samples: list[Image], length: int) -> Inputs:
        """Levels of pictures, (B, C_i, length) or (B, D, 1), float32 on the CPU."""
        side = square_root(length)
        self.load()
        name, mean, std = self._statistics
        pixels = Pixels(self.size)
        parts: list[list[Tensor]] = []
        for start in range(0, len(samples), self.batch_size):
            chunk = [
                pixels.sized(sample.convert("RGB")) for sample in samples[start : start + self.batch_size]
            ]
            images = (torch.from_numpy(np.stack(chunk)).float() / 255 - mean) / std
            with torch.inference_mode():
                output = self._loaded({name: images.to(device_of(self._device))})
            maps = [adaptive_max_pool2d(output.taps[tap], side).flatten(2) for tap in self.taps]
            parts.append([level.float().cpu() for level in (*maps, output.embedding[..., None])])
        levels = zip(*parts, strict=True)
        return {f"{self.modality}.{i}": torch.cat(level) for i, level in enumerate(levels)}

    def save(self, path: Path) -> None:
        """Nothing that the run's folder does not hold."""

    def restore(self, path: Path) -> None:
        """Nothing that the run's folder does not hold."""

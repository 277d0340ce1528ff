"""Small encoders of arrays, pretrained without labels: audio, series, skeletons, tables, video."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmnas_lab.backbone.image import square_root
from mmnas_lab.backbone.moments import Moments, standardised
from mmnas_lab.backbone.weights import (
    fit_state,
    hash_files,
    hash_settings,
    hash_tensors,
    resolve,
    save_state,
)
from mmnas_lab.search_space.base import Network
from mmnas_lab.types import InputError, InputInfo, InputInfos, Inputs, Output, OutputInfo

Array = np.ndarray[Any, Any]
Kind = Literal["audio", "series", "skeleton", "tabular", "video"]

AXES = {
    "audio": ("1", "F", "T"),
    "series": ("T", "F"),
    "skeleton": ("T", "J", "3"),
    "tabular": ("F",),
    "video": ("T", "H", "W"),
}
FIT_ROWS = 256


class SignalEncoder:
    """A small residual network on arrays of one kind; level i has width * 2^i channels.

    - series, skeleton: convolutions over time, the second of each level dilated; joints are channels.
    - audio: convolutions over frequency and time.
    - video: convolutions over space and then over time (R(2+1)D, Tran et al. 2018).
    - tabular: a perceptron, a layer a level.

    Samples are standardised by channel with the statistics of the training samples, which are saved with the
    weights. All but tables have one more feature, the mean of the last level's map. `encode` may be called
    from several threads at once.
    """

    label_free = True

    def __init__(
        self,
        kind: Kind,
        modality: str | None = None,
        width: int = 32,
        levels: int = 3,
        checkpoint_path: str | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        """Check the settings; no sample is read.

        Args:
            kind: of the modality.
            modality: the modality of the dataset that is read; None: named as its kind.
            width: channels of the first level.
            levels: number of levels.
            checkpoint_path: a file that `save` wrote; None: random weights, to be pretrained.
            batch_size: samples in one pass; the results depend on it by rounding only.
            seed: of the random weights.

        Raises:
            InputError: a setting that cannot be.
        """
        if kind not in AXES:
            raise InputError(f"SignalEncoder reads {', '.join(AXES)}, not kind '{kind}'")
        if min(width, levels, batch_size) < 1:
            raise InputError(
                f"SignalEncoder needs width, levels and batch_size of at least 1, got {width}, {levels} and "
                f"{batch_size}"
            )
        self.kind, self.modality = kind, modality or kind
        self.width, self.levels, self.batch_size, self.seed = width, levels, batch_size, seed
        self.checkpoint_path = checkpoint_path
        self.untrained = checkpoint_path is None
        self._network: _SignalNetwork | None = None
        self._restored = False

    @property
    def fitted(self) -> bool:
        """True as long as the training samples' shape and statistics are not known."""
        return self.untrained and self._network is None

    def fingerprint(self) -> str:
        """Hash of the weights and of every setting that changes `encode`."""
        if self._restored and self._network is not None:
            weights = hash_tensors(self._network.state_dict())
        elif self.checkpoint_path is not None:
            weights = hash_files([self._checkpoint()])
        else:
            weights = f"seed {self.seed}"
        return hash_settings(
            encoder="signal", kind=self.kind, width=self.width, levels=self.levels, weights=weights
        )

    def _checkpoint(self) -> Path:
        assert self.checkpoint_path is not None
        return resolve(self.checkpoint_path, ("*.safetensors",))

    def load(self) -> None:
        """Read the weights from `checkpoint_path`; random ones are drawn by `fit`.

        Raises:
            InputError: a file that is not there or does not fit.
        """
        if self._network is None and self.checkpoint_path is not None:
            self._read(self._checkpoint())

    @property
    def _loaded(self) -> _SignalNetwork:
        self.load()
        if self._network is None:
            raise InputError(
                f"the encoder of '{self.modality}' reads samples only after fit(training samples) or "
                "restore(path)"
            )
        return self._network

    def fit(self, samples: Iterable[Array]) -> None:
        """Draw weights for samples of this shape, and take the samples' statistics.

        Raises:
            InputError: no sample, samples of another kind or several shapes, or values that are not finite.
        """
        rest, moments, shape = iter(samples), Moments(self.kind), None
        while block := list(islice(rest, FIT_ROWS)):
            shape = shape or block[0].shape
            moments.add(self._stacked(block, shape))
        if shape is None:
            raise InputError(f"the encoder of '{self.modality}' needs training samples, got none")
        if not moments.mean.isfinite().all():
            raise InputError(f"training samples of '{self.modality}' have values that are not finite")
        self._network = self._built(shape)
        self._network.mean.copy_(moments.mean)
        self._network.std.copy_(moments.std)

    def _built(self, shape: Sequence[int]) -> _SignalNetwork:
        if len(shape) != len(AXES[self.kind]):
            raise InputError(
                f"kind {self.kind} has samples ({', '.join(AXES[self.kind])}), those of '{self.modality}' "
                f"have the shape {tuple(shape)}; choose the encoder of their kind"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return _SignalNetwork(self.kind, self.modality, tuple(shape), self.width, self.levels).eval()

    def _stacked(self, samples: Sequence[Array], shape: Sequence[int]) -> Array:
        for sample in samples:
            if tuple(sample.shape) != tuple(shape):
                raise InputError(
                    f"samples of '{self.modality}' must have one shape, got {tuple(sample.shape)} beside "
                    f"{tuple(shape)}; cut or fill them up to one"
                )
        return np.stack(samples).astype(np.float32, copy=False)

    def infos(self, length: int) -> InputInfos:
        """Levels (C_i, length) and the mean of the last, (C, 1); of tables (C_i, 1)."""
        positions = 1 if self.kind == "tabular" else length
        if self.kind == "audio":
            square_root(length)
        shapes = [(self.width * 2**i, positions) for i in range(self.levels)]
        if self.kind != "tabular":
            shapes.append((shapes[-1][0], 1))
        return {f"{self.modality}.{i}": InputInfo(shape, self.modality) for i, shape in enumerate(shapes)}

    def encode(self, samples: list[Array], length: int) -> Inputs:
        """Levels (B, C_i, length) and (B, C_i, 1), float32 on the CPU.

        Maps of audio are pooled to a square grid; positions of the others are times.

        Raises:
            InputError: before `fit` or `restore`.
        """
        network = self._loaded
        device = next(network.parameters()).device
        names = list(self.infos(length))
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for start in range(0, len(samples), self.batch_size):
            tensors = self.tensors(samples[start : start + self.batch_size])
            with torch.inference_mode():
                output = network({name: value.to(device) for name, value in tensors.items()})
                levels = [self._pooled(level, length) for level in output.taps.values()]
                if self.kind != "tabular":
                    levels.append(output.embedding.unsqueeze(-1))
            for name, level in zip(names, levels, strict=True):
                parts[name].append(level.cpu())
        return {name: torch.cat(part) for name, part in parts.items()}

    def _pooled(self, level: Tensor, length: int) -> Tensor:
        """(B, C, length); of tables (B, C, 1)."""
        if self.kind == "tabular":
            return level.unsqueeze(-1)
        if self.kind == "audio":
            return F.adaptive_max_pool2d(level, square_root(length)).flatten(2)
        times = level.amax((3, 4)) if self.kind == "video" else level
        return F.adaptive_max_pool1d(times, length)

    def tensors(self, samples: list[Array]) -> Inputs:
        """Samples as they are, (B, ...); the network standardises them."""
        return {self.modality: torch.from_numpy(self._stacked(samples, self._loaded.shape.tolist()))}

    def network(self) -> Network:
        """The network on arrays; training it changes what `encode` gives."""
        return self._loaded

    def save(self, path: Path) -> None:
        """Write weights, statistics and the samples' shape as safetensors."""
        save_state(self._loaded, path)

    def restore(self, path: Path) -> None:
        """Read what `save` wrote."""
        self._read(path)
        self._restored = True

    def _read(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise InputError(f"'{path}' cannot be read as safetensors: {error}") from error
        if "shape" not in tensors:
            raise InputError(f"'{path}' holds no encoder of arrays; SignalEncoder.save writes one")
        network = self._built(tensors["shape"].tolist())
        fit_state(network, tensors, str(path))
        self._network = network.eval()


class _SignalNetwork(Network):
    """Arrays (B, ...) to the mean of the last level; the levels' maps are taps.

    Attributes:
        mean: (C,) by channel, subtracted first.
        std: (C,) by channel, divided by.
        shape: of one sample.
    """

    mean: Tensor
    std: Tensor
    shape: Tensor

    def __init__(self, kind: str, modality: str, shape: tuple[int, ...], width: int, levels: int) -> None:
        super().__init__()
        self.kind, self.modality = kind, modality
        moments = Moments(kind)
        moments.add(np.zeros((1, *shape)))
        self.register_buffer("mean", moments.mean)
        self.register_buffer("std", moments.std)
        self.register_buffer("shape", torch.tensor(shape))
        widths = [width * 2**i for i in range(levels)]
        self.stem, layers = LAYERS[kind](arranged(torch.zeros(1, *shape), kind).shape[1], widths)
        self.levels = nn.ModuleList(layers)
        with torch.no_grad():
            taps = self.eval()({modality: torch.zeros(1, *shape)}).taps
        self.info = OutputInfo(widths[-1], {name: tuple(tap.shape[1:]) for name, tap in taps.items()})

    def forward(self, inputs: Inputs, present: dict[str, Tensor] | None = None) -> Output:
        x = self.stem(
            arranged(standardised(inputs[self.modality], self.mean, self.std, self.kind), self.kind)
        )
        taps: dict[str, Tensor] = {}
        for i, level in enumerate(self.levels):
            x = level(x)
            taps[f"{self.modality}.{i}"] = x
        return Output(x if x.ndim == 2 else x.flatten(2).mean(2), taps)


class _Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, first: nn.Module, second: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = first, second, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def arranged(samples: Tensor, kind: str) -> Tensor:
    """Samples (B, ...) with their channels second, as convolutions read them."""
    if kind in ("series", "skeleton"):
        return samples.flatten(2).transpose(1, 2)  # (B, F, T), (B, 3 J, T)
    return samples.unsqueeze(1) if kind == "video" else samples  # (B, 1, T, H, W)


def convolution(
    dims: int,
    channels: tuple[int, int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...] | int = 1,
    dilation: int = 1,
) -> nn.Module:
    """A convolution that keeps the size but for its stride, and BatchNorm."""
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    padding = tuple(dilation * (k // 2) for k in kernel)
    layer: nn.Module = conv(*channels, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(layer, norm(channels[1]))


def over_time(inputs: int, widths: Sequence[int]) -> tuple[nn.Module, list[nn.Module]]:
    """Stem and levels on (B, F, T); each level but the first halves T."""

    def level(a: int, b: int, stride: int) -> nn.Module:
        same = a == b and stride == 1
        return _Residual(
            convolution(1, (a, b), (3,), stride),
            convolution(1, (b, b), (3,), dilation=2),
            nn.Identity() if same else convolution(1, (a, b), (1,), stride),
        )

    stem = nn.Sequential(convolution(1, (inputs, widths[0]), (5,)), nn.ReLU())
    later = [level(a, b, 2) for a, b in pairwise(widths)]
    return stem, [level(widths[0], widths[0], 1), *later]


def over_frequency_and_time(inputs: int, widths: Sequence[int]) -> tuple[nn.Module, list[nn.Module]]:
    """Stem and levels on (B, 1, F, T): a quarter of both, then a half with each level."""

    def level(a: int, b: int) -> nn.Module:
        return _Residual(
            convolution(2, (a, b), (3, 3), 2),
            convolution(2, (b, b), (3, 3)),
            convolution(2, (a, b), (1, 1), 2),
        )

    stem = nn.Sequential(convolution(2, (inputs, widths[0]), (5, 5), 4), nn.ReLU())
    return stem, [level(a, b) for a, b in pairwise([widths[0], *widths])]


def over_space_and_time(inputs: int, widths: Sequence[int]) -> tuple[nn.Module, list[nn.Module]]:
    """Stem and levels on (B, 1, T, H, W): as for audio in space; each level but the first halves T."""

    def level(a: int, b: int, stride: int) -> nn.Module:
        return _Residual(
            convolution(3, (a, b), (1, 3, 3), (1, 2, 2)),
            convolution(3, (b, b), (3, 1, 1), (stride, 1, 1)),
            convolution(3, (a, b), (1, 1, 1), (stride, 2, 2)),
        )

    stem = nn.Sequential(convolution(3, (inputs, widths[0]), (1, 5, 5), (1, 4, 4)), nn.ReLU())
    later = [level(a, b, 2) for a, b in pairwise(widths)]
    return stem, [level(widths[0], widths[0], 1), *later]


def perceptron(inputs: int, widths: Sequence[int]) -> tuple[nn.Module, list[nn.Module]]:
    """No stem, and layers on (B, F)."""
    layers: list[nn.Module] = [
        nn.Sequential(nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU())
        for a, b in pairwise([inputs, *widths])
    ]
    return nn.Identity(), layers


LAYERS = {
    "audio": over_frequency_and_time,
    "series": over_time,
    "skeleton": over_time,
    "tabular": perceptron,
    "video": over_space_and_time,
}

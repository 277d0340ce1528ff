"""Any timm image model as features of several levels."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d

from mmnas_lab.backbone.weights import (
    device_of,
    fit_state,
    hash_files,
    hash_settings,
    hash_tensors,
    read_checkpoint,
    resolve,
    save_state,
)
from mmnas_lab.search_space.base import Network
from mmnas_lab.types import InputError, InputInfo, InputInfos, Inputs, Output, OutputInfo

if TYPE_CHECKING:
    from PIL.Image import Image

Precision = Literal["float32", "bfloat16"]
Collect = Callable[[Tensor], Tensor]


class TimmImage:
    """A timm model, its intermediate maps max-pooled to a square grid.

    Pictures are resized to one size without cropping and normalised as the model was trained.
    `encode` may be called from several threads at once.
    """

    fitted = False
    label_free = True

    def __init__(
        self,
        model: str,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        modality: str = "image",
        height: int | None = None,
        width: int | None = None,
        levels: Literal["stages"] | list[int] = "stages",
        taps: list[str] | None = None,
        head_mean: bool = True,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        batch_size: int = 16,
        precision: Precision = "float32",
        device: str = "auto",
        seed: int = 0,
    ) -> None:
        """Check the settings; no weights are read.

        Args:
            model: name in timm, with or without the tag of its weights.
            pretrained: take timm's weights, from the hub's cache or the network.
            checkpoint_path: a file of weights, or `package:<name>` of an installed package that ships one.
            modality: the modality of the dataset that is read.
            height: pictures are resized to it, in pixels; None: as the model was trained.
            width: likewise.
            levels: all intermediate maps of the model (`stages`), or these of them, from early to late.
            taps: names of submodules whose outputs are the levels, in place of `levels`.
            head_mean: one more level of length 1, the mean of the last map before the classifier.
            mean: of the normalised pixels in [0, 1], a value a colour; None: as the model was trained.
            std: likewise.
            batch_size: pictures in one pass; the results depend on it by rounding only. A CPU is fastest
                where a batch fits into its cache.
            precision: `bfloat16` computes under autocast: faster on some hardware, 8 bits of mantissa.
            device: `auto`, `cpu` or `cuda`.
            seed: of the random weights where there are none to load.

        Raises:
            InputError: an unknown model, level or submodule, or settings that contradict each other.
        """
        if pretrained and checkpoint_path is not None:
            raise InputError(f"image encoder '{model}': give pretrained=true or checkpoint_path, not both")
        if precision not in ("float32", "bfloat16"):
            raise InputError(f"image encoder '{model}': precision is float32 or bfloat16, not '{precision}'")
        if batch_size < 1 or (height or 1) < 1 or (width or 1) < 1:
            raise InputError(f"image encoder '{model}': batch_size, height and width must be positive")
        check_timm_name(model)
        self.model = model
        self.pretrained = pretrained
        self.checkpoint_path = checkpoint_path
        self.modality = modality
        self.untrained = not pretrained and checkpoint_path is None
        self.levels = levels
        self.taps = taps
        self.head_mean = head_mean
        self.batch_size = batch_size
        self.precision = precision
        self.seed = seed
        self._device = device
        self._levels: _Levels | None = None
        self._restored = False
        self._loading = threading.Lock()

        import timm

        blueprint = self._create("meta")
        config: dict[str, Any] = timm.data.resolve_model_data_config(blueprint)  # type: ignore[no-untyped-call, attr-defined]
        self.height = height or int(config["input_size"][1])
        self.width = width or int(config["input_size"][2])
        self.interpolation: str = config["interpolation"]
        self.mean = list(mean or config["mean"])
        self.std = list(std or config["std"])
        try:
            with torch.no_grad():
                maps = self._wrapped(blueprint)(torch.empty(1, 3, self.height, self.width, device="meta"))
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"image encoder '{model}' cannot read pictures of {self.height} x {self.width}: {error}"
            ) from error
        self._shapes = [tuple(level.shape[1:]) for level in maps]

    def _create(self, device: str) -> nn.Module:
        import timm

        with torch.device(device):
            return timm.create_model(self.model).eval()

    def _wrapped(self, model: nn.Module) -> _Levels:
        indices = None if self.levels == "stages" else list(self.levels)
        return _Levels(model, self.model, indices, self.taps, self.head_mean)

    def fingerprint(self) -> str:
        """Hash of the weights and of every setting that changes `encode`."""
        if self.pretrained or (self.untrained and self._restored):
            weights = hash_tensors(self._loaded.state_dict())
        elif self.checkpoint_path is not None:
            weights = hash_files([self._checkpoint()])
        else:
            weights = f"seed {self.seed}"
        size = [self.height, self.width]
        pixels = [self.mean, self.std, self.interpolation]
        levels = [self.levels, self.taps, self.head_mean, self.precision]
        return hash_settings(model=self.model, weights=weights, size=size, pixels=pixels, levels=levels)

    def _checkpoint(self) -> Path:
        assert self.checkpoint_path is not None
        return resolve(self.checkpoint_path, ("*.safetensors", "*.pth", "*.pt"))

    def load(self) -> None:
        """Build the model with its weights, in eval mode.

        Raises:
            InputError: weights that cannot be had, or do not fit the model.
        """
        with self._loading:
            if self._levels is None:
                model = self._trained() if self.pretrained else self._seeded()
                if self.checkpoint_path is not None:
                    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
                    unused = (classifier,) if isinstance(classifier, str) else tuple(classifier)
                    path = self._checkpoint()
                    fit_state(model, read_checkpoint(path), str(path), unused)
                model.to(device=device_of(self._device), memory_format=torch.channels_last)  # type: ignore[call-overload]
                self._levels = self._wrapped(model).eval()

    def _seeded(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._create("cpu")

    def _trained(self) -> nn.Module:
        import timm

        try:
            return timm.create_model(self.model, pretrained=True)
        except Exception as error:
            raise InputError(
                f"the weights of '{self.model}' could not be had from the model hub "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); "
                "set checkpoint_path to a file of them, or use backbone=offline"
            ) from error

    @property
    def _loaded(self) -> _Levels:
        if self._levels is None:
            self.load()
        assert self._levels is not None
        return self._levels

    def infos(self, length: int) -> InputInfos:
        """Names and shapes of the levels: maps (C_i, length), the head's mean (C_i, 1)."""
        square_root(length)
        shapes = [(shape[0], length if len(shape) == 3 else 1) for shape in self._shapes]
        return {f"{self.modality}.{i}": InputInfo(shape, self.modality) for i, shape in enumerate(shapes)}

    def encode(self, samples: list[Image], length: int) -> Inputs:
        """Levels of pictures, (B, C_i, length) or (B, C_i, 1), float32 on the CPU."""
        side = square_root(length)
        model = self._loaded
        device = device_of(self._device)
        parts: list[list[Tensor]] = []
        for start in range(0, len(samples), self.batch_size):
            pixels = self._pixels(samples[start : start + self.batch_size]).to(device)
            bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
            with torch.inference_mode(), bfloat16:
                maps = model(self._normalised(pixels), lambda x: adaptive_max_pool2d(x, side))
            parts.append([level.flatten(2 if level.ndim == 4 else 1).float().cpu() for level in maps])
        levels = zip(*parts, strict=True)
        return {
            f"{self.modality}.{i}": torch.cat(level).reshape(len(samples), level[0].shape[1], -1)
            for i, level in enumerate(levels)
        }

    def tensors(self, samples: list[Image]) -> Inputs:
        """Normalised pixels (B, 3, height, width)."""
        return {self.modality: self._normalised(self._pixels(samples))}

    def network(self) -> Network:
        """The model as a network on pixels; training it changes what `encode` gives."""
        return _TimmNetwork(self.modality, self._loaded, self._shapes)

    def fit(self, samples: Iterable[Image]) -> None:
        """Nothing to learn without training."""

    def save(self, path: Path) -> None:
        """Write the weights as safetensors."""
        save_state(self._loaded.model, path)

    def restore(self, path: Path) -> None:
        """Read what `save` wrote."""
        fit_state(self._loaded.model, read_checkpoint(path), str(path))
        self._loaded.eval()
        self._restored = True

    def _pixels(self, samples: Sequence[Image]) -> Tensor:
        from PIL.Image import Resampling

        resampling = getattr(Resampling, self.interpolation.upper(), Resampling.BICUBIC)
        size = (self.width, self.height)
        pictures = [np.asarray(sample.convert("RGB").resize(size, resampling)) for sample in samples]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (B, 3, H, W)

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return (pixels.float() / 255 - mean) / std


class _Tap:
    """A forward hook that keeps one submodule's output for the pass that runs in this thread."""

    running = threading.local()

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept: dict[str, Tensor] | None = getattr(self.running, "kept", None)
        if kept is not None:
            # The next layer may work in place, so an untouched output is copied.
            value = self.running.collect(output)
            kept[self.name] = value.clone() if value is output else value


class _Levels(nn.Module):
    """A timm model that gives its levels."""

    def __init__(
        self, model: Any, name: str, indices: list[int] | None, taps: list[str] | None, head_mean: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.indices = indices
        self.taps = taps
        self.head_mean = head_mean
        if taps is None and not hasattr(model, "forward_intermediates"):
            raise InputError(f"timm's '{name}' lists no intermediate maps; name submodules in taps")
        modules = dict(model.named_modules())
        for tap in taps or ():
            if tap not in modules:
                near = get_close_matches(tap, modules, n=3)
                hint = f"; near: {', '.join(near)}" if near else ""
                raise InputError(f"timm's '{name}' has no submodule '{tap}'{hint}")
            modules[tap].register_forward_hook(_Tap(tap))

    def forward(self, pixels: Tensor, collect: Collect = lambda x: x) -> list[Tensor]:
        """The levels' maps (B, C_i, H_i, W_i), each through `collect`, and the head's mean (B, C)."""
        if self.taps is not None:
            maps, last = self._tapped(self.taps, pixels, collect)
        else:
            try:
                last, found = self.model.forward_intermediates(pixels, indices=self.indices)
            except AssertionError as error:
                raise InputError(f"timm's '{self.name}' has no levels {self.indices}: {error}") from error
            maps = [collect(level) for level in found]
        return [*maps, self._mean(last)] if self.head_mean else maps

    def _tapped(self, taps: list[str], pixels: Tensor, collect: Collect) -> tuple[list[Tensor], Tensor]:
        kept: dict[str, Tensor] = {}
        _Tap.running.kept, _Tap.running.collect = kept, collect
        try:
            last = self.model.forward_features(pixels)
        finally:
            _Tap.running.kept = None
        if flat := [tap for tap in taps if tap not in kept or kept[tap].ndim != 4]:
            raise InputError(f"submodule '{flat[0]}' of timm's '{self.name}' gives no map (B, C, H, W)")
        return [kept[tap] for tap in taps], last

    def _mean(self, last: Tensor) -> Tensor:
        if last.ndim == 3:  # (B, tokens, C)
            return last.mean(1)
        channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        return last.mean((1, 2) if channels_last else (2, 3))


class _TimmNetwork(Network):
    """Pixels to the mean of the last level; the maps are taps, by the names of their features."""

    def __init__(self, modality: str, levels: _Levels, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.modality = modality
        self.levels = levels
        taps = {f"{modality}.{i}": shape for i, shape in enumerate(shapes)}
        self.info = OutputInfo(embedding=shapes[-1][0], taps=taps)

    def forward(self, inputs: Inputs, present: dict[str, Tensor] | None = None) -> Output:
        maps = self.levels(inputs[self.modality].contiguous(memory_format=torch.channels_last))
        taps = dict(zip(self.info.taps, maps, strict=True))
        return Output(maps[-1] if maps[-1].ndim == 2 else maps[-1].mean((2, 3)), taps)


def check_timm_name(model: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        InputError: with the nearest names.
    """
    import timm

    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        near = get_close_matches(model, timm.list_models(), n=3, cutoff=0.5)
        hint = f"near: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise InputError(f"timm has no model '{model}'; {hint}")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and model not in tagged:
        listed = ", ".join(tagged) or "none"
        raise InputError(f"timm has no weights '{tag}' of '{architecture}'; it has: {listed}")


def square_root(length: int) -> int:
    """Side of the grid to which maps are pooled.

    Raises:
        InputError: if `length` is no square.
    """
    side = math.isqrt(max(length, 0))
    if side < 1 or side * side != length:
        near = sorted({max(side, 1) ** 2, (side + 1) ** 2})
        raise InputError(
            f"image maps are pooled to a square grid, so length must be a square, got {length}; "
            f"set search_space.length to {' or '.join(map(str, near))}"
        )
    return side

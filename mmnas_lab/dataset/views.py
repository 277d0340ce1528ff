"""Label-free views of a picture or a text, and of features of all modalities; arrays: `signal_views`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmnas_lab.types import InputError, Inputs


class ViewFamily(Protocol):
    """Random changes of a raw sample that leave what it shows recognisable."""

    def __call__(self, sample: Any, generator: torch.Generator) -> Any:
        """A view of one raw sample, itself a raw sample; all randomness is drawn from the generator."""

    def settings(self) -> dict[str, Any]:
        """Everything that decides the distribution of views, as plain values."""


class ImageViews:
    """Views of a picture as in SimCLR (Chen et al. 2020, appendix A): crop, flip, colours, grey, blur.

    The crop is resized to the picture's own size. SimCLR crops down to 0.08 of the area of photographs; a
    poster needs more to stay recognisable, so the least area is 0.4. The blur is SimCLR's at 224 pixels,
    scaled to the picture's shorter side.

    Args:
        strength: 1 for the set above; less is milder, more is stronger, 0 leaves pictures unchanged.

    Raises:
        InputError: a negative strength.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = checked_strength("ImageViews", strength)
        self._transforms: dict[tuple[int, int], Callable[[Image.Image], Image.Image]] = {}

    def __call__(self, sample: Image.Image, generator: torch.Generator) -> Image.Image:
        if self.strength == 0:
            return sample
        if sample.size not in self._transforms:
            self._transforms[sample.size] = self._build(*sample.size)
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        # torchvision draws from torch's global CPU generator; torch.manual_seed would seed the GPU's too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._transforms[sample.size](sample)

    def settings(self) -> dict[str, Any]:
        return {"family": "image", "version": 1, "strength": self.strength}

    def _build(self, width: int, height: int) -> Callable[[Image.Image], Image.Image]:
        from torchvision.transforms import v2  # seconds to import

        strength, capped = self.strength, min(self.strength, 1.0)
        aspect, stretch, side = width / height, (4 / 3) ** capped, min(width, height)
        jitter = 0.4 * strength
        crop = v2.RandomResizedCrop(
            (height, width),
            scale=(1 - 0.6 * capped, 1.0),
            ratio=(aspect / stretch, aspect * stretch),
            antialias=True,
        )
        colours = v2.ColorJitter(jitter, jitter, jitter, min(0.1 * strength, 0.5))
        blur = v2.GaussianBlur(2 * (side // 20) + 1, sigma=(0.1 * side / 224, 2.0 * side / 224))
        transforms: Callable[[Image.Image], Image.Image] = v2.Compose(
            [
                crop,
                v2.RandomHorizontalFlip(0.5),
                v2.RandomApply([colours], p=0.8),
                v2.RandomGrayscale(min(0.2 * strength, 1.0)),
                v2.RandomApply([blur], p=0.5 * capped),
            ]
        )
        return transforms


class TextViews:
    """Views of a text: sentences in another order, a span left out, single words left out.

    At strength 1 sentences are shuffled with probability 0.5, a span of at most a fifth of the words is left
    out with probability 0.5, and each word left is left out with probability 0.2. At least one word stays.

    Args:
        strength: factor of all three probabilities; 0 leaves texts unchanged.

    Raises:
        InputError: a negative strength.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = checked_strength("TextViews", strength)

    def __call__(self, sample: str, generator: torch.Generator) -> str:
        if self.strength == 0 or not sample.strip():
            return sample

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=generator.device).cpu()

        shuffles, cuts = (uniform(2) < 0.5 * self.strength).tolist()
        sentences = re.split(r"(?<=[.!?])\s+", sample.strip())
        if shuffles:
            sentences = [sentences[i] for i in uniform(len(sentences)).argsort().tolist()]
        words = " ".join(sentences).split()
        if cuts:
            length = int(uniform(1).item() * (0.2 * len(words) + 1))
            start = int(uniform(1).item() * (len(words) - length + 1))
            words = words[:start] + words[start + length :] or words
        fate = uniform(len(words))
        kept = fate >= min(0.2 * self.strength, 1.0)
        kept[fate.argmax()] = True
        return " ".join(word for word, keep in zip(words, kept.tolist(), strict=True) if keep)

    def settings(self) -> dict[str, Any]:
        return {"family": "text", "version": 1, "strength": self.strength}


class TokenViews:
    """Views of a text that is kept as features of its tokens: a span left out, single tokens left out.

    The probabilities are those of `TextViews`; sentences keep their order, as tokens do not tell where they
    end. At least one token stays.

    Args:
        strength: factor of both probabilities; 0 leaves texts unchanged.

    Raises:
        InputError: a negative strength.
    """

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = checked_strength("TokenViews", strength)

    def __call__(self, sample: np.ndarray[Any, Any], generator: torch.Generator) -> np.ndarray[Any, Any]:
        """Fewer of the (T, D) tokens."""
        if self.strength == 0:
            return sample
        cut, length, start = torch.rand(3, generator=generator, device=generator.device).tolist()
        fate = torch.rand(len(sample), generator=generator, device=generator.device).cpu()
        kept = fate >= min(0.2 * self.strength, 1.0)
        if cut < 0.5 * self.strength:
            span = int(length * (0.2 * len(sample) + 1))
            first = int(start * (len(sample) - span + 1))
            kept[first : first + span] = False
        kept[fate.argmax()] = True
        return sample[kept.numpy()]

    def settings(self) -> dict[str, Any]:
        return {"family": "tokens", "version": 1, "strength": self.strength}


class FeatureViews:
    """Views of standardised features, for cached ones above all; every sample has its own draws.

    Args:
        dropout: in [0, 1); probability that a value is set to zero. The others are divided by 1 - dropout.
        noise: >= 0; standard deviation of Gaussian noise that is added.
        drop_modality: >= 0; probability of each modality that all its features are set to zero. A sample
            loses one modality at most, and none where the inputs are of one modality only.

    Raises:
        InputError: a setting outside its range.
    """

    def __init__(self, dropout: float = 0.0, noise: float = 0.0, drop_modality: float = 0.0) -> None:
        if not 0 <= dropout < 1:
            raise InputError(f"FeatureViews needs dropout in [0, 1), got {dropout}; 0.1 is usual")
        if not 0 <= noise < float("inf"):
            raise InputError(
                f"FeatureViews needs noise >= 0 (a standard deviation), got {noise}; 0 adds none"
            )
        if not 0 <= drop_modality <= 0.5:
            raise InputError(
                f"FeatureViews needs drop_modality in [0, 0.5], got {drop_modality}; "
                "it holds for each modality, and a sample loses one at most"
            )
        self.dropout, self.noise, self.drop_modality = dropout, noise, drop_modality

    def __call__(self, inputs: Inputs, modality_of: dict[str, str], generator: torch.Generator) -> Inputs:
        """A view of a batch.

        Args:
            inputs: (B, C_i, L_i) standardised features by name.
            modality_of: modality of each name.
            generator: source of all randomness, on any device.

        Returns:
            New tensors where something is changed; the inputs are not written to.

        Raises:
            InputError: `drop_modality` times the number of modalities exceeds 1.
        """
        views = {name: self.perturbed(inputs[name], generator) for name in sorted(inputs)}
        modalities = sorted({modality_of[name] for name in inputs})
        if self.drop_modality > 0 and len(modalities) > 1:
            present = self.present(modalities, len(next(iter(inputs.values()))), generator)
            views = {name: kept_where(present[modality_of[name]], views[name]) for name in views}
        return {name: views[name] for name in inputs}

    def present(
        self, modalities: list[str], num_samples: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Which samples keep which modality, (B,) bool each; a single modality is always kept.

        Raises:
            InputError: `drop_modality` times the number of modalities exceeds 1.
        """
        if self.drop_modality == 0 or len(modalities) == 1:
            return {modality: torch.ones(num_samples, dtype=torch.bool) for modality in modalities}
        if self.drop_modality * len(modalities) > 1 + 1e-6:
            raise InputError(
                f"drop_modality={self.drop_modality:g} for each of {len(modalities)} modalities "
                f"({', '.join(modalities)}) exceeds 1 in sum; use at most {1 / len(modalities):.3g}"
            )
        draws = torch.rand(num_samples, generator=generator, device=generator.device)
        lost = (draws / self.drop_modality).long()  # (B,) number of the modality; beyond the last: none
        return {modality: lost != i for i, modality in enumerate(modalities)}

    def settings(self) -> dict[str, Any]:
        return {
            "family": "features",
            "version": 1,
            "dropout": self.dropout,
            "noise": self.noise,
            "drop_modality": self.drop_modality,
        }

    def perturbed(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Values with dropout and noise."""
        device = generator.device
        if self.dropout > 0:
            kept = torch.rand(features.shape, generator=generator, device=device) >= self.dropout
            features = features * kept.to(features.device, features.dtype) / (1 - self.dropout)
        if self.noise > 0:
            noise = torch.randn(features.shape, generator=generator, device=device)
            features = features + self.noise * noise.to(features.device, features.dtype)
        return features


def checked_strength(family: str, strength: float) -> float:
    """The strength of a family of views. Raises InputError where it is negative or not finite."""
    if not 0 <= strength < float("inf"):
        raise InputError(
            f"{family} needs strength >= 0, got {strength}; 0 leaves samples unchanged, 1 is usual"
        )
    return float(strength)


def kept_where(present: Tensor, values: Tensor) -> Tensor:
    """Values (B, ...), zero for the samples that (B,) `present` does not mark."""
    return torch.where(present.to(values.device).reshape(-1, *[1] * (values.ndim - 1)), values, 0.0)

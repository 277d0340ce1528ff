"""The Maxout text network of the MM-IMDB experiments, on mean word vectors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmnas_lab.backbone.weights import (
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

WIDTHS = (64, 128)
POOL = 5


class MaxoutText:
    """Mean word vectors through two Maxout layers (Goodfellow et al. 2013), each a level: 64 and 128 values.

    The text backbone of BM-NAS and of MFAS before it. Words are runs of letters, digits and apostrophes in
    lower case. Without a file of vectors each word gets a random vector of unit variance drawn from a hash of
    the word: any word has one, the same in every run, and similar words are no closer than others.
    """

    fitted = False
    label_free = True

    def __init__(
        self,
        vectors: str | None = None,
        checkpoint_path: str | None = None,
        dimensions: int = 300,
        dropout: float = 0.5,
        modality: str = "text",
        seed: int = 0,
    ) -> None:
        """Check the settings; no vectors are read.

        Args:
            vectors: word vectors, a text file of a word and its values a line (word2vec or GloVe, with or
                without a first line of counts), or .npz with `words` (n,) and `vectors` (n, D). Words that
                it lacks are left out of the mean. None: hashed words.
            checkpoint_path: weights of the network; None: random ones, to be pretrained.
            dimensions: D of the word vectors.
            dropout: in the network, between the layers and before the embedding, in [0, 1).
            modality: the modality of the dataset that is read.
            seed: of the random weights and the hashed words.

        Raises:
            InputError: a setting that cannot be.
        """
        if dimensions < 1 or not 0 <= dropout < 1:
            raise InputError(
                f"MaxoutText needs dimensions >= 1 and dropout in [0, 1), got {dimensions} and {dropout}"
            )
        self.vectors = vectors
        self.checkpoint_path = checkpoint_path
        self.dimensions = dimensions
        self.dropout = dropout
        self.modality = modality
        self.seed = seed
        self.untrained = checkpoint_path is None
        self._words: dict[str, np.ndarray[Any, Any]] = {}
        self._network: _MaxoutNetwork | None = None
        self._restored = False

    def fingerprint(self) -> str:
        """Hash of word vectors, weights and every setting that changes `encode`."""
        words = f"hashed {self.seed}" if self.vectors is None else hash_files([resolve(self.vectors, ())])
        if self._restored:
            weights = hash_tensors(self._loaded.state_dict())
        elif self.checkpoint_path is not None:
            weights = hash_files([resolve(self.checkpoint_path, ("*.safetensors", "*.pt", "*.pth"))])
        else:
            weights = f"seed {self.seed}"
        return hash_settings(encoder="maxout", words=words, weights=weights, dimensions=self.dimensions)

    def load(self) -> None:
        """Read the word vectors and build the network, in eval mode.

        Raises:
            InputError: a file that is not there, cannot be read, or does not fit.
        """
        if self._network is not None:
            return
        if self.vectors is not None:
            self._words = read_word_vectors(resolve(self.vectors, ()), self.dimensions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = _MaxoutNetwork(self.modality, self.dimensions, self.dropout)
        if self.checkpoint_path is not None:
            path = resolve(self.checkpoint_path, ("*.safetensors", "*.pt", "*.pth"))
            fit_state(network, read_checkpoint(path), str(path))
        self._network = network.eval()

    @property
    def _loaded(self) -> _MaxoutNetwork:
        self.load()
        assert self._network is not None
        return self._network

    def infos(self, length: int) -> InputInfos:
        """Two levels, (64, 1) and (128, 1)."""
        shapes = [(width, 1) for width in WIDTHS]
        return {f"{self.modality}.{i}": InputInfo(shape, self.modality) for i, shape in enumerate(shapes)}

    def encode(self, samples: list[str], length: int) -> Inputs:
        """The outputs of both Maxout layers, (B, 64, 1) and (B, 128, 1), float32."""
        network = self._loaded
        device = next(network.parameters()).device
        with torch.inference_mode():
            means = self.tensors(samples)[self.modality].to(device)
            taps = network({self.modality: means}).taps
        return {name: value.cpu().unsqueeze(-1) for name, value in taps.items()}

    def tensors(self, samples: list[str]) -> Inputs:
        """Mean word vectors (B, D); zero for a text without known words."""
        self.load()
        means = np.zeros((len(samples), self.dimensions), np.float32)
        for row, text in enumerate(samples):
            words = re.findall(r"[\w']+", text.lower())
            if known := [vector for word in words if (vector := self._vector(word)) is not None]:
                means[row] = np.mean(known, 0)
        return {self.modality: torch.from_numpy(means)}

    def _vector(self, word: str) -> np.ndarray[Any, Any] | None:
        if self.vectors is None and word not in self._words:
            digest = hashlib.sha256(f"{self.seed} {word}".encode()).digest()
            draws = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            self._words[word] = draws.standard_normal(self.dimensions, np.float32)
        return self._words.get(word)

    def network(self) -> Network:
        """The network on mean word vectors; training it changes what `encode` gives."""
        return self._loaded

    def fit(self, samples: Iterable[str]) -> None:
        """Nothing to learn without training."""

    def save(self, path: Path) -> None:
        """Write the network's weights as safetensors."""
        save_state(self._loaded, path)

    def restore(self, path: Path) -> None:
        """Read what `save` wrote."""
        fit_state(self._loaded, read_checkpoint(path), str(path))
        self._loaded.eval()
        self._restored = True


class _MaxoutNetwork(Network):
    """Two Maxout layers; their outputs are the taps.

    The embedding is the second output, normalised and dropped out: what the classifier reads in BM-NAS.
    """

    def __init__(self, modality: str, dimensions: int, dropout: float) -> None:
        super().__init__()
        self.modality = modality
        sizes = (dimensions, *WIDTHS)
        self.linears = nn.ModuleList(nn.Linear(a, b * POOL) for a, b in zip(sizes, WIDTHS, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in WIDTHS)
        self.dropout = nn.Dropout(dropout)
        self.info = OutputInfo(WIDTHS[-1], {f"{modality}.{i}": (width,) for i, width in enumerate(WIDTHS)})

    def forward(self, inputs: Inputs, present: dict[str, Tensor] | None = None) -> Output:
        x = inputs[self.modality]  # (B, D)
        taps: dict[str, Tensor] = {}
        for i, (linear, norm) in enumerate(zip(self.linears, self.norms, strict=True)):
            x = linear(x).unflatten(1, (-1, POOL)).amax(2)
            taps[f"{self.modality}.{i}"] = x
            x = self.dropout(norm(x))
        return Output(x, taps)


def read_word_vectors(path: Path, dimensions: int) -> dict[str, np.ndarray[Any, Any]]:
    """Vectors (D,) float32 by word.

    Raises:
        InputError: a file of another form or size.
    """
    wanted = f"word vectors '{path}' must have {dimensions} values a word"
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                words, values = arrays["words"].tolist(), np.asarray(arrays["vectors"], np.float32)
        except (KeyError, ValueError, OSError) as error:
            raise InputError(f"word vectors '{path}' need arrays `words` and `vectors`: {error}") from error
        if values.shape != (len(words), dimensions):
            raise InputError(f"{wanted}, its `vectors` are {values.shape}; set dimensions")
        return dict(zip(words, values, strict=True))
    found: dict[str, np.ndarray[Any, Any]] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip().split(" ")
            if number == 1 and len(fields) == 2:  # word2vec: count and size
                continue
            if len(fields) <= dimensions:
                raise InputError(f"{wanted}, line {number} has {len(fields) - 1}; set dimensions")
            # GloVe has a few words with spaces in them, so values are counted from the end.
            word = " ".join(fields[:-dimensions])
            try:
                found[word] = np.asarray(fields[-dimensions:], np.float32)
            except ValueError as error:
                raise InputError(f"{wanted}, line {number} cannot be read: {error}") from error
    return found

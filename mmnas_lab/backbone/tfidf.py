"""Words counted and compressed: a text encoder that needs no weights, only the training texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmnas_lab.backbone.weights import hash_settings
from mmnas_lab.types import InputError, InputInfo, InputInfos, Inputs

Array = np.ndarray[Any, Any]


class TfidfSvd:
    """TF-IDF of words, its first singular directions kept (latent semantic analysis): one level.

    Directions beyond the rank of the training texts are zero, so that the size is known before `fit`.
    """

    fitted = True
    untrained = False
    label_free = True

    def __init__(
        self, dimensions: int = 256, max_features: int = 20000, modality: str = "text", seed: int = 0
    ) -> None:
        """Check the settings.

        Args:
            dimensions: singular directions that are kept.
            max_features: most frequent words that are counted.
            modality: the modality of the dataset that is read.
            seed: of the randomised decomposition.

        Raises:
            InputError: a size below 1.
        """
        if dimensions < 1 or max_features < 1:
            raise InputError(
                f"TfidfSvd needs dimensions >= 1 and max_features >= 1, got {dimensions} and {max_features}"
            )
        self.dimensions = dimensions
        self.max_features = max_features
        self.modality = modality
        self.seed = seed
        self._vectorizer: Any = None
        self._components: Array | None = None  # (F, D)

    def fingerprint(self) -> str:
        """Hash of the settings; what `fit` learns follows from them and the training texts."""
        return hash_settings(
            encoder="tfidf_svd", dimensions=self.dimensions, max_features=self.max_features, seed=self.seed
        )

    def load(self) -> None:
        """Nothing to load."""

    def fit(self, samples: Iterable[str]) -> None:
        """Learn words, weights and directions from the training texts.

        Raises:
            InputError: texts without a single word.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(max_features=self.max_features, sublinear_tf=True)
        try:
            counts = vectorizer.fit_transform(samples)
        except ValueError as error:
            message = f"TfidfSvd cannot learn from the training texts of '{self.modality}': {error}"
            raise InputError(message) from error
        components = np.zeros((counts.shape[1], self.dimensions))
        rank = min(self.dimensions, min(counts.shape))
        svd = TruncatedSVD(rank, random_state=self.seed).fit(counts)
        components[:, : len(svd.components_)] = svd.components_.T
        self._set(vectorizer.vocabulary_, vectorizer.idf_, components)

    def infos(self, length: int) -> InputInfos:
        """One level, (dimensions, 1)."""
        return {f"{self.modality}.0": InputInfo((self.dimensions, 1), self.modality)}

    def encode(self, samples: list[str], length: int) -> Inputs:
        """Texts in the learned directions, (B, D, 1) float32.

        Raises:
            InputError: before `fit` or `restore`.
        """
        if self._components is None:
            raise InputError("TfidfSvd reads texts only after fit(training texts) or restore(path)")
        values = np.zeros((0, self.dimensions))
        if samples:
            values = self._vectorizer.transform(samples) @ self._components
        return {f"{self.modality}.0": torch.from_numpy(values.astype(np.float32)).unsqueeze(-1)}

    def save(self, path: Path) -> None:
        """Write words, weights and directions as safetensors; the words stand in its metadata."""
        from safetensors.numpy import save_file

        if self._components is None:
            raise InputError("TfidfSvd has learned nothing to save; call fit(training texts) first")
        words = sorted(self._vectorizer.vocabulary_, key=self._vectorizer.vocabulary_.get)
        arrays = {"idf": np.asarray(self._vectorizer.idf_), "components": self._components}
        save_file(arrays, path, metadata={"words": json.dumps(words)})

    def restore(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
            InputError: a file of another number of dimensions.
        """
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            words: list[str] = json.loads(file.metadata()["words"])
            idf, components = file.get_tensor("idf"), file.get_tensor("components")
        if components.shape[1] != self.dimensions:
            raise InputError(
                f"'{path}' has {components.shape[1]} dimensions, TfidfSvd has {self.dimensions}; fit it again"
            )
        self._set({word: column for column, word in enumerate(words)}, idf, components)

    def _set(self, vocabulary: dict[str, int], idf: Array, components: Array) -> None:
        """Take over what was learned, the same way after `fit` and after `restore`."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vocabulary = {word: int(column) for word, column in vocabulary.items()}
        self._vectorizer = TfidfVectorizer(vocabulary=vocabulary, sublinear_tf=True)
        self._vectorizer.idf_ = idf
        self._vectorizer._validate_vocabulary()
        self._components = np.ascontiguousarray(components)

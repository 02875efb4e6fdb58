"""GGUF files: metadata as a configuration, tensors dequantised."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from tokenlab.core.errors import UserError
from tokenlab.interop.families import Family, family_of_gguf

# configuration key -> key of the metadata, without its architecture.
_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
}


class GgufFile:
    """One open file.

    Args:
        path: of the file.

    Raises:
        UserError: it is not a whole GGUF file.
    """

    def __init__(self, path: pathlib.Path):
        try:
            self._reader = gguf.GGUFReader(path)
            self.metadata = {name: f.contents() for name, f in self._reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise UserError(f"{path} is not a whole GGUF file ({str(error)[:80]})") from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32, its last axis the fastest."""
        tensor = self._tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    def family(self) -> Family:
        """The family of the model.

        Raises:
            UserError: the architecture is unknown.
        """
        return family_of_gguf(self.metadata.get("general.architecture"))

    def config(self) -> dict[str, Any]:
        """The configuration, as :meth:`Family.model` reads it."""
        family = self.family()
        config = {
            key: _plain(self.metadata[f"{family.gguf}.{name}"])
            for key, name in _KEYS.items()
            if f"{family.gguf}.{name}" in self.metadata
        }
        if "token_embd.weight" in self._tensors:
            config["vocab_size"] = int(self._tensors["token_embd.weight"].shape[1])
        if family.gemma:
            config |= {"rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6}
        elif config.get("sliding_window"):
            raise UserError(f"a window in a GGUF file of {family.gguf} is not supported")
        scaling = _scaling(self.metadata, family.gguf)
        tied = "output.weight" not in self._tensors
        return (
            config | {"tie_word_embeddings": tied} | ({"rope_scaling": scaling} if scaling else {})
        )


def _scaling(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any] | None:
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": metadata.get(f"{architecture}.rope.scaling.factor", 1.0)}


def _plain(value: Any) -> Any:
    """A number as it was before it became a float32, which holds 1e-5 as 9.9999997e-06."""
    if isinstance(value, list):
        if len(set(value)) > 1:
            raise UserError("layers of different shape in a GGUF file are not supported")
        return value[0]
    return float(str(np.float32(value))) if isinstance(value, float) else value

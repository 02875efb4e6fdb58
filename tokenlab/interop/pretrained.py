"""Published models in, and models out in the form that others read."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from tokenlab.core.errors import UserError
from tokenlab.interop.families import family_named, family_of
from tokenlab.interop.gguf_file import GgufFile
from tokenlab.interop.gguf_tokenizer import tokenizer_of
from tokenlab.interop.tensors import read_params, written_params
from tokenlab.models import Transformer, unrolled, with_adapter
from tokenlab.tokenizers import PretrainedTokenizer, Tokenizer

_CONFIG, _INDEX, _WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


class Pretrained(NamedTuple):
    """A published model.

    Attributes:
        model: the module.
        params: its parameters.
        tokenizer: its tokenizer.
    """

    model: Transformer
    params: PyTree
    tokenizer: PretrainedTokenizer


def load_pretrained(
    path: str | os.PathLike[str], *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Pretrained:
    """A model of the Llama, Qwen2, Qwen3 or Gemma 3 family, with its tokenizer.

    Args:
        path: a folder with ``config.json``, ``*.safetensors`` and ``tokenizer.json``, or a file
            ``*.gguf``, which is dequantised.
        dtype: of activations and matrices; norms and biases stay float32.

    Raises:
        UserError: there is no such model, it is damaged, or it is one that cannot be computed.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        found = _from_folder(path, dtype)
    elif path.is_file() and path.suffix == ".gguf":
        found = _from_gguf(path, dtype)
    else:
        raise UserError(f"{path} is neither a folder with {_CONFIG} nor a .gguf file")
    words, rows = found.tokenizer.vocab_size, found.model.vocab_size
    if words > rows:
        raise UserError(
            f"the tokenizer of {path} has {words} ids and the embedding {rows} rows; "
            "they are not of one model"
        )
    return found


def save_pretrained(
    path: str | os.PathLike[str],
    model: Transformer,
    params: PyTree,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a folder that ``transformers`` and :func:`load_pretrained` read.

    Args:
        path: the folder, made when absent.
        model: of a published family, whatever trained it.
        params: its parameters, each written in the dtype it has.
        tokenizer: of a published model; None writes the model alone.

    Raises:
        UserError: the model has adapters, no family holds it, or the tokenizer has no published
            form.
    """
    if model != with_adapter(model, None):
        raise UserError("the model has adapters; save models.merged(model, params) instead")
    model, params = unrolled(model, params)
    family = family_of(model)
    tensors = dict(written_params(model, family, params))
    config = family.config(model) | {"dtype": str(model.dtype), "torch_dtype": str(model.dtype)}
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        config |= _write_tokenizer(folder, tokenizer)
    partial = folder / f".{_WEIGHTS}.partial"
    safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / _WEIGHTS)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2))


def _write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Writes the files of a tokenizer; returns its special ids as a configuration has them."""
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise UserError(
            f"{type(tokenizer).__name__} has no {_TOKENIZER}; save the model without a tokenizer"
        )
    (folder / _TOKENIZER).write_bytes(tokenizer.model)
    special = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    config |= {f"{name}_token": tokenizer.text_of(i) for name, i in special.items()}
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    (folder / _TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2))
    return {f"{name}_token_id": i for name, i in special.items()}


def _from_gguf(path: pathlib.Path, dtype: str) -> Pretrained:
    file = GgufFile(path)
    family = file.family()
    model = family.model(file.config()).clone(dtype=dtype)
    params = read_params(model, family, format="gguf", names=file.names, read=file.read)
    return Pretrained(model, params, tokenizer_of(file.metadata))


def _from_folder(path: pathlib.Path, dtype: str) -> Pretrained:
    config = _json(path / _CONFIG)
    family = family_named(config.get("model_type"))
    model = family.model(config).clone(dtype=dtype)
    with contextlib.ExitStack() as stack:
        files = {}
        for file in _weight_files(path):
            opened = stack.enter_context(_opened(file))
            files |= dict.fromkeys(opened.keys(), opened)
        params = read_params(
            model,
            family,
            format="hf",
            names=files,
            read=lambda name: np.asarray(files[name].get_tensor(name)),
        )
    return Pretrained(model, params, _read_tokenizer(path, config))


def _weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    if (path / _INDEX).exists():
        names = sorted(set(_json(path / _INDEX).get("weight_map", {}).values()))
        files = [path / pathlib.Path(name).name for name in names]
    else:
        files = [path / _WEIGHTS]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; fetch the whole checkpoint as safetensors")
    return files


def _opened(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from None


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; name the folder of a published model") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def _read_tokenizer(path: pathlib.Path, config: Mapping[str, Any]) -> PretrainedTokenizer:
    file = path / _TOKENIZER
    if not file.is_file():
        raise UserError(f"{file} is missing; fetch the tokenizer with the model")
    settings = _json(path / _TOKENIZER_CONFIG) if (path / _TOKENIZER_CONFIG).exists() else {}
    model = file.read_bytes()
    added = {token["content"]: token["id"] for token in _json(file).get("added_tokens", [])}
    ids = {}
    for name in ("eos", "bos", "pad"):
        token = settings.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        given = config.get(f"{name}_token_id")
        given = given[0] if isinstance(given, list) else given
        ids[f"{name}_id"] = added.get(content, ids.get("eos_id") if given is None else given)
    if ids["eos_id"] is None:
        raise UserError(f"{path} names no end token; give eos_token in {_TOKENIZER_CONFIG}")
    template = path / "chat_template.jinja"
    chat = template.read_text() if template.exists() else settings.get("chat_template") or ""
    return PretrainedTokenizer(
        model=model, chat_template=chat if isinstance(chat, str) else "", **ids
    )

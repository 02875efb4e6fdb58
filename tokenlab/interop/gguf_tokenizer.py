"""Tokenizers out of the metadata of GGUF files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenlab.core.errors import UserError
from tokenlab.tokenizers import PretrainedTokenizer

_CONTROL, _UNKNOWN, _USER_DEFINED = 3, 2, 4  # values of tokenizer.ggml.token_type
_DIGITS = {"type": "Digits", "individual_digits": True}


def _byte_level(regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": regex,
    }


def _split(digits: str) -> dict[str, Any]:
    """The pattern of cl100k, which differs between models in how many digits stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


# tokenizer.ggml.pre -> how text is cut before merging.
_PRE: dict[str, list[dict[str, Any]]] = {
    "default": [_byte_level(True)],
    "gpt-2": [_byte_level(True)],
    "smollm": [_DIGITS, _byte_level(True)],
    "llama-bpe": [_split(r"\p{N}{1,3}"), _byte_level(False)],
    "qwen2": [_split(r"\p{N}"), _byte_level(False)],
}


def tokenizer_of(metadata: Mapping[str, Any]) -> PretrainedTokenizer:
    """The tokenizer that a GGUF file describes.

    Args:
        metadata: of the file, its keys as they are.

    Raises:
        UserError: it has none, or one of another kind.
    """
    try:
        kind = metadata["tokenizer.ggml.model"]
        tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
        types: Sequence[int] = metadata["tokenizer.ggml.token_type"]
        eos = metadata["tokenizer.ggml.eos_token_id"]
        if kind == "gpt2":
            spec = _bytes_spec(metadata, tokens)
        elif kind == "llama":
            spec = _fallback_spec(metadata, tokens, types)
        else:
            raise UserError(f"tokenizer {kind!r} of a GGUF file is not supported: gpt2 and llama")
    except KeyError as error:
        raise UserError(f"the GGUF file has no {error}, which its tokenizer needs") from None
    return PretrainedTokenizer(
        model=json.dumps(spec | {"added_tokens": _added(tokens, types)}).encode(),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id", eos),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id", eos),
        eos_id=eos,
        chat_template=metadata.get("tokenizer.chat_template", ""),
    )


def _added(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, "special": kind != _USER_DEFINED, **flags}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    ]


def _bytes_spec(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE:
        known = ", ".join(_PRE)
        raise UserError(
            f"pre-tokenizer {pre!r} of a GGUF file is not supported; these are: {known}"
        )
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    return {
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": pre == "llama-bpe",
        },
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE[pre]},
        "decoder": _byte_level(True),
    }


def _fallback_spec(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    """SentencePiece BPE: pairs merge in the order of their result's score."""
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise UserError("a tokenizer that puts a space before every text loses bytes; use another")
    scores = metadata["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, i in vocabulary.items():
        if types[i] not in (_CONTROL, _UNKNOWN):
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in vocabulary and right in vocabulary:
                    merges.append((-scores[i], vocabulary[left], vocabulary[right], left, right))
    merges.sort()
    unknown = tokens[metadata["tokenizer.ggml.unknown_token_id"]]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    return {
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [list(merge[3:]) for merge in merges],
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
        },
        "normalizer": space,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }

"""Tokenizers of published models, in the format of the ``tokenizers`` library."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers

from tokenlab.core.errors import UserError
from tokenlab.tokenizers.base import Tokenizer
from tokenlab.tokenizers.byte import join_pieces

_SPACE = "\u2581"
# What a model of text cannot be given: bytes that are not UTF-8, which "surrogateescape" turns into
# these surrogates, and, where spaces are written as U+2581, that character itself.
_BROKEN = re.compile("([\udc80-\udcff]+)")
_BROKEN_OR_SPACE = re.compile(f"([\udc80-\udcff{_SPACE}]+)")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PROBE = f"  A\u00a0\ufb01\u212b  {_SPACE} e\u0301 x1234 <s></s> \n\t\n 'll  y ".encode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedTokenizer(Tokenizer):
    """The tokenizer of a published model: the ``tokenizer.json`` beside its weights.

    Byte-level BPE (Llama 3, Qwen, SmolLM) and BPE with byte fallback (Gemma). Every id stands for
    fixed bytes, so ``decode(a + b) == decode(a) + decode(b)``.

    Differences from the published tokenizers: Unicode normalisation is left out, so that every
    byte is kept; special tokens are never made from text, only from ``special_id``; what is not
    UTF-8 becomes byte tokens. Nothing is put before a text: callers begin one with ``bos_id``.

    Attributes:
        model: the content of a ``tokenizer.json`` file.
        pad_id: id of padding; stands for no bytes.
        bos_id: id that begins a document.
        eos_id: id that ends one.
        chat_template: Jinja template of conversations, as published; empty where there is none.
    """

    model: bytes = dataclasses.field(repr=False)
    pad_id: int = dataclasses.field()  # pyrefly: ignore[bad-override]
    bos_id: int = dataclasses.field()  # pyrefly: ignore[bad-override]
    eos_id: int = dataclasses.field()  # pyrefly: ignore[bad-override]
    chat_template: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        for name in ("pad_id", "bos_id", "eos_id"):
            if self._pieces.get(getattr(self, name)) != b"":
                raise UserError(
                    f"{name} {getattr(self, name)} is not a special token of the tokenizer"
                )
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError("the tokenizer does not give back what it encodes; use another one")

    @functools.cached_property
    def _spec(self) -> dict[str, Any]:
        """The file without what changes text: Unicode normalisation, truncation, padding."""
        spec: dict[str, Any] = {}
        try:
            spec = json.loads(self.model)
            whole = "vocab" in spec["model"] and "added_tokens" in spec
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{len(self.model)} bytes are not a tokenizer.json file")
        spec["normalizer"] = _without_unicode_forms(spec.get("normalizer"))
        return spec | {"truncation": None, "padding": None, "post_processor": None}

    @functools.cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        try:
            made = tokenizers.Tokenizer.from_str(json.dumps(self._spec))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"the tokenizer cannot be read: {str(error)[:200]}") from None
        made.encode_special_tokens = True
        given = {token["id"] for token in self._spec["added_tokens"]}
        # The library numbers added tokens anew where they leave a gap.
        for i in made.get_added_tokens_decoder():
            if i not in given:
                raise UserError(f"added tokens do not follow the vocabulary ({i}); number them so")
        return made

    @functools.cached_property
    def _fallback(self) -> bool:
        """Whether bytes are tokens of their own, and spaces are U+2581; else all is bytes."""
        if self._spec["model"].get("byte_fallback"):
            return True
        if "ByteLevel" in _types(self._spec.get("decoder")):
            return False
        raise UserError(
            "the tokenizer is neither byte-level nor has it byte fallback, so it loses bytes"
        )

    @functools.cached_property
    def _pieces(self) -> dict[int, bytes]:
        """Bytes of every id; ids that no token has stand for nothing."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        added = self._tokenizer.get_added_tokens_decoder()
        size = 1 + max([*vocabulary.values(), *added])
        pieces = dict.fromkeys(range(size), b"")
        unknown = self._spec["model"].get("unk_token")
        for piece, i in vocabulary.items():
            pieces[i] = self._bytes_of(piece) if piece != unknown else b""
        for i, token in added.items():
            text = token.content.replace(_SPACE, " ") if self._fallback else token.content
            pieces[i] = b"" if token.special else text.encode()
        return pieces

    def _bytes_of(self, piece: str) -> bytes:
        if not self._fallback:
            return bytes(_alphabet()[character] for character in piece)
        byte = _BYTE.fullmatch(piece)
        if byte is not None:
            return bytes.fromhex(byte[1])
        return piece.replace(_SPACE, " ").encode()

    @functools.cached_property
    def _byte_ids(self) -> dict[int, int]:
        """Id of every byte value that has one of its own."""
        find = self._tokenizer.token_to_id
        named = {f"<0x{byte:02X}>": byte for byte in range(256)}
        names = named if self._fallback else _alphabet()
        return {byte: i for name, byte in names.items() if (i := find(name)) is not None}

    @functools.cached_property
    def _missing(self) -> bytes:
        return bytes(set(range(256)) - set(self._byte_ids))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return len(self._pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file and the special ids."""
        special = f"{self.pad_id},{self.bos_id},{self.eos_id},{self.chat_template}"
        return hashlib.sha256(self.model + special.encode()).hexdigest()

    def special_id(self, token: str) -> int:
        """Id of a special token by its text, such as ``"<|im_start|>"``.

        Raises:
            UserError: there is none.
        """
        i = self._tokenizer.token_to_id(token)
        if i is None or self._pieces[i]:
            raise UserError(f"{token!r} is not a special token of this tokenizer")
        return i

    def text_of(self, special: int) -> str:
        """How the published files write a special token."""
        return self._tokenizer.id_to_token(special) or ""

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of ``text``; bytes that are not UTF-8 become byte tokens.

        Raises:
            UserError: there is a byte that the vocabulary has no token for.
        """
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if len(data.translate(None, self._missing)) != len(data):
            byte = next(byte for byte in data if byte in self._missing)
            raise UserError(
                f"the tokenizer has no token for byte 0x{byte:02x}; take it out of the text"
            )
        escaped = _BROKEN_OR_SPACE if self._fallback else _BROKEN
        plain, *rest = escaped.split(data.decode("utf-8", "surrogateescape"))
        ids = list(self._encode(plain))
        for broken, plain in zip(rest[::2], rest[1::2], strict=True):
            ids += [self._byte_ids[b] for b in broken.encode("utf-8", "surrogateescape")]
            ids += self._encode(plain)
        return ids

    def _encode(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of ``ids``; special ids decode to nothing."""
        return join_pieces(self._pieces, ids)


def _types(part: Any) -> Iterator[str]:
    """Names of all parts of a pipeline."""
    if isinstance(part, dict):
        yield from [part["type"]] if "type" in part else []
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, list):
        for item in part:
            yield from _types(item)


def _without_unicode_forms(normalizer: Any) -> Any:
    if normalizer is None or normalizer["type"] in ("NFC", "NFD", "NFKC", "NFKD"):
        return None
    if normalizer["type"] == "Sequence":
        parts = [_without_unicode_forms(part) for part in normalizer["normalizers"]]
        return normalizer | {"normalizers": [part for part in parts if part is not None]}
    return normalizer


@functools.cache
def _alphabet() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for: visible ones are themselves."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    shifted = {chr(256 + number): byte for number, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in visible} | shifted

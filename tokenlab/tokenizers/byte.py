"""The tokenizer with nothing to train: one id per byte."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tokenlab.core.errors import UserError
from tokenlab.tokenizers.base import Tokenizer, TokenizerTrainer

_SPECIAL = 3  # pad, bos, eos come before the bytes
_PIECES = {i: b"" for i in range(_SPECIAL)} | {i + _SPECIAL: bytes([i]) for i in range(256)}


def join_pieces(pieces: Mapping[int, bytes], ids: Sequence[int]) -> bytes:
    """Concatenates the bytes that each id stands for.

    Args:
        pieces: bytes of every id of the vocabulary.
        ids: token ids; a list, or an integer array of rank 1.

    Raises:
        UserError: an id is outside the vocabulary.
    """
    try:
        return b"".join(map(pieces.__getitem__, np.asarray(ids, dtype=np.int64).tolist()))
    except KeyError as error:
        raise UserError(
            f"token id {error} is outside the vocabulary of {len(pieces)}; "
            "decode with the tokenizer the ids were made with"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizer(Tokenizer, TokenizerTrainer):
    """Byte ``b`` is id ``b + 3``; 259 ids with the special ones. Its own trainer."""

    @property
    def vocab_size(self) -> int:
        """259: three special ids and 256 bytes."""
        return len(_PIECES)

    @property
    def fingerprint(self) -> str:
        """The same for every byte tokenizer."""
        return hashlib.sha256(b"ByteTokenizer").hexdigest()

    def fit(self, texts: Iterable[bytes]) -> ByteTokenizer:
        """Returns itself and reads nothing of ``texts``."""
        return self

    def encode(self, text: str | bytes) -> list[int]:
        """One id per byte; text is encoded as UTF-8, lone surrogates included."""
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return (np.frombuffer(data, dtype=np.uint8).astype(np.int64) + _SPECIAL).tolist()

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of ``ids``; special ids decode to nothing."""
        return join_pieces(_PIECES, ids)

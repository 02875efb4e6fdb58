"""The tokenizer family: text to ids and back, without losing a byte."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence


class Tokenizer(abc.ABC):
    """Maps bytes to token ids and back: ``decode(encode(x)) == x`` for every byte string.

    Ids ``pad_id``, ``bos_id`` and ``eos_id`` stand for no bytes; ``encode`` never emits them.
    """

    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hex digest that is equal exactly when two tokenizers encode alike."""

    @abc.abstractmethod
    def encode(self, text: str | bytes) -> list[int]:
        """Ids of ``text``; bytes that are not UTF-8 are kept as byte tokens."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of ``ids``; special ids decode to nothing."""


class TokenizerTrainer(abc.ABC):
    """A declarative recipe for a tokenizer: the experiment names it, the run fits it."""

    @abc.abstractmethod
    def fit(self, texts: Iterable[bytes]) -> Tokenizer:
        """Trains on ``texts``; the same texts and recipe give the same tokenizer."""

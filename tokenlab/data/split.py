"""Train and held-out parts by a hash of each document's content.

The part of a document depends on its bytes alone: copies never straddle the split, and neither
order nor the presence of other documents moves one.
"""

from __future__ import annotations

import abc
import difflib
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenlab.data.base import Document

SPLITS = ("train", "held_out")


class Index(NamedTuple):
    """Which documents each split holds.

    Attributes:
        numbers: of the documents of each split, in order, int64.
        fingerprint: of the content of both splits, in order.
    """

    numbers: dict[str, np.ndarray]
    fingerprint: str


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether the hash of ``text``, uniform on [0, 1), is below ``fraction``."""
    return _uniform(_digest(text)) < fraction


def index_documents(texts: Iterable[bytes], fraction: float) -> Index:
    """Reads every document once and assigns it to a split.

    Args:
        texts: all documents, in order.
        fraction: expected share of held-out documents.
    """
    numbers: dict[str, list[int]] = {split: [] for split in SPLITS}
    content = hashlib.sha256()
    for number, text in enumerate(texts):
        digest = _digest(text)
        held_out = _uniform(digest) < fraction
        numbers[SPLITS[held_out]].append(number)
        content.update(digest + bytes([held_out]))
    arrays = {split: np.array(found, dtype=np.int64) for split, found in numbers.items()}
    return Index(arrays, content.hexdigest())


# Not Sequence[Document]: run-time type checks would read a document to see its type.
class Records(Sequence):
    """Documents by number, read when asked for."""

    @abc.abstractmethod
    def read(self, number: int) -> Document:
        """The document at ``number``, which is in range."""

    def __getitem__(self, index: Any) -> Any:
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return Subset(self, np.array(chosen, dtype=np.int64))
        return self.read(chosen)


class Subset(Records):
    """The documents of ``records`` at ``numbers``."""

    def __init__(self, records: Records, numbers: np.ndarray):
        self._records = records
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int) -> Document:
        """The document at ``number`` of the subset."""
        return self._records.read(int(self._numbers[number]))


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message about a wrong ``name``: the likely one, or all of them."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {names}"


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def _uniform(digest: bytes) -> float:
    return int.from_bytes(digest[:6], "big") / 2**48

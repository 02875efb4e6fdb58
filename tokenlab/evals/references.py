"""What a language model has to beat: figures that need no training by gradient."""

from __future__ import annotations

import dataclasses
import lzma

import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.data.base import Corpus
from tokenlab.evals.base import Evaluation
from tokenlab.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressor(Evaluation):
    """Bits per byte of the held-out documents under xz, which has seen nothing else.

    Attributes:
        corpus: where the documents come from.
        split: which part of the corpus.
        preset: effort of xz, 0 to 9.
    """

    corpus: Corpus
    split: str = "held_out"
    preset: int = 9

    def __call__(
        self, *, model: nn.Module, params: PyTree, tokenizer: Tokenizer
    ) -> dict[str, float]:
        """Size of all documents compressed as one stream, over their size."""
        text = b"".join(document.text for document in self.corpus.documents(self.split))
        packed = lzma.compress(text, preset=self.preset | lzma.PRESET_EXTREME)
        return {"bits_per_byte": 8 * len(packed) / len(text), "bytes": len(text)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteNgram(Evaluation):
    """Bits per byte of the held-out documents under a byte n-gram of the training documents.

    Interpolated Witten-Bell estimates, down to the uniform distribution over bytes:
    ``p_k(b | c) = (n(c b) + t(c) p_{k-1}(b | c')) / (n(c) + t(c))``, where t(c) counts the
    distinct bytes seen after context c, and c' is c without its first byte.

    Reference: Witten and Bell, "The Zero-Frequency Problem: Estimating the Probabilities of Novel
    Events in Adaptive Text Compression", 1991 (method C).

    Attributes:
        corpus: where the documents come from.
        order: bytes of an n-gram, context included; at most 8.
        max_bytes: training bytes read, or None for all.
    """

    corpus: Corpus
    order: int = 6
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 8:
            raise ValueError(f"order {self.order} must be in 1..8")

    def __call__(
        self, *, model: nn.Module, params: PyTree, tokenizer: Tokenizer
    ) -> dict[str, float]:
        """Trains on the training split, scores the held-out one."""
        train, read = [], 0
        for document in self.corpus.documents("train"):
            if self.max_bytes is not None and read >= self.max_bytes:
                break
            train.append(document.text)
            read += len(document.text)
        held_out = [document.text for document in self.corpus.documents("held_out")]
        size = sum(map(len, held_out))
        bits = -np.log2(witten_bell(train, held_out, order=self.order)).sum()
        return {"bits_per_byte": float(bits) / size, "bytes": size, "train_bytes": read}


def witten_bell(train: list[bytes], test: list[bytes], *, order: int) -> np.ndarray:
    """Probability of every byte of ``test`` under the Witten-Bell n-gram of ``train``.

    Args:
        train: documents to count.
        test: documents to score.
        order: longest n-gram, 1 to 8 bytes.

    Returns:
        float64, one probability per byte, documents in order. Contexts reach to the start of
        their document, which is filled with zero bytes before it.
    """
    train_grams, test_grams = _grams(train, order), _grams(test, order)
    probability = np.full(len(test_grams), 1 / 256)
    for k in range(1, order + 1):
        mask = np.uint64((1 << (8 * k)) - 1)
        grams, counts = np.unique(train_grams & mask, return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(grams)))
        wanted = test_grams & mask
        seen = _lookup(grams, counts, wanted)
        total = _lookup(contexts, totals, wanted >> np.uint64(8))
        distinct = _lookup(contexts, kinds, wanted >> np.uint64(8))
        known = total > 0
        mixed = (seen + distinct * probability) / np.where(known, total + distinct, 1)
        probability = np.where(known, mixed, probability)
    return probability


def _grams(documents: list[bytes], order: int) -> np.ndarray:
    """The ``order`` bytes that end at each position, newest lowest, as one uint64."""
    found = []
    for text in documents:
        padded = np.frombuffer(bytes(order - 1) + text, np.uint8).astype(np.uint64)
        gram = np.zeros(len(text), np.uint64)
        for back in range(order):
            stop = len(padded) - back
            gram |= padded[stop - len(text) : stop] << np.uint64(8 * back)
        found.append(gram)
    return np.concatenate(found)


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Value of each wanted key among sorted ``keys``, 0 where absent."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)

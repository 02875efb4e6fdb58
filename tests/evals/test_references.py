"""The n-gram against a dictionary of counts, and as a probability."""

import lzma

import numpy as np
import pytest
from flax import linen as nn

from tokenlab.data.base import Corpus, Document
from tokenlab.evals import Compressor, witten_bell
from tokenlab.tokenizers import ByteTokenizer


def by_hand(train, document, order):
    """Witten-Bell from dictionaries, one byte at a time."""

    def context_of(text, i, k):
        return (bytes(order - 1) + text)[i + order - 1 - k : i + order - 1]

    counts = {}
    for text in train:
        for i, byte in enumerate(text):
            for k in range(order):
                seen = counts.setdefault(context_of(text, i, k), {})
                seen[byte] = seen.get(byte, 0) + 1

    def probability(context, byte):
        lower = probability(context[1:], byte) if context else 1 / 256
        seen = counts.get(context)
        if seen is None:
            return lower
        total, kinds = sum(seen.values()), len(seen)
        return (seen.get(byte, 0) + kinds * lower) / (total + kinds)

    return [
        probability(context_of(document, i, order - 1), byte) for i, byte in enumerate(document)
    ]


@pytest.mark.parametrize("order", [1, 2, 4, 8])
def test_matches_dictionaries(order):
    rng = np.random.default_rng(order)
    train = [bytes(rng.integers(97, 101, size=n).astype(np.uint8)) for n in (30, 1, 50)]
    test = [b"abcdabcdzz", b"d"]
    expected = [p for text in test for p in by_hand(train, text, order)]
    np.testing.assert_allclose(witten_bell(train, test, order=order), expected, rtol=1e-12)


def test_sums_to_one_over_the_next_byte():
    train = [b"the cat sat on the mat", b"the dog"]
    for context in (b"the ", b"q", b""):
        total = sum(
            witten_bell(train, [context + bytes([byte])], order=4)[-1] for byte in range(256)
        )
        np.testing.assert_allclose(total, 1.0, rtol=1e-12)


class Memory(Corpus):
    fingerprint = "memory"

    def documents(self, split):
        return [Document(b"abc" * 100, "a"), Document(b"xyz" * 50, "b")]


def test_compressor_counts_the_compressed_bytes():
    figures = Compressor(corpus=Memory())(model=nn.Module(), params={}, tokenizer=ByteTokenizer())
    packed = lzma.compress(b"abc" * 100 + b"xyz" * 50, preset=9 | lzma.PRESET_EXTREME)
    assert figures == {"bits_per_byte": 8 * len(packed) / 450, "bytes": 450}

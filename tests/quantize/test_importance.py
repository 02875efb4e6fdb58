"""Attention received against whole attention matrices, and how scores become weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_sparse_attention import Causal, SlidingWindow
from tokenlab.quantize import (
    ActivationNorm,
    AttentionConcentration,
    FirstAndLastPositions,
    FirstPositions,
    LayerView,
    TokenRarity,
    attention_received,
)

LENGTHS = (13, 7)
CAUSAL = Causal()


def view(seed=0, length=13, rule=CAUSAL, softcap=None, segments=None):
    rng = np.random.default_rng(seed)
    rows = len(LENGTHS)
    place = np.broadcast_to(np.arange(length), (rows, length))
    if segments is None:
        segments = (place < np.array(LENGTHS)[:, None]).astype(np.int32)
    tokens = rng.integers(0, 5, (rows, length))
    occurs = np.bincount(tokens[segments > 0], minlength=5)
    return LayerView(
        tokens=jnp.asarray(tokens, jnp.int32),
        counts=jnp.asarray(np.maximum(occurs, 1)[tokens], jnp.int32),
        positions=jnp.asarray(place, jnp.int32),
        segments=jnp.asarray(segments, jnp.int32),
        hidden=jnp.asarray(rng.normal(size=(rows, length, 8)), jnp.float32),
        queries=jnp.asarray(rng.normal(size=(rows, length, 6, 4)), jnp.float32),
        keys=jnp.asarray(rng.normal(size=(rows, length, 2, 4)), jnp.float32),
        rule=rule,
        scale=0.7,
        softcap=softcap,
    )


def whole(layer):
    """Column sums of every head's matrix, in float64, entry by entry."""
    q, k = np.asarray(layer.queries, np.float64), np.asarray(layer.keys, np.float64)
    batch, length, heads, _ = q.shape
    total = np.zeros((batch, length))
    for b in range(batch):
        seen = np.asarray(
            layer.rule(
                layer.positions[b, :, None],
                layer.positions[b, None],
                layer.segments[b, :, None],
                layer.segments[b, None],
            )
        )
        for h in range(heads):
            scores = layer.scale * q[b, :, h] @ k[b, :, h // (heads // k.shape[2])].T
            if layer.softcap is not None:
                scores = layer.softcap * np.tanh(scores / layer.softcap)
            for i in range(length):
                if seen[i].any():
                    chances = np.where(seen[i], np.exp(scores[i] - scores[i].max()), 0.0)
                    total[b] += chances / chances.sum()
    return total


@pytest.mark.parametrize("block", [1, 4, 13, 128])
@pytest.mark.parametrize(
    "options", [{}, {"rule": SlidingWindow(size=3), "softcap": 2.0}], ids=["causal", "window"]
)
def test_column_sums_are_those_of_the_whole_matrix(block, options):
    layer = view(**options)
    found = attention_received(layer, block=block)
    np.testing.assert_allclose(found, whole(layer), rtol=1e-5, atol=1e-6)
    # Each query of each head gives one: H T in all.
    np.testing.assert_allclose(jnp.sum(found, axis=1), 6 * np.array(LENGTHS), rtol=1e-6)


def test_padding_in_front_and_documents_in_a_row():
    segments = np.zeros((2, 13), np.int32)
    segments[0, 3:], segments[1, :6], segments[1, 6:] = 1, 1, 2
    layer = view(segments=segments)
    np.testing.assert_allclose(attention_received(layer, block=4), whole(layer), rtol=1e-5)


def test_the_matrix_is_never_in_memory():
    layer = view(length=512, segments=np.ones((2, 512), np.int32))
    run = jax.jit(lambda layer: attention_received(layer, block=16))
    memory = run.lower(layer).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 6 * 512 * 512 * 4 / 4


def test_scores_are_stretched_to_the_range_and_have_a_mean_of_one():
    layer = view(1)
    for lowest, highest in ((0.005, 1.0), (0.1, 0.5)):
        method = AttentionConcentration(lowest=lowest, highest=highest)
        stretched = np.asarray(method.unscaled(layer))
        weights = np.asarray(method(layer))
        for row, length in enumerate(LENGTHS):
            real = stretched[row, :length]
            np.testing.assert_allclose([real.min(), real.max()], [lowest, highest], rtol=1e-6)
            np.testing.assert_allclose(weights[row, :length].mean(), 1.0, rtol=1e-6)
            np.testing.assert_allclose(weights[row, :length] / real, weights[row, 0] / real[0])
            assert not weights[row, length:].any()
            received = whole(layer)[row, :length]
            expected = lowest + (highest - lowest) * (received - received.min()) / np.ptp(received)
            np.testing.assert_allclose(real, expected, rtol=2e-5, atol=1e-6)


def test_equal_scores_and_equal_ends_weigh_alike():
    layer = view()
    layer = layer.replace(counts=jnp.ones_like(layer.counts))
    np.testing.assert_array_equal(TokenRarity()(layer), layer.segments)
    flat = AttentionConcentration(lowest=0.3, highest=0.3)
    np.testing.assert_array_equal(flat(layer), layer.segments)


def test_first_and_last_tokens_are_of_the_row_and_not_of_its_padding():
    layer = view()
    np.testing.assert_array_equal(
        FirstPositions(count=3).unscaled(layer)[1, :7], [1, 1, 1, 0, 0, 0, 0]
    )
    both = FirstAndLastPositions(first=1, last=2)
    np.testing.assert_array_equal(both.unscaled(layer)[1, :7], [1, 0, 0, 0, 0, 1, 1])
    np.testing.assert_allclose(both(layer)[1], np.array([1, 0, 0, 0, 0, 1, 1] + [0] * 6) * 7 / 3)


def test_rare_tokens_and_large_activations_weigh_more():
    layer = view(2)
    for method, larger in (
        (TokenRarity(), -np.asarray(layer.counts, np.float64)),
        (ActivationNorm(), np.linalg.norm(layer.hidden, axis=-1)),
    ):
        weights = np.asarray(method(layer))
        for row, length in enumerate(LENGTHS):
            order = np.argsort(larger[row, :length], kind="stable")
            assert np.all(np.diff(weights[row, order]) >= -1e-6)


@pytest.mark.parametrize("ends", [(-0.1, 1.0), (0.5, 0.2), (0.0, 0.0)])
def test_a_range_upside_down_is_refused(ends):
    with pytest.raises(ValueError, match="must be 0 <= lowest <= highest"):
        AttentionConcentration(lowest=ends[0], highest=ends[1])

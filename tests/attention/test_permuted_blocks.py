"""The oracle checks of PBS-Attn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_sparse_attention import Bidirectional, block_sparse_attention
from tokenlab.attention import MassBudget, MeanPooledBlocks, PermutedBlocks

B, T, H, K, E = 2, 64, 4, 2, 16
BLOCK, SPAN = 8, 16
SCALE = 1.0


@functools.cache
def arrays(length=T):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (B, length, heads, E))
        for key, heads in zip(keys, (H, K, K), strict=True)
    )
    return q, k, v


def tokens(length=T):
    positions = jnp.broadcast_to(jnp.arange(length)[None], (B, length))
    return positions, jnp.ones_like(positions)


def selection(part):
    q, k, _ = arrays()
    return part.select(q=q, k=k, segments=tokens()[1], scale=SCALE)


@pytest.mark.parametrize("seed", range(3))
def test_attention_does_not_depend_on_the_order_of_keys(seed):
    q, k, v = arrays()
    positions, segments = tokens()
    order = np.random.default_rng(seed).permutation(T)
    every = jnp.broadcast_to(jnp.arange(T // BLOCK)[None, None], (B, T // BLOCK, T // BLOCK))

    def attend(k, v, kv_positions):
        return block_sparse_attention(
            q=q, k=k, v=v, q_positions=positions, kv_positions=kv_positions,
            q_segments=segments, kv_segments=segments, rule=Bidirectional(), scale=SCALE,
            blocks=every, block_shape=(BLOCK, BLOCK),
        )  # fmt: skip

    moved = attend(k[:, order], v[:, order], positions[:, order])
    np.testing.assert_allclose(moved, attend(k, v, positions), atol=1e-5)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_equals_dense_attention_under_the_expanded_mask(threshold):
    part = PermutedBlocks(block=BLOCK, span=SPAN, budget=MassBudget(threshold=threshold))
    q, k, v = arrays()
    positions, segments = tokens()
    chosen = selection(part)
    out = part(q=q, k=k, v=v, positions=positions, segments=segments, scale=SCALE).out
    assert 0 < chosen.kept.mean() < 1
    kept = np.repeat(np.repeat(chosen.kept, BLOCK, axis=2), BLOCK, axis=3)
    mask = kept & (np.arange(T)[:, None] >= np.asarray(chosen.order)[:, :, None, :])
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, h in np.ndindex(B, H):
        order = np.asarray(chosen.order)[b, h]
        scores = SCALE * q[b, :, h] @ k[b, order, h // (H // K)].T
        weights = np.where(mask[b, h], np.exp(scores), 0)
        dense = weights / weights.sum(axis=1, keepdims=True) @ v[b, order, h // (H // K)]
        np.testing.assert_allclose(out[b, :, h], dense, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_spans_of_one_block_choose_what_mean_pooling_chooses(threshold):
    """A mean does not know the order inside its block."""
    budget = MassBudget(threshold=threshold)
    ours = selection(PermutedBlocks(block=BLOCK, span=BLOCK, budget=budget))
    plain = selection(MeanPooledBlocks(block=BLOCK, span=BLOCK, budget=budget))
    assert np.any(np.asarray(ours.order) != np.arange(T))
    np.testing.assert_array_equal(ours.kept, plain.kept)


@pytest.mark.parametrize("length", [64, 71])
def test_keys_move_inside_complete_spans_only(length):
    q, k, _ = arrays(length)
    part = PermutedBlocks(block=BLOCK, span=SPAN)
    order = np.asarray(part.key_order(q=q, k=k, segments=tokens(length)[1], scale=SCALE))
    index, behind = np.broadcast_to(np.arange(length), order.shape), length // SPAN * SPAN
    np.testing.assert_array_equal(np.sort(order, axis=-1), index)
    np.testing.assert_array_equal(order // SPAN, index // SPAN)
    np.testing.assert_array_equal(order[..., behind:], index[..., behind:])
    assert np.any(order != index)


def test_the_kept_mass_reaches_the_threshold_and_no_block_is_one_too_many():
    threshold = 0.7
    part = PermutedBlocks(block=BLOCK, span=SPAN, budget=MassBudget(threshold=threshold))
    q, k, _ = arrays()
    chosen = selection(part)
    order = np.asarray(chosen.order)
    for b, h in np.ndindex(B, H):
        moved = np.asarray(k[b, :, h // (H // K)])[order[b, h]]
        means = (x.reshape(-1, BLOCK, E).mean(axis=1) for x in (np.asarray(q[b, :, h]), moved))
        queries, keys = means
        sink = int(np.flatnonzero(order[b, h] == 0)[0]) // BLOCK
        for i in range(T // BLOCK):
            earlier = i * BLOCK // SPAN * SPAN // BLOCK
            if not earlier:
                continue
            mass = np.exp(SCALE * keys[:earlier] @ queries[i])
            mass /= mass.sum()
            kept = np.asarray(chosen.kept[b, h, i, :earlier]).copy()
            best = np.flatnonzero(kept)
            assert mass[best].sum() >= threshold - 1e-6
            # The sink may be there by rule: without it the rest is the shortest prefix or shorter.
            if mass[sink] == mass[best].min():
                kept[sink] = False
                best = np.flatnonzero(kept)
            if mass[best].sum() >= threshold:
                assert mass[best].sum() - mass[best].min() < threshold + 1e-6


def test_a_threshold_of_one_keeps_every_block():
    """In float32 the sum of many masses may end below one."""
    part = PermutedBlocks(block=BLOCK, span=SPAN, budget=MassBudget(threshold=1.0))
    chosen = selection(part)
    everything = chosen.blocks.candidates | chosen.blocks.own
    np.testing.assert_array_equal(chosen.kept, np.broadcast_to(everything, chosen.kept.shape))


def test_a_row_of_one_span_is_dense():
    q, k, v = (x[:, :SPAN] for x in arrays())
    positions, segments = tokens(SPAN)
    inputs = {"q": q, "k": k, "v": v, "positions": positions, "segments": segments}
    out = PermutedBlocks(block=BLOCK, span=SPAN, budget=MassBudget(threshold=0.1))(
        **inputs, scale=SCALE
    )
    every = PermutedBlocks(block=BLOCK, span=SPAN, budget=MassBudget(threshold=1.0))
    np.testing.assert_allclose(out.out, every(**inputs, scale=SCALE).out, atol=1e-6)
    assert np.all(out.density == 1)

"""Lists of blocks at run time, log-sum-exps and their merge, and the order of keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.block_sparse_attention import (
    NOTHING,
    Bidirectional,
    BlockSparseAttentionConfig,
    Causal,
    SlidingWindow,
    merge_partial,
    partial_attention,
    tpu,
)

B, T, H, K, E = 2, 23, 4, 2, 8
BLOCK_Q, BLOCK_K = 8, 4
CONFIG = BlockSparseAttentionConfig(block=8, block_q=BLOCK_Q, block_k=BLOCK_K, interpret=True)
IMPLS = ["xla", "tpu"]
# Any order, holes, repetition, what is no block, an empty list; 6 blocks of keys, the last ragged.
LISTS = jnp.asarray(
    [
        [[0, 5, -1, -1], [2, 0, 2, 5], [5, 4, 9, 0]],
        [[-1, -1, 1, 0], [-1, -1, -1, -1], [3, 4, 5, 1]],
    ]
)


def _tokens(seed=0):
    """Two packed documents with padding after them, and one document with gaps."""
    segments = np.array([[1] * 9 + [2] * 11 + [0] * 3, [1] * T])
    positions = np.array([[*range(9), *range(11), *range(3)], [2 * i for i in range(T)]])
    return jnp.asarray(positions), jnp.asarray(segments)


def _arrays(seed=0):
    """Queries, keys, values; cotangents of the result and of its log-sum-exp."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = [(B, T, H, E), (B, T, K, E), (B, T, K, E), (B, T, H, E), (B, T, H)]
    q, k, v, *cotangents = (
        jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)
    )
    return (q, k, v), tuple(cotangents)


@functools.partial(jax.jit, static_argnames=("rule", "impl", "softcap"))
def _run(arrays, tokens, blocks=None, kv_tokens=None, *, rule, impl, softcap=None):
    (q, k, v), (positions, segments) = arrays, tokens
    kv_positions, kv_segments = tokens if kv_tokens is None else kv_tokens
    return partial_attention(
        q=q,
        k=k,
        v=v,
        q_positions=positions,
        kv_positions=kv_positions,
        q_segments=segments,
        kv_segments=kv_segments,
        rule=rule,
        scale=E**-0.5,
        softcap=softcap,
        blocks=blocks,
        block_shape=(BLOCK_Q, BLOCK_K),
        impl=impl,
        config=CONFIG,
    )


@functools.partial(jax.jit, static_argnames=("rule", "impl", "softcap"))
def _both(arrays, cotangents, tokens, blocks=None, *, rule, impl, softcap=None):
    """Both results, and the gradients under ``cotangents``."""
    run = functools.partial(_run, rule=rule, impl=impl, softcap=softcap)
    out, pull_back = jax.vjp(lambda arrays: run(arrays, tokens, blocks), arrays)
    return out, pull_back(cotangents)[0]


def _assert_equal(ours, expected, atol=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def _loop(arrays, tokens, blocks, rule):
    """Float64, one query and one key at a time: result and log-sum-exp."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    shown = np.array(rule(*(side for x in tokens for side in (x[:, :, None], x[:, None]))))
    out, log_sum_exp = np.zeros(q.shape), np.full(q.shape[:3], NOTHING)
    for b, t, h in np.ndindex(q.shape[:3]):
        keys = [
            s
            for s in range(k.shape[1])
            if shown[b, t, s] and s // BLOCK_K in np.asarray(blocks[b, t // BLOCK_Q])
        ]
        if keys:
            head = h // (H // K)
            scores = k[b, keys, head] @ q[b, t, h] * E**-0.5
            log_sum_exp[b, t, h] = np.log(np.sum(np.exp(scores)))
            out[b, t, h] = np.exp(scores - log_sum_exp[b, t, h]) @ v[b, keys, head]
    return out, log_sum_exp


@pytest.mark.parametrize("impl", ["ref", *IMPLS])
def test_lists_replace_the_map_and_the_rule_still_holds(impl):
    arrays, _ = _arrays()
    for rule in (Causal(), Bidirectional()):
        expected = _loop(arrays, _tokens(), LISTS, rule)
        _assert_equal(_run(arrays, _tokens(), LISTS, rule=rule, impl=impl), expected, 3e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("rule", "softcap", "blocks"),
    [
        (Causal(), None, LISTS),
        (Bidirectional(), 0.7, LISTS),
        (SlidingWindow(size=5), 0.7, None),
    ],
    ids=["causal-lists", "softcap-lists", "window-map"],
)
def test_gradients_through_both_results_agree_with_ref(rule, softcap, blocks, impl):
    arrays, cotangents = _arrays()
    tokens = _tokens()
    run = functools.partial(_both, arrays, cotangents, tokens, blocks, rule=rule, softcap=softcap)
    _assert_equal(run(impl=impl), run(impl="ref"))


@pytest.mark.parametrize("impl", ["ref", *IMPLS])
def test_what_no_list_names_gets_no_gradient(impl):
    """Block 1 of keys is in no list of row 0, and queries 8 to 15 of row 1 have an empty one."""
    arrays, cotangents = _arrays()
    (out, log_sum_exp), gradients = _both(
        arrays, cotangents, _tokens(), LISTS, rule=Bidirectional(), impl=impl
    )
    empty = np.s_[1, 8:16]
    assert not np.any(out[empty])
    np.testing.assert_allclose(log_sum_exp[empty], NOTHING, rtol=1e-6)
    assert not np.any(gradients[0][empty])
    for gradient in gradients[1:]:
        assert not np.any(gradient[0, 4:8])
    assert all(np.all(np.isfinite(x)) and np.any(x) for x in gradients)


def test_rows_whose_lists_overflow_the_scalar_memory_are_taken_in_turn(monkeypatch):
    arrays, cotangents = _arrays()
    expected = _both(arrays, cotangents, _tokens(), LISTS, rule=Causal(), impl="ref")
    room = 4 * (LISTS.shape[1] * LISTS.shape[2] + 6)
    monkeypatch.setattr(tpu, "_LIST_BYTES", room)  # of one row
    jax.clear_caches()  # of what was traced with another size
    ours = _both(arrays, cotangents, _tokens(), LISTS, rule=Causal(), impl="tpu")
    _assert_equal(ours, expected)
    monkeypatch.setattr(tpu, "_LIST_BYTES", room - 1)
    with pytest.raises(ValueError, match="1 rows of 18 pairs of blocks overflow"):
        jax.clear_caches()
        _both(arrays, cotangents, _tokens(), LISTS, rule=Causal(), impl="tpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_all_lists_empty_is_zero(impl):
    arrays, cotangents = _arrays()
    (out, _), gradients = _both(
        arrays, cotangents, _tokens(), jnp.full_like(LISTS, -1), rule=Causal(), impl=impl
    )
    for leaf in (out, *gradients):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))


@pytest.mark.parametrize("impl", ["ref", *IMPLS])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0, 1))
def test_results_over_disjoint_keys_merge(impl, seed, share):
    """Every block of keys goes to one of three lists; some lists come out empty."""
    rng = np.random.default_rng(seed)
    arrays, _ = _arrays(seed)
    part = np.where(rng.random((B, 3, 6)) < share, 0, rng.integers(0, 3, (B, 3, 6)))
    lists = [jnp.asarray(np.where(part == i, np.arange(6), -1)) for i in range(3)]
    run = functools.partial(_run, arrays, _tokens(), rule=Causal(), impl=impl)
    outs, log_sum_exps = zip(*map(run, lists), strict=True)
    merged = merge_partial(jnp.stack(outs), jnp.stack(log_sum_exps))
    _assert_equal(merged, _run(arrays, _tokens(), rule=Causal(), impl="ref"))


@pytest.mark.parametrize("impl", ["ref", *IMPLS])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_order_of_keys_does_not_matter(impl, seed):
    """With every block listed, so that nothing is skipped by index."""
    arrays, _ = _arrays(seed)
    order = np.random.default_rng(seed).permutation(T)
    q, k, v = arrays
    moved = (q, k[:, order], v[:, order])
    kv_tokens = tuple(x[:, order] for x in _tokens())
    every = jnp.broadcast_to(jnp.arange(6)[None, None], (B, 3, 6))
    ours = _run(moved, _tokens(), every, kv_tokens, rule=Causal(), impl=impl)
    _assert_equal(ours, _run(arrays, _tokens(), rule=Causal(), impl="ref"))


@pytest.mark.parametrize("impl", IMPLS)
def test_fewer_queries_than_keys_need_only_a_list(impl):
    (q, k, v), _ = _arrays()
    positions, segments = _tokens()
    last = np.s_[:, 16:]
    blocks = jnp.broadcast_to(jnp.arange(6)[None, None], (B, 1, 6))
    part = _run(
        (q[last], k, v),
        (positions[last], segments[last]),
        blocks,
        (positions, segments),
        rule=Causal(),
        impl=impl,
    )
    whole = _run((q, k, v), _tokens(), rule=Causal(), impl="ref")
    _assert_equal(part, tuple(x[last] for x in whole))


def test_merging_what_sees_nothing_is_nothing_and_has_finite_gradients():
    outs, log_sum_exps = jnp.zeros((2, 1, 3, 1, 4)), jnp.full((2, 1, 3, 1), NOTHING)
    (out, log_sum_exp), pull_back = jax.vjp(merge_partial, outs, log_sum_exps)
    assert not np.any(out)
    np.testing.assert_allclose(log_sum_exp, NOTHING, rtol=1e-6)
    for gradient in pull_back((jnp.ones_like(out), jnp.ones_like(log_sum_exp))):
        assert np.all(np.isfinite(gradient))


def test_lists_for_another_number_of_blocks_are_named():
    arrays, _ = _arrays()
    with pytest.raises(ValueError, match="blocks has 2 rows; 23 queries are 3 blocks of 8"):
        _run(arrays, _tokens(), LISTS[:, :2], rule=Causal(), impl="ref")

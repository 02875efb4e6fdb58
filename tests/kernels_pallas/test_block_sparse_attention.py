"""Every implementation against a float64 loop over pairs, and the block maps against the rules."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.block_sparse_attention import (
    Bidirectional,
    BlockSparseAttentionConfig,
    Causal,
    SlidingWindow,
    block_sparse_attention,
)

B, T, H, E = 2, 23, 4, 8
RULES = [Causal(), SlidingWindow(size=5), Bidirectional()]
CASES = [
    (Causal(), H, None),
    (Causal(), 2, 0.7),
    (SlidingWindow(size=5), 2, None),
    (SlidingWindow(size=5), 1, 0.7),
    (Bidirectional(), 2, 0.7),
]


def _packed():
    """One row of two documents and padding, one of padding on both sides of a document."""
    segments = np.array([[1] * 9 + [2] * 11 + [0] * 3, [0] * 4 + [1] * 17 + [0] * 2])
    starts = [[9, 11, 3], [4, 17, 2]]
    positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in starts])
    return jnp.asarray(positions), jnp.asarray(segments)


def _arrays(kv_heads=H, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (B, T, H, E)).astype(dtype)
    k, v = (jax.random.normal(key, (B, T, kv_heads, E)).astype(dtype) for key in keys[1:3])
    return (q, k, v), jax.random.normal(keys[3], (B, T, H, E))


def _attend(arrays, rule, impl, block=None, softcap=None, kept=slice(None), tokens=None):
    q, k, v = arrays
    positions, segments = _packed() if tokens is None else tokens
    return block_sparse_attention(
        q=q,
        k=k,
        v=v,
        q_positions=positions[:, kept],
        kv_positions=positions,
        q_segments=segments[:, kept],
        kv_segments=segments,
        rule=rule,
        scale=E**-0.5,
        softcap=softcap,
        impl=impl,
        config=BlockSparseAttentionConfig(block=block),
    )


@functools.partial(jax.jit, static_argnames=("rule", "impl", "block", "softcap"))
def _both(arrays, cotangent, tokens, *, rule, impl, block=8, softcap=None):
    """The result, and the gradients under ``cotangent``."""
    attend = functools.partial(
        _attend, rule=rule, impl=impl, block=block, softcap=softcap, tokens=tokens
    )
    out, pull_back = jax.vjp(attend, arrays)
    return out, pull_back(cotangent.astype(out.dtype))[0]


def _visible(rule, distance):
    match rule:
        case Causal():
            return distance >= 0
        case SlidingWindow(size=size):
            return 0 <= distance < size
        case _:
            return True


def _loop(arrays, rule, softcap=None):
    """Float64, one query and one key at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in arrays)
    positions, segments = (np.asarray(x) for x in _packed())
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        weights, values = [], []
        for s in range(k.shape[1]):
            same = segments[b, s] == segments[b, t] and segments[b, s] != 0
            if same and _visible(rule, positions[b, t] - positions[b, s]):
                score = q[b, t, h] @ k[b, s, h // group] * E**-0.5
                score = score if softcap is None else softcap * np.tanh(score / softcap)
                weights.append(np.exp(score))
                values.append(v[b, s, h // group])
        if weights:
            out[b, t, h] = np.array(weights) @ np.array(values) / np.sum(weights)
    return out


def _slopes(arrays, cotangent, rule, softcap):
    """(array, index, finite difference of the loop) for a few entries of each array."""
    arrays = [np.array(x, np.float64) for x in arrays]
    cotangent, rng = np.asarray(cotangent, np.float64), np.random.default_rng(0)
    for which, array in enumerate(arrays):
        for _ in range(3):
            index = tuple(rng.integers(array.shape))
            original, ends = array[index], []
            for step in (1e-5, -1e-5):
                array[index] = original + step
                ends.append(np.sum(cotangent * _loop(arrays, rule, softcap)))
            array[index] = original
            yield which, index, (ends[0] - ends[1]) / 2e-5


@pytest.mark.parametrize(("rule", "kv_heads", "softcap"), CASES, ids=str)
def test_values_and_gradients_equal_a_float64_loop(rule, kv_heads, softcap):
    """Blocks of 8 leave the last one of 23 tokens ragged."""
    arrays, cotangent = _arrays(kv_heads)
    expected = _loop(arrays, rule, softcap)
    slopes = list(_slopes(arrays, cotangent, rule, softcap))
    run = functools.partial(_both, arrays, cotangent, _packed(), rule=rule, softcap=softcap)
    results = [run(impl="ref"), run(impl="xla")]
    for out, gradients in results:
        np.testing.assert_allclose(out, expected, atol=3e-6)
        for which, index, slope in slopes:
            np.testing.assert_allclose(gradients[which][index], slope, atol=2e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("block", [None, 3, 1])
def test_every_block_size_gives_the_same(block):
    arrays, cotangent = _arrays()
    expected = _both(arrays, cotangent, _packed(), rule=Causal(), impl="ref")
    ours = _both(arrays, cotangent, _packed(), rule=Causal(), impl="xla", block=block)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_queries_that_see_nothing_are_zero_and_so_are_their_gradients(impl):
    arrays, cotangent = _arrays()
    padding = _packed()[1] == 0
    out, gradients = _both(arrays, cotangent, _packed(), rule=Causal(), impl=impl)
    for leaf in (out, *gradients):
        assert not np.any(leaf[padding])
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf[~padding])
    nothing = (jnp.zeros((B, T), int), jnp.zeros((B, T), int))
    for leaf in jax.tree.leaves(_both(arrays, cotangent, nothing, rule=Causal(), impl=impl)):
        assert not np.any(leaf)


def test_bfloat16_rounds_only_probabilities_and_results():
    rule = SlidingWindow(size=5)
    arrays, cotangent = _arrays(kv_heads=2, dtype=jnp.bfloat16)
    exact = tuple(x.astype(jnp.float32) for x in arrays)
    expected = _both(exact, cotangent, _packed(), rule=rule, impl="ref")[1]
    for impl in ("ref", "xla"):
        out, gradients = _both(arrays, cotangent, _packed(), rule=rule, impl=impl)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), _loop(exact, rule), atol=0.02)
        for a, b in zip(gradients, expected, strict=True):
            assert a.dtype == jnp.bfloat16
            scale = float(jnp.max(jnp.abs(b)))
            np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * scale)


def test_huge_scores_do_not_overflow():
    (q, k, v), cotangent = _arrays()
    arrays = (q * 1e4, k, v)
    out, gradients = _both(arrays, cotangent, _packed(), rule=Causal(), impl="xla")
    expected = _both(arrays, cotangent, _packed(), rule=Causal(), impl="ref")[0]
    np.testing.assert_allclose(out, expected, atol=1e-3)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_the_last_queries_of_a_longer_sequence():
    """Chunked prefill: fewer queries than keys."""
    (q, k, v), _ = _arrays()
    kept = slice(T - 6, T)
    for rule in RULES:
        whole = _attend((q, k, v), rule, "ref")
        part = _attend((q[:, kept], k, v), rule, None, 4, kept=kept)
        np.testing.assert_allclose(part, whole[:, kept], atol=1e-6)
    part = _attend((q[:, kept], k, v), Bidirectional(), "xla", 4, kept=kept)
    np.testing.assert_allclose(part, whole[:, kept], atol=1e-6)
    with pytest.raises(ValueError, match=r"as many queries \(6\) as keys \(23\)"):
        _attend((q[:, kept], k, v), Causal(), "xla", 4, kept=kept)


def test_a_row_out_of_order_is_nan_and_the_others_are_right():
    arrays, cotangent = _arrays()
    positions, segments = _packed()
    tokens = (positions.at[0, :9].set(positions[0, :9][::-1]), segments)
    out, _ = _both(arrays, cotangent, tokens, rule=Causal(), impl="xla")
    expected, _ = _both(arrays, cotangent, tokens, rule=Causal(), impl="ref")
    assert np.all(np.isnan(out[0]))
    np.testing.assert_allclose(out[1], expected[1], atol=3e-6)
    # One block skips nothing, so it takes any order.
    whole, _ = _both(arrays, cotangent, tokens, rule=Causal(), impl="xla", block=None)
    np.testing.assert_allclose(whole, expected, atol=3e-6)


def test_segments_that_interleave_are_not_skipped_over():
    """A window by index would miss keys of the own segment that lie between foreign tokens."""
    arrays, cotangent = _arrays()
    segments = jnp.broadcast_to(1 + jnp.arange(T) % 2, (B, T))
    positions = jnp.broadcast_to(jnp.arange(T) // 2, (B, T))
    rule = SlidingWindow(size=5)
    out, _ = _both(arrays, cotangent, (positions, segments), rule=rule, impl="xla")
    assert np.all(np.isnan(out))


def test_query_heads_that_key_heads_do_not_divide_are_named():
    arrays, _ = _arrays(kv_heads=3)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3 key heads"):
        _attend(arrays, Causal(), None)


def _visible_pairs(rule, positions, segments):
    """All pairs of one row, as a NumPy array."""
    pos, seg = jnp.asarray(positions), jnp.asarray(segments)
    return np.asarray(rule(pos[:, None], pos[None], seg[:, None], seg[None]))


@settings(max_examples=60, deadline=None)
@given(
    rule=st.one_of(
        st.just(Causal()),
        st.just(Bidirectional()),
        st.builds(SlidingWindow, size=st.integers(1, 9)),
    ),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    gaps=st.integers(1, 3),
    block_q=st.integers(1, 7),
    block_k=st.integers(1, 7),
)
def test_no_block_outside_the_map_holds_a_visible_pair(rule, lengths, gaps, block_q, block_k):
    positions = np.concatenate([np.arange(n) * gaps for n in lengths])
    segments = np.repeat(np.arange(len(lengths)), lengths)  # the first document is padding
    visible = _visible_pairs(rule, positions, segments)
    count_q, count_k = -(-len(positions) // block_q), -(-len(positions) // block_k)
    blocks = rule.block_map(block_q, block_k, count_q, count_k)
    assert blocks.shape == (count_q, count_k)
    for t, s in np.argwhere(visible):
        assert blocks[t // block_q, s // block_k]


def test_block_maps_are_tight_for_one_document():
    positions, one = np.arange(24), np.ones(24, int)
    for rule in RULES:
        visible = _visible_pairs(rule, positions, one)
        tight = visible.reshape(6, 4, 4, 6).any(axis=(1, 3))
        np.testing.assert_array_equal(rule.block_map(4, 6, 6, 4), tight)


def test_rows_permute_and_vmap_agrees():
    arrays, cotangent = _arrays()
    tokens = _packed()
    run = functools.partial(_both, rule=Causal(), impl="xla")
    out, _ = run(arrays, cotangent, tokens)
    flipped = [jax.tree.map(lambda x: x[::-1], tree) for tree in (arrays, tokens)]
    swapped, _ = run(flipped[0], cotangent, flipped[1])
    np.testing.assert_array_equal(swapped, out[::-1])

    @jax.jit
    @jax.vmap
    def single(arrays, tokens):
        arrays, tokens = jax.tree.map(lambda x: x[None], (arrays, tokens))
        return _attend(arrays, Causal(), "xla", 8, tokens=tokens)[0]

    np.testing.assert_allclose(single(arrays, tokens), out, atol=3e-6)


def test_the_second_call_compiles_nothing():
    arrays, cotangent = _arrays()
    before = _both._cache_size()
    run = functools.partial(_both, rule=SlidingWindow(size=3), impl=None)
    run(arrays, cotangent, _packed())
    run(jax.tree.map(lambda x: x + 1, arrays), cotangent + 1, _packed())
    assert _both._cache_size() == before + 1


@pytest.mark.parametrize("backward", [False, True])
def test_whole_scores_are_never_alive(backward):
    length = 1024
    arrays = tuple(jnp.zeros((1, length, 4, 16)) for _ in range(3))
    tokens = (jnp.arange(length)[None], jnp.ones((1, length), int))

    def temporary(impl):
        def attend(arrays):
            return _attend(arrays, Causal(), impl, 128, tokens=tokens)

        function = jax.grad(lambda arrays: jnp.sum(attend(arrays))) if backward else attend
        compiled = jax.jit(function).lower(arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores, inputs = 4 * length * length * 4, 3 * arrays[0].nbytes
    assert temporary("xla") < 0.1 * scores + 3 * inputs
    assert temporary("ref") > scores


def test_work_follows_the_visible_blocks():
    """23 tokens in blocks of 4: 6 x 6 pairs, 21 causal, 11 in a window of one block."""
    arrays, _ = _arrays()
    for rule, pairs in ((Bidirectional(), 36), (Causal(), 21), (SlidingWindow(size=4), 11)):
        jaxpr = jax.make_jaxpr(lambda arrays, rule=rule: _attend(arrays, rule, "xla", 4))(arrays)
        assert re.findall(r"length=(\d+)", str(jaxpr)) == [str(pairs)]


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from kernels_pallas.block_sparse_attention import *
keys = jax.random.split(jax.random.key(0), 3)
arrays = tuple(jax.random.normal(key, (16, 24, 2, 8)) for key in keys)
positions = jnp.broadcast_to(jnp.arange(24)[None], (16, 24))
def loss(arrays, positions):
    out = block_sparse_attention(
        q=arrays[0], k=arrays[1], v=arrays[2], q_positions=positions, kv_positions=positions,
        q_segments=jnp.ones_like(positions), kv_segments=jnp.ones_like(positions), rule=Causal(),
        scale=0.3, impl="xla", config=BlockSparseAttentionConfig(block=8),
    )
    return jnp.sum(out * out)
rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
step = jax.jit(jax.grad(loss), in_shardings=(rows, rows), out_shardings=rows)
print("DEVICES", len(jax.devices()))
print(step.lower(arrays, positions).compile().as_text())
for a, b in zip(step(arrays, positions), jax.grad(loss)(arrays, positions)):
    np.testing.assert_allclose(a, b, atol=1e-5)
print("EQUAL")
"""


def test_a_sharded_batch_needs_no_communication():
    printed = run_on_devices(8, _SHARDED)
    assert "DEVICES 8" in printed
    assert "EQUAL" in printed
    collective = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert not re.search(collective, printed)

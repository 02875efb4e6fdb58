"""The TPU kernels: interpreted against the reference, and compiled for absent TPUs."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import Even, both_sides, documents
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import STRICT
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from kernels_pallas.block_sparse_attention import (
    Bidirectional,
    BlockSparseAttentionConfig,
    Causal,
    SlidingWindow,
    block_sparse_attention,
    blocks,
    pairs,
    partial_attention,
    tpu_backward,
    tpu_operands,
)
from kernels_pallas.block_sparse_attention.specs import TPU_SHAPES
from kernels_pallas.common import aot

CAUSAL = Causal()


def _arrays(length, heads=4, kv_heads=2, width=8, dtype=jnp.float32, batch=1):
    keys = jax.random.split(jax.random.key(0), 5)
    q_shape, kv_shape = (batch, length, heads, width), (batch, length, kv_heads, width)
    shapes = [q_shape, kv_shape, kv_shape, q_shape]
    q, k, v, cotangent = (
        jax.random.normal(key, shape).astype(dtype)
        for key, shape in zip(keys[:4], shapes, strict=True)
    )
    return (q, k, v), (cotangent, jax.random.normal(keys[4], q_shape[:3]))


def _attend(arrays, tokens, rule, impl, softcap=None, lists=None, **config: Any):
    q, k, v = arrays
    positions, segments = tokens
    return partial_attention(
        q=q,
        k=k,
        v=v,
        **both_sides(positions, segments),
        rule=rule,
        scale=q.shape[-1] ** -0.5,
        softcap=softcap,
        blocks=lists,
        block_shape=(config.get("block_q", 128), config.get("block_k", 128)),
        impl=impl,
        config=BlockSparseAttentionConfig(**config),
    )


@functools.partial(
    jax.jit, static_argnames=("rule", "impl", "softcap", "block_q", "block_k", "interpret")
)
def _both(arrays, cotangents, tokens, *, impl, rule=CAUSAL, lists=None, **options):
    """Both results, and the gradients under ``cotangents``."""

    def attend(arrays):
        return _attend(arrays, tokens, rule, impl, lists=lists, **options)

    out, pull_back = jax.vjp(attend, arrays)
    return out, pull_back(cotangents)[0]


def _assert_equal(ours, expected, atol=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, "f4"), np.asarray(b, "f4"), atol=atol)


@pytest.mark.parametrize(
    ("rule", "kv_heads", "softcap"),
    [
        (Causal(), 4, None),
        (Causal(), 2, 0.7),
        (SlidingWindow(size=5), 1, None),
        (Bidirectional(), 2, 0.7),
        (Even(), 2, None),
    ],
    ids=str,
)
def test_values_and_gradients_agree_with_ref(rule, kv_heads, softcap):
    """Two documents and padding, ragged in blocks of 8 queries and 16 keys."""
    arrays, cotangents = _arrays(43, kv_heads=kv_heads)
    run = functools.partial(
        _both, arrays, cotangents, documents([9, 26], 43), rule=rule, softcap=softcap
    )
    ours = run(impl="tpu", block_q=8, block_k=16, interpret=True)
    _assert_equal(ours, run(impl="ref"))


@pytest.mark.parametrize("kv_heads", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_of_long_rows_take_two_kernels(monkeypatch, kv_heads):
    """Where those of the queries overflow VMEM; here nothing fits. Nothing races there either."""
    monkeypatch.setattr(tpu_backward, "_RESIDENT_BYTES", 0)
    arrays, cotangents = _arrays(23, kv_heads=kv_heads)
    run = functools.partial(_both, arrays, cotangents, documents([9, 11], 23))
    # No other test has these blocks: what is compiled is kept, the limit is no part of its key.
    options = {"impl": "tpu", "block_q": 16, "block_k": 24, "interpret": STRICT}
    made = str(jax.make_jaxpr(functools.partial(run, **options))())
    assert "backward_q" in made and "backward_kv" in made
    _assert_equal(run(**options), run(impl="ref"))


@pytest.mark.parametrize("listed", [False, True], ids=["map", "lists"])
def test_nothing_races_and_nothing_unwritten_is_read(listed):
    arrays, cotangents = _arrays(23)
    lists = jnp.asarray([[[0, -1], [1, 0], [-1, -1]]]) if listed else None
    run = functools.partial(_both, arrays, cotangents, documents([9, 11], 23), lists=lists)
    sizes = {"block_q": 8, "block_k": 8}
    ours = jax.block_until_ready(run(impl="tpu", interpret=STRICT, **sizes))
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found
    _assert_equal(ours, run(impl="ref", **sizes))


def test_whole_lanes_and_several_tiles_of_them():
    """Blocks of 128 and 256, as on hardware: statistics along lanes repeat and sum by tiles."""
    arrays, cotangents = _arrays(640, heads=2, kv_heads=1, width=160)
    run = functools.partial(_both, arrays, cotangents, documents([300, 320], 640))
    ours = run(impl="tpu", block_q=128, block_k=256, interpret=True)
    _assert_equal(ours, run(impl="ref"), 3e-5)


def test_bfloat16_rounds_only_probabilities_and_results():
    arrays, cotangents = _arrays(43, dtype=jnp.bfloat16)
    tokens = documents([9, 26], 43)
    ours = _both(arrays, cotangents, tokens, impl="tpu", block_q=8, block_k=8, interpret=True)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, cotangents))
    expected = _both(*exact, tokens, impl="ref")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == (jnp.float32 if a.ndim == 3 else jnp.bfloat16)
        scale = float(jnp.max(jnp.where(b > -1e29, jnp.abs(b), 0.0)))
        np.testing.assert_allclose(np.asarray(a, "f4"), b, atol=0.02 * scale)


def test_queries_that_see_nothing_are_zero_and_so_are_their_gradients():
    arrays, cotangents = _arrays(23)
    for lengths in ([9, 4], []):
        tokens = documents(lengths, 23)
        padding = np.asarray(tokens[1] == 0)
        (out, log_sum_exp), gradients = _both(
            arrays, cotangents, tokens, impl="tpu", block_q=8, block_k=8, interpret=True
        )
        np.testing.assert_allclose(log_sum_exp[padding], -1e30, rtol=1e-6)
        for leaf in (out, *gradients):
            assert not np.any(leaf[padding])
            assert np.all(np.isfinite(leaf))
            assert np.any(leaf[~padding]) == bool(lengths)


def test_huge_scores_do_not_overflow():
    (q, k, v), cotangents = _arrays(23)
    run = functools.partial(_both, (q * 1e4, k, v), cotangents, documents([23], 23))
    (out, _), gradients = run(impl="tpu", block_q=8, block_k=8, interpret=True)
    np.testing.assert_allclose(out, run(impl="ref")[0][0], atol=1e-3)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_a_row_out_of_order_is_nan_and_the_others_are_right():
    arrays, cotangents = _arrays(23, batch=2)
    positions, segments = (jnp.concatenate([x, x]) for x in documents([9, 11], 23))
    tokens = (positions.at[0, :9].set(positions[0, :9][::-1]), segments)
    run = functools.partial(_both, arrays, cotangents, tokens)
    ours, _ = run(impl="tpu", block_q=8, block_k=8, interpret=True)
    expected, _ = run(impl="ref")
    for a, b in zip(ours, expected, strict=True):
        assert np.all(np.isnan(a[0]))
        np.testing.assert_allclose(a[1], b[1], atol=3e-6)


def test_vmap_agrees():
    arrays, _ = _arrays(23, batch=2)
    rows = documents([9, 11], 23), documents([23], 23)
    tokens = tuple(map(jnp.concatenate, zip(*rows, strict=True)))
    options = {"block_q": 8, "block_k": 8, "interpret": True}

    @jax.jit
    @jax.vmap
    def single(arrays, tokens):
        arrays, tokens = jax.tree.map(lambda x: x[None], (arrays, tokens))
        return jax.tree.map(lambda x: x[0], _attend(arrays, tokens, Causal(), "tpu", **options))

    _assert_equal(single(arrays, tokens), _attend(arrays, tokens, Causal(), "ref"))


@settings(max_examples=5, deadline=None)
@given(
    rule=st.one_of(
        st.just(Causal()),
        st.just(Bidirectional()),
        st.builds(SlidingWindow, size=st.integers(1, 40)),
    ),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    padding=st.integers(0, 9),
    block_q=st.sampled_from([4, 8, 16]),
    block_k=st.sampled_from([4, 8, 16]),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_any_mask_length_block_and_group(rule, lengths, padding, block_q, block_k, kv_heads):
    length = sum(lengths) + padding
    arrays, cotangents = _arrays(length, kv_heads=kv_heads)
    run = functools.partial(_both, arrays, cotangents, documents(lengths, length), rule=rule)
    ours = run(impl="tpu", block_q=block_q, block_k=block_k, interpret=True)
    _assert_equal(ours, run(impl="ref"))


def _entries(listed, rule, lengths, length, block, *, by_rows):
    positions, segments = documents(lengths, length)
    tokens = blocks.Tokens(positions, positions, segments, segments)
    return np.asarray(pairs.packed(listed, rule, tokens, block, block, by_rows=by_rows).entries)


def test_one_step_for_each_pair_and_a_mask_only_where_something_is_hidden():
    """16 tokens in blocks of 4: 10 causal pairs, of which the diagonal needs a mask."""
    visible = Causal().block_map(4, 4, 4, 4)
    listed = pairs.static_rows(visible)
    entries = _entries(listed, Causal(), [16], 16, 4, by_rows=True)
    own, other = pairs.outer(jnp.asarray(entries)), pairs.inner(jnp.asarray(entries))
    np.testing.assert_array_equal(np.stack([own, other], 1), np.argwhere(visible))
    assert np.all(entries & pairs.LIVE)
    np.testing.assert_array_equal(entries & pairs.WHOLE != 0, own > other)
    np.testing.assert_array_equal(entries & pairs.FIRST != 0, other == 0)
    np.testing.assert_array_equal(entries & pairs.LAST != 0, own == other)


def test_pairs_of_foreign_documents_load_and_compute_nothing():
    """Two documents of two blocks each: the 4 pairs across them repeat the block before."""
    listed = pairs.static_rows(Causal().block_map(4, 4, 4, 4))
    entries = _entries(listed, Causal(), [8, 8], 16, 4, by_rows=True)
    live = entries & pairs.LIVE != 0
    own, other = (np.asarray(f(jnp.asarray(entries))) for f in (pairs.outer, pairs.inner))
    shown = list(zip(own[live].tolist(), other[live].tolist(), strict=True))
    assert shown == [(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3)]
    before = [other[live][max(0, np.sum(live[: i + 1]) - 1)] for i in range(len(live))]
    np.testing.assert_array_equal(other, before)


def test_columns_of_lists_hold_what_their_rows_hold():
    lists = blocks.distinct(jnp.asarray([[[3, 0, 0], [1, -1, -1], [7, 3, 2]]]), 4)
    rows, columns = pairs.listed_rows(lists), pairs.listed_columns(lists, 4)
    found = [
        sorted(zip(x.q[x.live].tolist(), x.k[x.live].tolist(), strict=True))
        for x in (rows, columns)
    ]
    assert found[0] == found[1] == [(0, 0), (0, 3), (1, 1), (2, 2), (2, 3)]
    assert columns.k.shape == (1, 9 + 4)
    assert np.all(np.diff(columns.k[0]) >= 0)
    assert set(columns.k[0].tolist()) == {0, 1, 2, 3}


def test_what_cannot_run_is_said():
    arrays, _ = _arrays(23)
    tokens = documents([23], 23)
    with pytest.raises(ValueError, match="needs a TPU"):
        _attend(arrays, tokens, Causal(), "tpu")
    mixed = (arrays[0], arrays[1].astype(jnp.bfloat16), arrays[2])
    with pytest.raises(ValueError, match="not float32, bfloat16, float32"):
        _attend(mixed, tokens, Causal(), "tpu", interpret=True)
    many = jnp.zeros((1, 3, 1 << 16), int)
    with pytest.raises(ValueError, match="overflow the scalar memory"):
        _attend(arrays, tokens, Causal(), "tpu", lists=many, block_q=8, block_k=8, interpret=True)


# Every generation in both dtypes, every named shape; all of their product takes minutes.
COMPILED = list(
    zip(
        itertools.product(aot.TPUS, (jnp.bfloat16, jnp.float32)),
        itertools.cycle(TPU_SHAPES),
        strict=False,
    )
)


@functools.cache
def _compile(shape, dtype, topology, lists=None, softcap=None):
    """The gradient of the public operation, for a TPU."""
    kv = (shape.batch, shape.length, shape.kv_heads, shape.width)
    q = (shape.batch, shape.length, shape.heads, shape.width)
    arrays = tuple(jax.ShapeDtypeStruct(s, dtype) for s in (q, kv, kv))
    tokens = (jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32),) * 2
    rule = CAUSAL if shape.window is None else SlidingWindow(size=shape.window)

    def loss(arrays, tokens, lists=None):
        out, log_sum_exp = _attend(arrays, tokens, rule, "tpu", softcap, lists)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(log_sum_exp)

    more = () if lists is None else (jax.ShapeDtypeStruct(lists, jnp.int32),)
    gradient = jax.value_and_grad(loss)
    return aot.compile_tpu(gradient, arrays, tokens, *more, topology=aot.TPUS[topology])


@pytest.mark.parametrize(
    ("topology", "dtype", "shape"),
    [
        pytest.param(*pair, shape, marks=pytest.mark.slow if pair[0] in ("v5p", "tpu7x") else ())
        for pair, shape in COMPILED
    ],
    ids=[f"{topology}-{dtype.__name__}-{shape}" for (topology, dtype), shape in COMPILED],
)
def test_forward_and_backward_compile(topology, dtype, shape):
    _compile(TPU_SHAPES[shape], dtype, topology)


@pytest.mark.parametrize("topology", ["v5e", pytest.param("tpu7x", marks=pytest.mark.slow)])
def test_lists_and_softcap_compile(topology):
    """16 of 32 blocks of 128 keys."""
    shape = TPU_SHAPES["tpu-4096-grouped"]
    _compile(shape, jnp.bfloat16, topology, lists=(1, 32, 16), softcap=30.0)


def test_ragged_lengths_and_odd_widths_compile():
    shape = dataclasses.replace(TPU_SHAPES["tpu-2048-narrow"], length=1000, width=96)
    _compile(shape, jnp.bfloat16, "v5e")


@pytest.mark.parametrize(
    "topology", [pytest.param(n, marks=() if n == "v5e" else pytest.mark.slow) for n in aot.TPUS]
)
def test_the_longest_rows_of_one_backward_kernel_fit(topology):
    """24576 queries of one head, twice 12 MiB of float32; one block more makes two kernels."""
    length, block, struct = 24576, 1024, jax.ShapeDtypeStruct

    def operands(length):
        vectors = struct((1, 1, length, 128), jnp.bfloat16)
        tokens = struct((1, 2, length), jnp.int32)
        return tpu_operands.Operands(tokens, tokens, vectors, vectors, vectors)

    assert tpu_backward.fits(operands(length)) and not tpu_backward.fits(operands(length + block))
    static = tpu_operands.Static(CAUSAL, 1.0, None, block, block, False)
    arrays = operands(length)
    aot.compile_tpu(
        lambda entries, *rest: tpu_backward.by_columns(
            static, pairs.Listed(entries, 300), *rest, queries=True
        ),
        struct((300,), jnp.int32),
        arrays,
        arrays.q,
        struct((1, 1, 2, length), jnp.float32),
        topology=aot.TPUS[topology],
    )


@pytest.mark.parametrize("topology", ["v5e", pytest.param("tpu7x", marks=pytest.mark.slow)])
def test_two_backward_kernels_compile(topology, monkeypatch):
    monkeypatch.setattr(tpu_backward, "_RESIDENT_BYTES", 0)
    shape = TPU_SHAPES["tpu-4096-grouped"]
    compiled = _compile.__wrapped__(shape, jnp.bfloat16, topology)
    if topology == "v5e":  # for others the compiler writes no text of programs of this size
        for kernel in ("forward", "backward_q", "backward_kv"):
            assert f"block_sparse_attention_{kernel}" in compiled.as_text()


def test_scores_are_never_in_main_memory():
    shape = TPU_SHAPES["tpu-4096"]
    compiled = _compile(shape, jnp.bfloat16, "v5e")
    inputs = 3 * shape.length * shape.heads * shape.width * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * inputs


def test_a_tpu_takes_the_kernels_of_the_public_function():
    def loss(q):
        tokens = jnp.zeros(q.shape[:2], jnp.int32)
        names = ("q_positions", "kv_positions", "q_segments", "kv_segments")
        options = dict.fromkeys(names, tokens)
        return jnp.sum(block_sparse_attention(q=q, k=q, v=q, rule=CAUSAL, scale=1.0, **options))

    compiled = aot.compile_tpu(jax.grad(loss), jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32))
    for kernel in ("forward", "backward"):
        assert f"block_sparse_attention_{kernel}" in compiled.as_text()

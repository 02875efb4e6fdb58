"""Ready-made mask rules: what they say of blocks and ranges is what they say of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import both_sides, documents
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.block_sparse_attention import (
    Bidirectional,
    BlockSparseAttentionConfig,
    Branching,
    Causal,
    IndexRule,
    RangeRule,
    SinkWindow,
    SlidingWindow,
    Strided,
    UnorderedRule,
    partial_attention,
)
from kernels_pallas.common import aot

RULES = st.one_of(
    st.just(Bidirectional()),
    st.just(Causal()),
    st.builds(SlidingWindow, size=st.integers(1, 50)),
    st.builds(SinkWindow, sinks=st.integers(0, 20), size=st.integers(1, 30)),
    st.builds(Strided, unit=st.integers(1, 9), stride=st.integers(1, 5)),
)
NEW = [SinkWindow(sinks=3, size=6), Strided(unit=5, stride=3)]


def _tokens(rule, queries, keys):
    """The rule for positions that are those numbers, in one segment."""
    q, k = (np.broadcast_to(x, (len(queries), len(keys))) for x in (queries[:, None], keys[None]))
    ones = jnp.ones(q.shape, jnp.int32)
    return np.asarray(rule(jnp.asarray(q), jnp.asarray(k), ones, ones))


def test_what_a_few_tokens_see():
    seen = _tokens(SinkWindow(sinks=1, size=2), np.arange(5), np.arange(5))
    assert ["".join("01"[x] for x in row) for row in seen.astype(int)] == [
        "10000",
        "11000",
        "11100",
        "10110",
        "10011",
    ]
    seen = _tokens(Strided(unit=2, stride=2), np.arange(6), np.arange(6))
    assert ["".join("01"[x] for x in row) for row in seen.astype(int)] == [
        "100000",
        "110000",
        "001000",
        "001100",
        "110010",
        "110011",
    ]


@settings(max_examples=40, deadline=None)
@given(
    rule=RULES,
    block_q=st.integers(1, 12),
    block_k=st.integers(1, 12),
    num_q=st.integers(1, 6),
    num_k=st.integers(1, 6),
)
def test_a_block_map_holds_all_that_is_seen_and_is_tight(rule, block_q, block_k, num_q, num_k):
    tokens = _tokens(rule, np.arange(block_q * num_q), np.arange(block_k * num_k))
    blocks = tokens.reshape(num_q, block_q, num_k, block_k).any(axis=(1, 3))
    np.testing.assert_array_equal(rule.block_map(block_q, block_k, num_q, num_k), blocks)


@settings(max_examples=40, deadline=None)
@given(
    rule=RULES,
    q_first=st.integers(0, 60),
    q_count=st.integers(1, 12),
    kv_first=st.integers(0, 60),
    kv_count=st.integers(1, 12),
)
def test_ranges_that_are_all_visible_hide_nothing(rule, q_first, q_count, kv_first, kv_count):
    queries, keys = np.arange(q_first, q_first + q_count), np.arange(kv_first, kv_first + kv_count)
    assert isinstance(rule, RangeRule)
    edges = (jnp.asarray(x) for x in (queries[0], queries[-1], keys[0], keys[-1]))
    if bool(rule.all_visible(*edges)):
        assert _tokens(rule, queries, keys).all()


@settings(max_examples=20, deadline=None)
@given(rule=RULES, seed=st.integers(0, 99))
def test_a_rule_is_its_positions_within_a_segment_that_is_not_padding(rule, seed):
    rng = np.random.default_rng(seed)
    q_pos, kv_pos = (jnp.asarray(rng.integers(0, 40, 50)) for _ in range(2))
    q_seg, kv_seg = (jnp.asarray(rng.integers(0, 3, 50)) for _ in range(2))
    expected = rule.near(q_pos, kv_pos) & (q_seg == kv_seg) & (kv_seg != 0)
    np.testing.assert_array_equal(rule(q_pos, kv_pos, q_seg, kv_seg), expected)


@functools.partial(jax.jit, static_argnames=("rule", "impl"))
def _attend(arrays, positions, segments, *, rule, impl):
    def attend(arrays):
        q, k, v = arrays
        return partial_attention(
            q=q,
            k=k,
            v=v,
            **both_sides(positions, segments),
            rule=rule,
            scale=0.4,
            impl=impl,
            config=BlockSparseAttentionConfig(block=8, block_q=8, block_k=8, interpret=True),
        )

    out, pull_back = jax.vjp(attend, arrays)
    return out, pull_back(jax.tree.map(jnp.ones_like, out))


def _arrays(length):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (1, length, 2, 8)) for key in keys)


@pytest.mark.parametrize("impl", ["xla", "tpu"])
@pytest.mark.parametrize("rule", NEW, ids=str)
def test_attention_under_a_rule_agrees_with_ref(rule, impl):
    arrays, tokens = _arrays(43), documents([37], 43)
    ours = _attend(arrays, *tokens, rule=rule, impl=impl)
    expected = _attend(arrays, *tokens, rule=rule, impl="ref")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("impl", ["xla", "tpu"])
def test_where_positions_are_no_indices_the_result_is_nan_and_never_wrong(impl):
    """A second document, whose first tokens every later one of it would see."""
    rule = NEW[0]
    assert isinstance(rule, IndexRule) and not isinstance(Causal(), IndexRule)
    (out, log_sum_exp), _ = _attend(_arrays(43), *documents([20, 17], 43), rule=rule, impl=impl)
    assert bool(jnp.all(jnp.isnan(out)) & jnp.all(jnp.isnan(log_sum_exp)))


def test_branches_alone_have_their_blocks_listed():
    assert isinstance(Branching(), UnorderedRule)
    assert not any(isinstance(rule, UnorderedRule) for rule in (Causal(), Bidirectional(), *NEW))


def _branches(lengths, length, steps):
    """Rows of documents, then ``steps`` tokens of a branch behind each of their tokens."""
    rule, (positions, segments) = Branching(), documents(lengths, length)
    leaving = [rule.branch(segments, positions)] * steps
    return (
        jnp.concatenate([positions + step for step in range(steps + 1)], axis=1),
        jnp.concatenate([rule.trunk(segments), *leaving], axis=1),
    )


@pytest.mark.parametrize("within", [Causal(), SlidingWindow(size=3)], ids=str)
def test_a_branch_sees_its_trunk_up_to_where_it_leaves_and_itself(within):
    lengths, length, steps = [4, 3], 8, 2
    positions, segments = _branches(lengths, length, steps)
    sides = both_sides(positions[0], segments[0])
    seen = Branching(within=within)(
        sides["q_positions"][:, None],
        sides["kv_positions"][None],
        sides["q_segments"][:, None],
        sides["kv_segments"][None],
    )
    document = [0] * 4 + [1] * 3 + [None]
    for q, kv in np.ndindex(seen.shape):
        (q_step, q_at), (kv_step, kv_at) = divmod(q, length), divmod(kv, length)
        expected = document[q_at] is not None and document[q_at] == document[kv_at]
        expected &= kv_at <= q_at if kv_step == 0 else (kv_at == q_at and kv_step <= q_step)
        if within != Causal():
            expected &= (q_at + q_step) - (kv_at + kv_step) < within.size
        assert bool(seen[q, kv]) == expected, (q, kv)


@pytest.mark.parametrize("impl", ["xla", "tpu"])
def test_branches_agree_with_ref_in_value_and_gradient(impl):
    tokens = _branches([7, 4], 13, 2)
    arrays = _arrays(39)
    ours = _attend(arrays, *tokens, rule=Branching(), impl=impl)
    expected = _attend(arrays, *tokens, rule=Branching(), impl="ref")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_branches_compile_for_a_tpu():
    """Forward and backward, over blocks that are listed at run time, as a model lists them."""
    like = jax.ShapeDtypeStruct
    heads = like((1, 1024, 4, 128), jnp.bfloat16)
    row, listed = like((1, 1024), jnp.int32), like((1, 8, 8), jnp.int32)

    def attend(arrays, positions, segments, blocks):
        def total(arrays):
            q, k, v = arrays
            out = partial_attention(
                q=q, k=k, v=v, **both_sides(positions, segments), rule=Branching(), scale=0.1,
                blocks=blocks,
            )[0]  # fmt: skip
            return jnp.sum(out.astype(jnp.float32))

        return jax.grad(total)(arrays)

    compiled = aot.compile_tpu(attend, (heads,) * 3, row, row, listed)
    assert "tpu_custom_call" in compiled.as_text()

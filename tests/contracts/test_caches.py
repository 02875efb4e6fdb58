"""Every public cache policy: what it keeps, what is read of it, and that rows are apart."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenlab.cache
from kernels_pallas.block_sparse_attention import Causal
from tokenlab import config
from tokenlab.cache import (
    EMS,
    ActQKV,
    CachePolicy,
    Entries,
    FullCache,
    Heads,
    LouisKV,
    PagedCache,
    PageTopK,
    PerLayer,
    Recurrent,
    RingCache,
    Room,
    SinkCache,
    TokenSelect,
)
from tokenlab.cache.layers import LayerCache
from tokenlab.models import Rotary

ROWS, CHUNK, CAPACITY = 3, 4, 40
HEADS = Heads(
    num_heads=4, num_kv_heads=2, width=4, scale=0.5, softcap=None, rotate=Rotary(base=100.0)
)
WHOLE = CAPACITY  # a budget that covers all


@dataclasses.dataclass(frozen=True)
class Row:
    """A policy under a small budget, and under one that covers every token.

    Attributes:
        small: with a budget that the tests exceed.
        whole: with one that they do not.
        kept: entries that ``small`` may keep of a row.
        read: entries that a query may read of it, itself included.
        paper: whether the docstring names one.
        fresh: whether what is read depends on nothing but what was appended.
        slow: a variant of another row.
        numbers: whether ``whole`` numbers what it keeps, whatever the positions.
    """

    small: CachePolicy
    whole: CachePolicy
    kept: int = CAPACITY
    read: int = CAPACITY
    paper: bool = True
    fresh: bool = True
    slow: bool = False
    numbers: bool = False


SINKS = SinkCache(budget=8, sinks=2)
SELECT = TokenSelect(budget=10, sinks=2, window=5)
TABLE = {
    "full": Row(FullCache(), FullCache(), paper=False),
    "ring": Row(RingCache(budget=6), RingCache(budget=WHOLE), kept=6, read=7, paper=False),
    "sinks": Row(SINKS, SinkCache(budget=WHOLE), kept=8, read=9),
    "sinks renumbered": Row(
        SinkCache(budget=8, sinks=2, renumber=True),
        SinkCache(budget=WHOLE, renumber=True), kept=8, read=9, slow=True, numbers=True,
    ),
    "paged": Row(PagedCache(page=4), PagedCache(page=16, pages=11)),
    "per layer": Row(
        PerLayer(policies=(SINKS, FullCache())), PerLayer(policies=(FullCache(), SINKS)),
        kept=8, read=9, paper=False,
    ),
    "token select": Row(SELECT, TokenSelect(budget=WHOLE, sinks=2, window=5), read=10),
    "token select again": Row(
        dataclasses.replace(SELECT, reuse=0.3, smooth=3, scale="attention", offload=True),
        TokenSelect(budget=WHOLE, sinks=2, window=5, reuse=0.3, offload=True),
        read=10, fresh=False, slow=True,
    ),
    "page top k": Row(
        PageTopK(budget=9, page=2, sinks=2, window=3), PageTopK(budget=41, page=4, window=5),
        read=10,
    ),
    "page top k away": Row(
        PageTopK(budget=9, page=2, sinks=2, window=3, offload=True),
        PageTopK(budget=41, page=4, window=5, offload=True), read=10, slow=True,
    ),
    "louis": Row(
        LouisKV(budget=10, sinks=1, window=4, jump=2.0, cluster=2, segment=2, offload=True),
        LouisKV(budget=WHOLE, sinks=1, window=4, jump=2.0, cluster=2, segment=2), read=11,
    ),
    "louis again": Row(
        LouisKV(budget=10, sinks=1, window=4, jump=0.1, cluster=3, segment=3, offload=True),
        LouisKV(budget=WHOLE, sinks=1, window=4, jump=0.1, cluster=3, segment=4, offload=True),
        read=11, fresh=False, slow=True,
    ),
    "ems": Row(
        EMS(budget=8, window=3, slack=2, pooling=3, redundant=0.1),
        EMS(budget=WHOLE + 1, window=3, slack=2), kept=8, read=9,
    ),
    "ems with counts": Row(
        EMS(budget=8, window=2, slack=0, redundant=0.0, log_count_bias=True, score="local"),
        EMS(budget=WHOLE + 1, window=2, slack=0, log_count_bias=True), kept=8, read=9, slow=True,
    ),
    "act qkv": Row(
        ActQKV(budget=13, sinks=2, window=5, block=2),
        ActQKV(budget=CAPACITY + 8, sinks=0, window=CAPACITY, block=4), read=13,
    ),
    "act qkv away": Row(
        ActQKV(budget=13, sinks=2, window=5, block=2, question=(3, 6), offload=True, history=3),
        ActQKV(budget=CAPACITY + 12, sinks=4, window=CAPACITY, block=4, offload=True),
        read=13, slow=True,
    ),
}  # fmt: skip


def rows(wanted=lambda row: True):
    """Marks a test to run for each row, the slow ones where these are asked for."""
    return pytest.mark.parametrize(
        "member",
        [
            pytest.param(name, marks=[pytest.mark.slow] if row.slow else [])
            for name, row in TABLE.items()
            if wanted(row)
        ],
    )


every = rows()


def test_the_table_holds_every_public_member():
    public = {
        member
        for member in vars(tokenlab.cache).values()
        if inspect.isclass(member) and issubclass(member, CachePolicy)
    }
    # A state without entries: tests/models/test_linmu_decoding.py.
    assert public - {CachePolicy, Recurrent} == {type(row.small) for row in TABLE.values()}


def start(policy, dtype="float32", rows=ROWS, heads=HEADS):
    room = Room(rows, CAPACITY, dtype)
    stage = "first"
    return LayerCache(
        policy=policy, heads=heads, stage=stage, state=policy.init(room, heads),
        pairs=jnp.zeros(rows),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="stage")
def attend(cache, new, stage="next"):
    cache = cache.replace(stage=stage, pairs=jnp.zeros_like(cache.pairs))
    out, after = cache.attend(new, rule=Causal(), impl=None)
    return out, after.replace(stage="next")


def tokens(lengths, counts, seed, size=CHUNK, dtype=jnp.float32):
    """The next ``counts`` tokens of each row; a row's do not depend on how they are cut."""
    rng = np.random.default_rng(seed)
    count, groups = HEADS.num_kv_heads, HEADS.num_heads // HEADS.num_kv_heads
    all_q = rng.normal(size=(len(lengths), CAPACITY, count * groups, HEADS.width))
    all_k, all_v = rng.normal(size=(2, len(lengths), CAPACITY, count, HEADS.width))
    positions = np.asarray(lengths)[:, None] + np.arange(size)[None, :]
    at = np.minimum(positions, CAPACITY - 1)[..., None, None]
    q, k, v = (
        jnp.asarray(np.take_along_axis(x, at, axis=1), dtype) for x in (2 * all_q, all_k, all_v)
    )
    segments = (np.arange(size)[None, :] < np.asarray(counts)[:, None]).astype(np.int32)
    return Entries(q, k, v, jnp.asarray(positions, jnp.int32), jnp.asarray(segments))


def run(policy, appends, seed=0, dtype="float32", there=None):
    """Outputs at real tokens, row by row in order, and the cache.

    Where ``there [B, CAPACITY]`` is given, the rows leave out the other positions.
    """
    first = np.zeros(len(appends[0]), int)
    cache, lengths = start(policy, dtype, rows=len(first)), first
    written = [[] for _ in first]
    for turn, counts in enumerate(appends):
        new = tokens(lengths, counts, seed, dtype=dtype)
        if there is not None:
            new = left_out(new, there)
        out, cache = attend(cache, new, stage="first" if turn == 0 else "next")
        for row, real in enumerate(np.asarray(new.segments) > 0):
            written[row].extend(np.asarray(out[row], np.float32)[real])
        lengths = lengths + np.asarray(counts)
    return [np.asarray(row) for row in written], cache


def left_out(new, there):
    """The tokens at the positions that are ``there``, padding behind them."""
    at = np.minimum(np.asarray(new.positions), CAPACITY - 1)
    kept = np.take_along_axis(there, at, axis=1)
    count = new.segments.shape[1]
    new = new._replace(segments=jnp.where(kept, new.segments, 0))
    return new.take(jnp.tile(jnp.arange(count), (ROWS, 1)), jnp.full(ROWS, count))


def same(found, expected, atol=2e-5):
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=atol)


APPENDS = st.lists(
    st.lists(st.integers(0, CHUNK), min_size=ROWS, max_size=ROWS), min_size=1, max_size=9
)
LONG = [[4, 3, 1], [4, 4, 0], [2, 4, 4], [4, 1, 4], [4, 4, 4], [1, 1, 1], [1, 1, 1], [4, 0, 3]]


@every
@settings(deadline=None, max_examples=12)
@given(appends=APPENDS)
def test_the_budget_is_kept(member, appends):
    row = TABLE[member]
    _, cache = run(row.small, appends)
    lengths = np.sum(appends, axis=0)
    held = np.asarray(row.small.held(cache.state))
    assert (held <= np.minimum(lengths, row.kept) + 1e-6).all()
    if row.small == row.whole:
        np.testing.assert_array_equal(held, lengths)


@every
@settings(deadline=None, max_examples=12)
@given(appends=APPENDS, seed=st.integers(0, 5))
def test_equals_the_full_cache_where_the_budget_covers_all(member, appends, seed):
    found, _ = run(TABLE[member].whole, appends, seed)
    expected, _ = run(FullCache(), appends, seed)
    same(found, expected)


def test_the_full_cache_equals_attention_in_numpy():
    found, cache = run(FullCache(), LONG)
    for row, out in enumerate(found):
        length = len(out)
        new = tokens([0] * ROWS, [length] * ROWS, 0, size=CAPACITY)
        q, k = (np.asarray(HEADS.rotate(x, positions=new.positions))[row] for x in new[:2])
        for t in range(length):
            for h in range(4):
                scores = 0.5 * k[: t + 1, h // 2] @ q[t, h]
                weights = np.exp(scores - scores.max())
                expected = weights @ np.asarray(new.v)[row, : t + 1, h // 2] / weights.sum()
                np.testing.assert_allclose(out[t, h], expected, atol=2e-5)
    assert np.asarray(cache.policy.held(cache.state)).tolist() == [len(row) for row in found]


@every
def test_a_row_does_not_depend_on_the_others(member):
    policy = TABLE[member].small
    together, _ = run(policy, LONG)
    cache, lengths, out = start(policy), np.zeros(ROWS, int), []
    for turn, counts in enumerate(LONG):
        new = tokens(lengths, counts, 0)
        others = np.arange(ROWS)[:, None, None, None] != 1
        new = new._replace(
            k=jnp.where(others, 100.0, new.k),
            segments=jnp.where(others[..., 0, 0], 0, new.segments),
        )
        part, cache = attend(cache, new, stage="first" if turn == 0 else "next")
        out.extend(np.asarray(part[1, : counts[1]]))
        lengths = lengths + np.asarray(counts)
    np.testing.assert_allclose(np.asarray(out), together[1], atol=2e-5)


@every
def test_a_token_is_read_the_same_however_its_row_is_cut(member):
    """Decoding one by one after a prompt: the prompt's last token, read alone or not."""
    policy = TABLE[member].whole
    whole, _ = run(policy, [[4] * ROWS, [4] * ROWS])
    cut, _ = run(policy, [[3] * ROWS, [1] * ROWS, [1] * ROWS, [2] * ROWS, [1] * ROWS])
    same(cut, whole)


@every
def test_forks_go_on_apart_and_rows_can_be_put_in(member):
    policy = TABLE[member].small
    _, cache = run(policy, LONG[:4])
    lengths = np.sum(LONG[:4], axis=0)
    rows = np.asarray([2, 0, 2])
    forked = cache.replace(state=policy.fork(cache.state, jnp.asarray(rows)))
    new = tokens(lengths, [3] * ROWS, 0)
    expected, kept = attend(cache, new)
    moved = jax.tree.map(lambda x: x[rows], new)
    found, _ = attend(forked, moved)
    np.testing.assert_allclose(found, np.asarray(expected)[rows], atol=2e-5)
    again, _ = attend(cache, new)  # the original is as it was
    np.testing.assert_array_equal(again, expected)
    # Row 1 of another cache in the place of row 0.
    other = policy.fork(cache.state, jnp.asarray([1]))
    mixed = cache.replace(state=policy.insert(cache.state, jnp.asarray([0]), other))
    found, _ = attend(mixed, jax.tree.map(lambda x: x[jnp.asarray([1, 1, 2])], new))
    np.testing.assert_allclose(found, np.asarray(expected)[[1, 1, 2]], atol=2e-5)
    assert jax.tree.structure(kept) == jax.tree.structure(cache)


@every
def test_a_token_reads_no_more_than_its_budget(member):
    row = TABLE[member]
    _, cache = run(row.small, LONG)
    lengths = np.sum(LONG, axis=0)
    for _ in range(3):
        _, cache = attend(cache, tokens(lengths, [1] * ROWS, 0, size=1))
        lengths = lengths + 1
        pairs = np.asarray(cache.pairs)
        assert (pairs <= np.minimum(lengths, row.read) + 1e-6).all() and (pairs > 1).all()


fresh = rows(lambda row: row.fresh)


@fresh
def test_a_draft_leaves_no_trace_but_what_is_accepted(member):
    policy = TABLE[member].small
    _, cache = run(policy, LONG[:3])
    lengths = np.sum(LONG[:3], axis=0)
    draft = tokens(lengths, [4] * ROWS, 0)
    _, drafted = attend(cache, draft, stage="draft")
    count = jnp.asarray([2, 0, 4])
    taken = drafted.waiting.take(jnp.tile(jnp.arange(4), (ROWS, 1)), count)
    found = cache.replace(state=policy.append(drafted.state, taken, heads=HEADS))
    segments = (jnp.arange(4)[None, :] < count[:, None]).astype(jnp.int32)
    _, expected = attend(cache, draft._replace(segments=segments))
    after = tokens(lengths + np.asarray(count), [2] * ROWS, 0)
    left, right = (np.asarray(attend(one, after)[0])[:, :2] for one in (found, expected))
    np.testing.assert_allclose(left, right, atol=2e-5)


@every
@pytest.mark.parametrize("small", [True, False])
def test_truncation_forgets_later_positions(member, small):
    policy = TABLE[member].small if small else TABLE[member].whole
    _, cache = run(policy, LONG[:4])
    lengths = np.sum(LONG[:4], axis=0)
    shorter = np.maximum(lengths - [2, 0, 3], 0)
    cut = policy.truncate(cache.state, jnp.asarray(shorter))
    before, after = (np.asarray(policy.held(one)) for one in (cache.state, cut))
    assert (after <= before).all() and after[1] == before[1]
    new = tokens(shorter, [2] * ROWS, 0)
    found, _ = attend(cache.replace(state=cut), new)
    if not small:
        appends = [
            [int(n) for n in np.minimum(4, np.maximum(shorter - 4 * i, 0))] for i in range(4)
        ]
        _, expected = run(policy, appends)
        expected, _ = attend(expected, new)
        np.testing.assert_allclose(found[:, :2], expected[:, :2], atol=2e-5)
    # What is gone is not read: other keys in its place change nothing.
    assert np.isfinite(np.asarray(found)).all()


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loop_may_carry_the_state(member, dtype):
    policy = TABLE[member].small
    _, before = run(policy, LONG[:1], dtype=dtype)
    found, after = run(policy, LONG, dtype=dtype)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), x.state) for x in (before, after)]
    assert shapes[0] == shapes[1]
    floats = [
        x.dtype for x in jax.tree.leaves(after.state) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    assert jnp.dtype(dtype) in floats
    assert all(np.isfinite(row).all() for row in found)
    if dtype == "bfloat16" and policy == TABLE[member].whole:
        same(found, run(policy, LONG)[0], atol=0.05)


@every
def test_the_second_pass_compiles_nothing(member):
    policy = TABLE[member].small
    again = config.load(config.dump(policy))
    run(policy, LONG)
    compiled = attend._cache_size()
    run(again, LONG)
    assert attend._cache_size() == compiled
    run(again, LONG, seed=3)
    assert attend._cache_size() == compiled


@every
def test_the_object_is_its_own_config(member):
    for policy in (TABLE[member].small, TABLE[member].whole):
        loaded = config.load(config.dump(policy))
        assert loaded == policy and hash(loaded) == hash(policy)
    doc = inspect.getdoc(type(TABLE[member].small))
    assert ("Reference: " in doc and "arXiv:" in doc) == TABLE[member].paper

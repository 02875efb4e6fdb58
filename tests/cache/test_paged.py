"""Pages: who has which, when they are copied, and what happens when none is left."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached import attend, drawn, empty, entries, fed, heads
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.cache import FullCache, PagedCache, Room
from tokenlab.core.errors import UserError

LAYER = heads()
ARRAYS = drawn((3, 32), LAYER)


def consistent(state):
    """A page in use is in a table; no two rows disagree on what lies in it; free ones are free."""
    table = np.asarray(state.table)
    named, counts = np.unique(table[table >= 0], return_counts=True)
    references = np.asarray(state.references)
    assert references[named].tolist() == counts.tolist() and references.sum() == counts.sum()
    page = state.k.shape[2]
    for row, positions in enumerate(np.asarray(state.positions)):
        filled = np.flatnonzero(positions >= 0)
        assert (positions[filled] == filled).all()
        assert (table[row, filled // page] >= 0).all()


def appended(policy, state, start, counts, *, shift=0.0):
    """Each row's next ``counts`` tokens; contents differ by row and position."""
    rows = np.arange(len(counts))[:, None]
    at = np.minimum(np.asarray(start)[:, None] + np.arange(max(max(counts), 1)), 31)
    q, k, v = (x[rows % 3, at] + shift * rows[..., None, None] for x in ARRAYS)
    new = entries(q, k, v, np.asarray(start), lengths=counts)
    return append(policy, state, new)


@functools.partial(jax.jit, static_argnums=0)
def append(policy, state, new):
    return policy.append(state, new, heads=LAYER)


def contents(state, row):
    """Keys of a row's filled slots."""
    page = state.k.shape[2]
    slots = np.flatnonzero(np.asarray(state.positions)[row] >= 0)
    table = np.asarray(state.table)[row]
    return np.asarray(state.k)[table[slots // page], :, slots % page]


def test_rows_take_pages_as_they_grow():
    policy = PagedCache(page=4, pages=8)
    state = policy.init(Room(3, 32, "float32"), LAYER)
    for start, counts, used in [
        ([0, 0, 0], [4, 1, 0], 2), ([4, 1, 0], [1, 3, 0], 3), ([5, 4, 0], [3, 1, 2], 5),
    ]:  # fmt: skip
        state = appended(policy, state, start, counts)
        consistent(state)
        assert int((state.references > 0).sum()) == used
    assert policy.held(state).tolist() == [8, 5, 2]
    np.testing.assert_allclose(contents(state, 0), ARRAYS[1][0, :8], rtol=1e-6)
    shorter = policy.truncate(state, jnp.asarray([3, 4, 0]))
    consistent(shorter)
    assert int((shorter.references > 0).sum()) == 2
    assert policy.held(shorter).tolist() == [3, 4, 0]


def test_a_fork_copies_tables_and_writing_copies_the_page():
    policy = PagedCache(page=4, pages=12)
    state = policy.init(Room(3, 32, "float32"), LAYER)
    state = appended(policy, state, [0, 0, 0], [6, 2, 0])
    forked = policy.fork(state, jnp.asarray([0, 0, 1]))
    assert forked.k is state.k and forked.references[:3].tolist() == [2, 2, 1]
    after = appended(policy, forked, [6, 6, 2], [1, 1, 1], shift=1.0)
    consistent(after)
    # One of the two rows keeps the page, the other has a copy; their first page is shared still.
    assert int((after.references > 0).sum()) == 4
    table = np.asarray(after.table)
    assert table[0, 0] == table[1, 0] and table[0, 1] != table[1, 1]
    for row, source, length in [(0, 0, 6), (1, 0, 6), (2, 1, 2)]:
        found = contents(after, row)
        np.testing.assert_allclose(found[:length], contents(state, source), rtol=1e-6)
        expected = ARRAYS[1][row, length] + row
        np.testing.assert_allclose(found[length], expected, rtol=1e-6)
    # The original rows are as they were.
    np.testing.assert_array_equal(contents(forked, 0), contents(state, 0))


def test_one_writer_of_a_shared_page_copies_it():
    policy = PagedCache(page=4, pages=12)
    state = policy.init(Room(3, 32, "float32"), LAYER)
    forked = policy.fork(appended(policy, state, [0, 0, 0], [3, 0, 0]), jnp.asarray([0, 0, 0]))
    after = appended(policy, forked, [3, 3, 3], [0, 1, 0])
    assert np.asarray(after.references)[np.asarray(after.table)[:, 0]].tolist() == [2, 1, 2]
    for row in (0, 2):
        np.testing.assert_array_equal(contents(after, row), contents(forked, row))


def test_when_the_pool_runs_out_only_late_rows_lose_tokens():
    policy = PagedCache(page=4, pages=8)
    q, k, v = ARRAYS
    whole, cache = fed(PagedCache(page=4), LAYER, ARRAYS, [4, 4, *[1] * 3], capacity=32)
    short = empty(policy, LAYER, 3, 32)
    outs = []
    for start, size in [(0, 4), (4, 4), (8, 1), (9, 1), (10, 1)]:
        new = entries(*(x[:, start : start + size] for x in (q, k, v)), start)
        out, short = attend(short, new, stage="first" if start == 0 else "next")
        outs.append(np.asarray(out))
    outs = np.concatenate(outs, axis=1)
    # Two pages each, then a third for rows 0 and 1, and none for row 2.
    assert policy.counters(short.state)["cache_tokens_dropped"].tolist() == [0, 0, 3]
    assert policy.held(short.state).tolist() == [11, 11, 8]
    consistent(short.state)
    np.testing.assert_allclose(outs[:2], whole[:2], atol=2e-5)
    assert np.isfinite(outs).all()
    new = entries(*(x[:, 8:9] for x in (q, k, v)), 8)
    eight = cache.replace(state=cache.policy.truncate(cache.state, jnp.full(3, 8)))
    expected, _ = attend(eight, new._replace(positions=new.positions + 2))
    again, _ = attend(short, new._replace(positions=new.positions + 2))
    np.testing.assert_allclose(again[2], expected[2], atol=2e-5)


def test_a_page_that_could_not_be_copied_is_not_written():
    policy = PagedCache(page=4, pages=8)
    state = policy.init(Room(3, 32, "float32"), LAYER)
    state = appended(policy, state, [0, 0, 0], [3, 0, 0])
    state = policy.fork(state, jnp.asarray([0, 0]))
    # The pool has one page left once row 0's table is padded with others.
    filled = jnp.asarray([[1, 2, 3, 4, 5, 6, 7]])
    state = state.replace(table=state.table.at[:1, 1:].set(filled))
    before = contents(state, 0)
    shorter = policy.truncate(state, jnp.asarray([32, 1]))
    after = appended(policy, shorter, [3, 1], [0, 1], shift=9.0)
    assert policy.counters(after)["cache_tokens_dropped"].tolist() == [0, 1]
    np.testing.assert_array_equal(contents(after, 0), before)
    # Both write, one page is wanted and none is there: both lose the token, neither is touched.
    both = appended(policy, shorter, [3, 1], [1, 1], shift=9.0)
    assert policy.counters(both)["cache_tokens_dropped"].tolist() == [1, 1]
    np.testing.assert_array_equal(contents(both, 0), before)
    np.testing.assert_array_equal(contents(both, 1), before[:1])


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.tuples(*[st.integers(0, 3)] * 3)),
        st.tuples(st.just("fork"), st.tuples(*[st.integers(0, 2)] * 3)),
        st.tuples(st.just("truncate"), st.tuples(*[st.integers(0, 6)] * 3)),
        st.tuples(st.just("insert"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    ),
    min_size=2, max_size=8,
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(steps=STEPS)
def test_any_course_of_events_leaves_what_lists_of_tokens_have(steps):
    """A model of the pool: one Python list per row."""
    policy = PagedCache(page=3, pages=33)
    state = policy.init(Room(3, 32, "float32"), LAYER)
    rows = [[], [], []]
    for number, (step, what) in enumerate(steps):
        if step == "append":
            start = [len(row) for row in rows]
            state = appended(policy, state, start, list(what), shift=number + 1.0)
            for row, count in enumerate(what):
                for at in range(start[row], start[row] + count):
                    rows[row].append(ARRAYS[1][row, at] + row * (number + 1.0))
        elif step == "fork":
            state = policy.fork(state, jnp.asarray(what))
            rows = [list(rows[row]) for row in what]
        elif step == "truncate":
            lengths = [max(0, len(row) - cut) for row, cut in zip(rows, what, strict=True)]
            state = policy.truncate(state, jnp.asarray(lengths))
            rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        else:
            one = policy.fork(state, jnp.asarray([what[1]]))
            state = policy.insert(state, jnp.asarray([what[0]]), one)
            rows[what[0]] = list(rows[what[1]])
        consistent(state)
    assert policy.counters(state)["cache_tokens_dropped"].tolist() == [0, 0, 0]
    for row, tokens in enumerate(rows):
        found = contents(state, row)
        assert len(found) == len(tokens)
        if tokens:
            np.testing.assert_allclose(found, np.asarray(tokens), rtol=1e-5)


def test_it_is_the_full_cache():
    sizes = [7, 5, *[1] * 20]
    found, _ = fed(PagedCache(page=5), LAYER, ARRAYS, sizes)
    expected, _ = fed(FullCache(), LAYER, ARRAYS, sizes)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_impossible_pools_are_one_line():
    with pytest.raises(UserError, match="pages of 0 tokens"):
        PagedCache(page=0)
    with pytest.raises(UserError, match="pool of 0; use 1 or more"):
        PagedCache(pages=0)
    for pages, rows in ((3, 1), (5, 6)):
        with pytest.raises(UserError, match="one row alone takes 4 pages, and each row") as caught:
            PagedCache(page=16, pages=pages).init(Room(rows, 64, "float32"), LAYER)
        assert "\n" not in str(caught.value)

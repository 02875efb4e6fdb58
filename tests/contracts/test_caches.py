"""Every public cache policy against a plain list of entries."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenlab.cache
from tokenlab import config
from tokenlab.cache import CachePolicy, FullCache

ROWS, CHUNK, HEADS, WIDTH = 3, 4, 2, 2


class Row(NamedTuple):
    """A policy, its capacity, and what it keeps of a list of entries, oldest first."""

    policy: CachePolicy
    capacity: int
    kept: Callable[[list], list]


TABLE = {FullCache: Row(FullCache(capacity=7), 7, lambda entries: entries[:7])}
every = pytest.mark.parametrize("member", TABLE)


def test_the_table_holds_every_public_member():
    public = {
        member
        for member in vars(tokenlab.cache).values()
        if inspect.isclass(member) and issubclass(member, CachePolicy)
    }
    assert public - {CachePolicy} == set(TABLE)


def start(policy, dtype="float32"):
    return policy.init(batch=ROWS, num_kv_heads=HEADS, head_dim=WIDTH, dtype=dtype)


@functools.partial(jax.jit, static_argnums=0)
def append(policy, state, k, v, positions, segments):
    return policy.append(state, k=k, v=v, positions=positions, segments=segments)


@functools.partial(jax.jit, static_argnums=0)
def view(policy, state):
    return policy.view(state, q=jnp.zeros((ROWS, 1, HEADS, WIDTH)))


def chunk(counts, first, first_positions):
    """Ragged new entries, no two alike, and the list of them for each row."""
    size = ROWS * CHUNK * HEADS * WIDTH
    k = np.arange(first, first + size, dtype=np.float32).reshape(ROWS, CHUNK, HEADS, WIDTH)
    steps = np.arange(CHUNK)[None, :]
    positions = (np.asarray(first_positions)[:, None] + steps).astype(np.int32)
    segments = (steps < np.asarray(counts)[:, None]).astype(np.int32)
    entries = [
        [(k[r, t], -k[r, t], positions[r, t]) for t in range(counts[r])] for r in range(ROWS)
    ]
    return (k, -k, positions, segments), entries


def held(policy, state):
    """The entries of each row that a query sees, by position."""
    seen = jax.tree.map(np.asarray, view(policy, state))
    return [
        sorted(
            (
                (seen.k[r, s], seen.v[r, s], seen.positions[r, s])
                for s in np.flatnonzero(seen.segments[r])
            ),
            key=lambda entry: entry[2],
        )
        for r in range(ROWS)
    ]


def same(found, expected):
    assert [len(row) for row in found] == [len(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for left, right in zip(row, wanted, strict=True):
            jax.tree.map(np.testing.assert_array_equal, left, right)


APPENDS = st.lists(
    st.lists(st.integers(0, CHUNK), min_size=ROWS, max_size=ROWS), min_size=1, max_size=5
)


@every
@settings(deadline=None, max_examples=60)
@given(appends=APPENDS, offset=st.integers(0, 1000))
def test_equals_a_list_of_entries(member, appends, offset):
    policy, capacity, kept = TABLE[member]
    state, lists, first = start(policy), [[] for _ in range(ROWS)], 1
    for counts in appends:
        arrays, entries = chunk(counts, first, [offset + len(one) for one in lists])
        state = append(policy, state, *arrays)
        lists = [old + new for old, new in zip(lists, entries, strict=True)]
        first += ROWS * CHUNK * HEADS * WIDTH
        found = held(policy, state)
        same(found, [kept(one) for one in lists])
        assert max(map(len, found)) <= capacity


@every
def test_an_older_state_is_a_fork_that_stays_as_it_was(member):
    policy = TABLE[member].policy
    arrays, _ = chunk([2, 1, 3], 1, [0, 0, 0])
    old = append(policy, start(policy), *arrays)
    before = jax.tree.map(lambda leaf: np.array(leaf), old)
    left, right = (append(policy, old, *chunk([1, 4, 2], f, [2, 1, 3])[0]) for f in (100, 500))
    jax.tree.map(np.testing.assert_array_equal, old, before)
    assert not np.array_equal(view(policy, left).k, view(policy, right).k)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_entries_have_the_dtype_asked_for(member, dtype):
    policy = TABLE[member].policy
    state = start(policy, dtype)
    arrays, _ = chunk([2, 1, 3], 1, [0, 0, 0])
    after = append(policy, state, *arrays)
    assert view(policy, after).k.dtype == view(policy, after).v.dtype == dtype
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one) for one in (state, after)]
    assert shapes[0] == shapes[1]  # a while loop may carry it


@every
def test_rows_do_not_touch_each_other(member):
    policy = TABLE[member].policy
    arrays, entries = chunk([3, 2, 4], 1, [0, 5, 9])
    others = [np.array(array) for array in arrays]
    for array in others:
        array[1] = 0
    whole = held(policy, append(policy, start(policy), *arrays))
    without = held(policy, append(policy, start(policy), *others))
    same([whole[1]], [entries[1]])
    same(without, [whole[0], [], whole[2]])


@every
def test_the_second_append_compiles_nothing(member):
    policy, state = TABLE[member].policy, None
    for counts in ([1, 2, 3], [4, 0, 1]):
        again = config.load(config.dump(policy))
        state = append(
            again, start(again) if state is None else state, *chunk(counts, 1, [0] * 3)[0]
        )
        compiled = append._cache_size()
    append(policy, state, *chunk([0, 0, 0], 1, [0] * 3)[0])
    assert append._cache_size() == compiled


@every
def test_the_object_is_its_own_config(member):
    policy = TABLE[member].policy
    loaded = config.load(config.dump(policy))
    assert loaded == policy and hash(loaded) == hash(policy)
    assert inspect.getdoc(member)

"""Taking back entries of the full cache, as a rejected draft needs it."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.cache import FullCache

POLICY = FullCache(capacity=6)


@jax.jit
def append(state, values):
    """Four new entries in each of two rows; positions count on from the length."""
    positions = state.length[:, None] + jnp.arange(4)[None, :]
    k = values[:, :, None, None]
    return POLICY.append(state, k=k, v=-k, positions=positions, segments=jnp.ones((2, 4), int))


def entries(state):
    seen = POLICY.view(state, q=jnp.zeros((2, 1, 1, 1)))
    return [
        [(float(seen.k[r, s, 0, 0]), float(seen.v[r, s, 0, 0]), int(seen.positions[r, s]))
         for s in np.flatnonzero(seen.segments[r])]
        for r in range(2)
    ]  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3))
def test_truncation_takes_back_the_newest_entries(cuts):
    state = POLICY.init(batch=2, num_kv_heads=1, head_dim=1, dtype=jnp.float32)
    lists = [[], []]
    for turn, lengths in enumerate(cuts):
        values = np.arange(8, dtype=np.float32).reshape(2, 4) + 10 * turn + 1
        state = append(state, values)
        for row, length in enumerate(lengths):
            new = [(v, -v, len(lists[row]) + i) for i, v in enumerate(values[row].tolist())]
            lists[row] = [*lists[row], *new][:6][:length]
        state = POLICY.truncate(state, lengths=jnp.asarray(lengths))
        assert entries(state) == lists

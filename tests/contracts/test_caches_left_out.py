"""Every public cache policy on rows that leave out positions."""

import jax.numpy as jnp
import numpy as np

from tests.contracts.test_caches import CAPACITY, LONG, ROWS, TABLE, every, run, same
from tokenlab.cache import FullCache


@every
def test_rows_may_leave_out_positions(member):
    """As a recursion does that only some tokens enter: budgets hold, and nothing else is read."""
    row, there = TABLE[member], np.random.default_rng(0).random((ROWS, CAPACITY)) < 0.5
    full = run(FullCache(), LONG, there=there)
    if not row.numbers:
        same(run(row.whole, LONG, there=there)[0], full[0])
    lengths = np.sum(LONG, axis=0)
    counts = np.asarray([np.sum(there[i, :n]) for i, n in enumerate(lengths)])
    np.testing.assert_array_equal(full[1].policy.held(full[1].state), counts)
    found, cache = run(row.small, LONG, there=there)
    assert all(np.isfinite(one).all() for one in found)
    assert (np.asarray(row.small.held(cache.state)) <= np.minimum(counts, row.kept) + 1e-6).all()
    shorter = np.maximum(lengths - 5, 0)
    cut = row.small.held(row.small.truncate(cache.state, jnp.asarray(shorter)))
    left = [np.sum(there[i, :n]) for i, n in enumerate(shorter)]
    assert (np.asarray(cut) <= np.asarray(left) + 1e-6).all()
    if row.kept == CAPACITY:
        np.testing.assert_array_equal(cut, left)

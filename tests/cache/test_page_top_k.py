"""Pages: their bounds, and which are read."""

import jax.numpy as jnp
import numpy as np
import pytest
from cached import attend, drawn, entries, fed, heads

from tokenlab.cache import PageTopK
from tokenlab.cache.page_top_k import page_bounds
from tokenlab.core.errors import UserError

LAYER = heads(num_heads=4, num_kv_heads=4)
ARRAYS = drawn((2, 40), LAYER)


def test_a_bound_is_reached_from_below():
    q, k, _ = (jnp.asarray(x, jnp.float32) for x in ARRAYS)
    pages = k.reshape(2, 5, 8, 4, 8)
    low, high = (jnp.moveaxis(f(pages, axis=2), 2, 1) for f in (jnp.min, jnp.max))
    bounds = page_bounds(q[:, -1:], low, high)[:, 0, :, 0]
    scores = jnp.einsum("bhe,bnyhe->bhny", q[:, -1], pages)
    assert (bounds >= scores.max(axis=-1) - 1e-5).all()
    alone = page_bounds(q[:, -1:], *[jnp.moveaxis(k, 2, 1)] * 2)[:, 0, :, 0]
    np.testing.assert_allclose(alone, jnp.einsum("bhe,bshe->bhs", q[:, -1], k), atol=1e-5)


def test_the_pages_of_the_highest_bounds_are_read():
    policy = PageTopK(budget=13, page=4, sinks=2, window=3)
    _, cache = fed(policy, LAYER, [x[:, :36] for x in ARRAYS], [36], capacity=40)
    _, after = attend(cache, entries(*(x[:, 36:37] for x in ARRAYS), 36))
    keys = np.asarray(after.state.store.keys)[:, :, :36].reshape(2, 4, 9, 4, 8)
    at = jnp.full((2, 1), 36)
    q = np.asarray(LAYER.rotate(jnp.asarray(ARRAYS[0][:, 36:37], jnp.float32), positions=at))
    for row, head in np.ndindex(2, 4):
        low, high = keys[row, head].min(axis=1), keys[row, head].max(axis=1)
        one = q[row, 0, head]
        bounds = np.maximum(one * low, one * high).sum(axis=-1)
        expected = [4 * page + i for page in sorted(np.argsort(-bounds)[:2]) for i in range(4)]
        expected = [slot for slot in expected if 2 <= slot < 33]
        assert np.flatnonzero(after.state.reads.chosen[row, head]).tolist() == expected


@pytest.mark.parametrize("budget", [0, 20, 35, 30])
def test_impossible_budgets_are_one_line(budget):
    with pytest.raises(UserError, match=f"budget of {budget} tokens for 4 sinks"):
        PageTopK(budget=budget, page=8, sinks=4, window=16)

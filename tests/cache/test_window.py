"""Rings, sinks, and layers that take turns."""

import jax.numpy as jnp
import numpy as np
import pytest
from cached import attend, drawn, empty, entries, fed, heads, plain_attention

from kernels_pallas.block_sparse_attention import SinkWindow, SlidingWindow
from tokenlab.cache import Cache, FullCache, PerLayer, RingCache, Room, SinkCache
from tokenlab.core.errors import UserError

LAYER = heads()
SIZES = [10, 3, *[1] * 11, 5, 1]
ARRAYS = drawn((2, 30), LAYER)


@pytest.mark.parametrize(
    "policy, rule",
    [
        (RingCache(budget=6), SlidingWindow(size=6)),
        (SinkCache(budget=8, sinks=2), SinkWindow(sinks=2, size=6)),
    ],
)
def test_it_is_the_full_cache_under_the_same_mask(policy, rule):
    found, cache = fed(policy, LAYER, ARRAYS, SIZES, rule=rule)
    expected, _ = fed(FullCache(), LAYER, ARRAYS, SIZES, rule=rule)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert cache.state.k.shape[2] == policy.budget  # and no more is stored


def test_what_is_kept_are_the_first_and_the_newest():
    _, ring = fed(RingCache(budget=6), LAYER, ARRAYS, SIZES)
    assert sorted(ring.state.positions[0].tolist()) == list(range(24, 30))
    _, sinks = fed(SinkCache(budget=8, sinks=2), LAYER, ARRAYS, SIZES)
    assert sorted(sinks.state.positions[0].tolist()) == [0, 1, *range(24, 30)]


@pytest.mark.parametrize("sizes", [[30], [4] * 7 + [2], [1] * 30])
@pytest.mark.parametrize("policy", [RingCache(budget=6), SinkCache(budget=8, sinks=2)])
def test_where_positions_are_left_out_the_window_is_of_positions(policy, sizes):
    """However the row is cut: what has not been overwritten is forgotten too."""
    there = np.isin(np.arange(30), [1, 3, 4, 9, 10, 17, 20, 21, 25, 26])
    cache, start = empty(policy, LAYER, 2, 30), 0
    for size in sizes:
        part = slice(start, start + size)
        new = entries(*(x[:, part] for x in ARRAYS), start)
        new = new._replace(segments=new.segments * there[None, part])
        new = new.take(jnp.tile(jnp.arange(size), (2, 1)), jnp.full(2, size))
        _, cache = attend(cache, new, stage="next" if start else "first")
        start += size
    kept = [1] if isinstance(policy, SinkCache) else []
    assert sorted(p for p in cache.state.positions[0].tolist() if p >= 0) == [*kept, 21, 25, 26]


def test_renumbered_sinks_are_attention_over_what_is_kept_alone():
    """One token at a time: keys 0..7 and the query at 8, whatever the row's length."""
    policy = SinkCache(budget=8, sinks=2, renumber=True)
    _, cache = fed(policy, LAYER, ARRAYS, [10, 3, *[1] * 9], capacity=30)
    q, k, v = (x[:, 22:23] for x in ARRAYS)
    out, _ = attend(cache, entries(q, k, v, 22))
    seen = [0, 1, *range(16, 23)]
    for row in range(2):
        q, k, v = (x[row][seen] for x in ARRAYS)
        expected = plain_attention(q[-1:], k, v, LAYER, np.ones((1, 9), bool), q_positions=[8])
        np.testing.assert_allclose(out[row], expected, atol=2e-5)


def test_layers_take_turns():
    ring, full = RingCache(budget=3), FullCache()
    cache = Cache.empty(PerLayer(policies=(ring, ring, full)), Room(1, 8, "float32"), (LAYER,) * 7)
    sizes = [state.positions.shape[1] for state in cache.states]
    assert sizes == [3, 3, 8, 3, 3, 8, 3]
    assert cache.held().shape == (7, 1)
    mixed = PerLayer(policies=(SinkCache(budget=5, renumber=True), full))
    assert [cache.policy.rotated, mixed.rotated, mixed.of_layer(1).rotated] == [True, False, True]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RingCache(budget=0), "RingCache.budget is 0; keep at least 1"),
        (lambda: SinkCache(budget=4, sinks=4), "budget of 4 tokens for 4 sinks"),
        (lambda: SinkCache(budget=4, sinks=-1), "use 0 <= sinks < budget"),
        (lambda: PerLayer(policies=()), "PerLayer has no policies"),
    ],
)
def test_impossible_budgets_are_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_prompt_longer_than_the_ring_leaves_its_end():
    q, k, v = ARRAYS
    _, cache = fed(RingCache(budget=4), LAYER, [x[:, :16] for x in (q, k, v)], [16])
    kept = sorted(zip(cache.state.positions[1].tolist(), cache.state.v[1, 0], strict=True))
    assert [position for position, _ in kept] == [12, 13, 14, 15]
    for position, value in kept:
        np.testing.assert_allclose(value, v[1, position, 0], rtol=1e-6)

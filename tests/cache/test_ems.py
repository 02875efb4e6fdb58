"""EMS: scores, classes and what compression leaves."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from cached import attend, drawn, entries, fed, heads, still

from tokenlab.cache import EMS, FullCache
from tokenlab.core.errors import UserError

LAYER = heads()
ARRAYS = drawn((2, 60), LAYER)
POLICY = EMS(budget=20, window=4, slack=4, pooling=1, redundant=0.2)


def test_scores_of_uniform_attention():
    q, k, v = (np.zeros_like(x[:, :8]) if i == 0 else x[:, :8] for i, x in enumerate(ARRAYS))
    policy = EMS(budget=20, window=2, slack=0, pooling=1)
    _, cache = fed(policy, LAYER, (q, k, v), [8], capacity=20)
    state = cache.state
    mass = [2.718, 1.718, 1.218, 0.885, 0.635, 0.435, 0.268, 0.125]
    s = [0.6795, 0.4295, 0.3045, 0.2679, 0.2679, 0.2679, 0.2679, 0.125]
    for row, head in np.ndindex(2, 2):
        np.testing.assert_allclose(state.mass[row, head, :8], mass, atol=6e-4)
        local = [0.268] * 7 + [0.125]
        np.testing.assert_allclose(state.rows[row, head].sum(axis=0)[:8], local, atol=6e-4)
        np.testing.assert_allclose(policy.scores(state)[row, head, :8], s, atol=6e-4)


@pytest.mark.parametrize("sizes", [pytest.param([30], marks=pytest.mark.slow), [25, *[1] * 5]])
def test_mass_is_that_of_the_whole_attention_however_it_is_read(sizes):
    """And rows of attention sum to 1: ``sum(global) = T``, ``sum(local) = L``."""
    arrays = [x[:, :30] for x in ARRAYS]
    policy = EMS(budget=40, window=4, slack=0, pooling=1)
    _, cache = fed(policy, LAYER, arrays, sizes, capacity=40)
    q, k = (np.asarray(LAYER.rotate(jnp.asarray(x), positions=jnp.arange(30)[None].repeat(2, 0)))
            for x in arrays[:2])  # fmt: skip
    scores = LAYER.scale * np.einsum("bthe,bshe->bhts", q, np.repeat(k, 2, axis=2))
    weights = np.exp(np.where(np.tri(30, dtype=bool), scores, -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    weights = weights.reshape(2, 2, 2, 30, 30).mean(axis=2)
    np.testing.assert_allclose(cache.state.mass[..., :30], weights.sum(axis=2), atol=1e-4)
    np.testing.assert_allclose(cache.state.rows[..., :30], weights[:, :, -4:], atol=1e-5)
    np.testing.assert_allclose(cache.state.mass.sum(axis=2), 30, rtol=1e-5)
    np.testing.assert_allclose(cache.state.rows.sum(axis=(2, 3)), 4, rtol=1e-5)


def test_a_cache_that_holds_all_is_unchanged():
    sizes = [50, *[1] * 10]
    policy = dataclasses.replace(POLICY, budget=61)
    found, cache = fed(policy, LAYER, ARRAYS, sizes)
    expected, full = fed(FullCache(), LAYER, ARRAYS, sizes)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_array_equal(cache.state.k, full.state.k)


def test_without_merging_it_is_eviction_by_score():
    policy = dataclasses.replace(POLICY, redundant=2.0)
    arrays = [x[:, :40] for x in ARRAYS]
    _, cache = fed(policy, LAYER, arrays, [40], capacity=60)
    _, whole = fed(dataclasses.replace(policy, budget=60), LAYER, arrays, [40], capacity=60)
    scores = np.asarray(policy.scores(whole.state))[..., :36]
    for row, head in np.ndindex(2, 2):
        best = np.argsort(-scores[row, head])[:12]
        kept = np.asarray(cache.state.positions)[row, head]
        assert sorted(kept[kept >= 0]) == [*np.sort(best), 36, 37, 38, 39]
        for slot, position in enumerate(kept[kept >= 0]):
            np.testing.assert_array_equal(
                cache.state.k[row, head, slot], whole.state.k[row, head, position]
            )
    np.testing.assert_array_equal(cache.state.dropped, 24)


def test_every_token_is_in_one_class_or_dropped():
    sizes = [50, *[1] * 10]
    _, cache = fed(POLICY, LAYER, ARRAYS, sizes)
    counts = np.asarray(cache.state.counts.sum(axis=2) + cache.state.dropped)
    np.testing.assert_array_equal(counts, 60)
    assert (np.asarray(cache.state.dropped) > 0).all()
    assert (np.asarray(cache.state.counts).max(axis=2) > 1).all()
    # Scores of a class are those of its members; what is dropped is lost.
    assert (np.asarray(cache.state.mass.sum(axis=2)) < 60).all()


def test_heads_are_apart():
    q, k, v = ARRAYS
    layer = heads(num_heads=2, num_kv_heads=2)
    _, cache = fed(POLICY, layer, (q[:, :, :2], k, v), [40, *[1] * 10], capacity=60)
    turned = (q[:, :, 1::-1], k[:, :, ::-1], v[:, :, ::-1])
    _, other = fed(POLICY, layer, turned, [40, *[1] * 10], capacity=60)
    for one in ("k", "v", "mass", "positions", "counts"):
        ours, theirs = getattr(cache.state, one), getattr(other.state, one)
        np.testing.assert_allclose(ours, np.asarray(theirs)[:, ::-1], atol=1e-5)


def test_a_class_is_the_weighted_mean_of_its_members():
    """Six tokens of which the last two stay; one centre, whose direction two others share."""
    layer = heads(num_heads=1, num_kv_heads=1, width=4, rotate=still)
    q = np.zeros((1, 6, 1, 4))
    base_k, base_v = np.eye(4)[0], np.eye(4)[1]
    k = np.stack([base_k, 2 * base_k + 0.1, -base_k, 3 * base_k, base_k, base_k])[None, :, None]
    v = np.stack([base_v, base_v + 0.2, -base_v, 2 * base_v, base_v, base_v])[None, :, None]
    policy = EMS(budget=4, window=2, slack=1, pooling=1, relevant=1.0, redundant=0.5)
    _, cache = fed(policy, layer, (q, k, v), [6], capacity=8)
    state = cache.state
    assert state.positions[0, 0].tolist() == [0, 4, 5, -1]
    # Uniform attention: s falls with the position. Token 2 points away in key and value both, and
    # with the cosines not cut off it would have looked redundant.
    mass = np.array([sum(1 / n for n in range(i + 1, 7)) for i in range(6)])
    local = np.array([1 / 5 + 1 / 6] * 5 + [1 / 6])
    s = np.maximum(mass * 2 / 6, local)
    weights = s[[0, 1, 3]] / s[[0, 1, 3]].sum()
    members_k, members_v = k[0, [0, 1, 3], 0], v[0, [0, 1, 3], 0]
    norms = np.linalg.norm(members_k, axis=1)
    direction = weights @ (members_k / norms[:, None])
    expected = direction / np.linalg.norm(direction) * (weights @ norms)
    np.testing.assert_allclose(state.k[0, 0, 0], expected, atol=1e-5)
    np.testing.assert_allclose(state.v[0, 0, 0], weights @ members_v, atol=1e-5)
    assert state.counts[0, 0].tolist() == [3, 1, 1, 0] and float(state.dropped[0, 0]) == 1
    np.testing.assert_allclose(state.mass[0, 0, 0], mass[[0, 1, 3]].sum(), atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_merging_duplicates_is_exact_with_the_count(bias):
    layer = heads(num_heads=1, num_kv_heads=1, width=4, rotate=still)
    q, k, v = drawn((1, 8), layer, seed=3)
    for x in (k, v):
        x[:, 1:3] = x[:, :1]
    policy = EMS(budget=5, window=4, slack=0, pooling=1, relevant=1.0, log_count_bias=bias)
    outs = []
    for one in (policy, FullCache()):
        _, cache = fed(one, layer, [x[:, :7] for x in (q, k, v)], [7], capacity=12)
        outs.append(attend(cache, entries(q[:, 7:], k[:, 7:], v[:, 7:], 7))[0])
        if one is policy:
            assert cache.state.counts[0, 0].tolist() == [3, 1, 1, 1, 1]
            np.testing.assert_allclose(cache.state.k[0, 0, 0], k[0, 0, 0], rtol=1e-5)
            np.testing.assert_allclose(cache.state.v[0, 0, 0], v[0, 0, 0], rtol=1e-5)
    difference = float(jnp.abs(outs[0] - outs[1]).max())
    assert difference < 1e-5 if bias else difference > 0.005


def test_a_class_whose_directions_cancel_is_finite():
    layer = heads(num_heads=1, num_kv_heads=1, width=4, rotate=still)
    k = np.zeros((1, 8, 1, 4))
    k[0, ::2, 0, 0], k[0, 1::2, 0, 0] = 1, -1
    policy = EMS(budget=4, window=2, slack=1, pooling=1, redundant=0.0)
    _, cache = fed(policy, layer, (np.zeros_like(k), k, np.zeros_like(k)), [8], capacity=8)
    assert np.isfinite(np.asarray(cache.state.k)).all()


def test_impossible_requests_are_one_line():
    with pytest.raises(UserError, match="budget of 8 entries for a window of 6 and a slack of 2"):
        EMS(budget=8, window=6, slack=2)
    with pytest.raises(UserError, match="pooling is 2; a width is odd"):
        EMS(pooling=2)
    with pytest.raises(UserError, match="log_count_bias needs scores without a soft-cap"):
        fed(dataclasses.replace(POLICY, log_count_bias=True), heads(softcap=5.0), ARRAYS, [60])

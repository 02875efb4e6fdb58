"""LouisKV: clusters, segments, boundaries and what is moved."""

import jax.numpy as jnp
import numpy as np
import pytest
from cached import attend, drawn, entries, fed, heads, plain_attention, still

from tokenlab.cache import FullCache, LouisKV
from tokenlab.cache.clusters import spherical_k_means
from tokenlab.core.errors import UserError

LAYER = heads()
ARRAYS = drawn((2, 64), LAYER)
SMALL = {"budget": 16, "sinks": 2, "window": 4, "cluster": 3, "segment": 4}


def counters(cache, row=0):
    return {k: float(x[row]) for k, x in cache.policy.counters(cache.state).items()}


@pytest.mark.parametrize(
    "other",
    [
        {"jump": 0.1, "cluster": 1},
        pytest.param({"jump": -1.0}, marks=pytest.mark.slow),
        pytest.param({"jump": 2.0}, marks=pytest.mark.slow),
        pytest.param({"segment": 40, "window": 1}, marks=pytest.mark.slow),
    ],
)
def test_equals_full_attention_where_the_budget_covers_the_row(other):
    sizes = [20, 12, *[1] * 32]
    found, _ = fed(LouisKV(**SMALL | {"budget": 64} | other), LAYER, ARRAYS, sizes)
    expected, _ = fed(FullCache(), LAYER, ARRAYS, sizes)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def decode(policy, queries, *, layer=LAYER, prompt=40):
    """A prompt, then one token of random key and value for each query ``[H, E]``."""
    q, k, v = (x[:1, :prompt] for x in ARRAYS)
    _, cache = fed(policy, layer, (q, k, v), [prompt], capacity=64)
    for step, query in enumerate(queries):
        at = prompt + step
        new = entries(query[None, None], ARRAYS[1][:1, at : at + 1], ARRAYS[2][:1, at : at + 1], at)
        _, cache = attend(cache, new)
    return cache


@pytest.mark.slow
def test_how_often_is_retrieved():
    still_heads = heads(rotate=still)
    queries = ARRAYS[0][1, :8]
    assert counters(decode(LouisKV(**SMALL, jump=-1.0), queries))["cache_selections"] == 1
    found = counters(decode(LouisKV(**SMALL, jump=2.0), queries))
    assert found["cache_selections"] == found["cache_passes"] == 8
    constant = np.repeat(queries[:1], 8, axis=0)
    for turned, layer in ((False, LAYER), (True, still_heads)):
        policy = LouisKV(**SMALL, jump=0.99, turned=turned)
        # The first of them is unlike the prompt's last query; the rest are alike.
        assert counters(decode(policy, constant, layer=layer))["cache_selections"] == 1
    signs = np.array([1, -1] * 4)[:, None, None]
    alternating = constant * signs
    policy = LouisKV(**SMALL, jump=-0.99)
    assert counters(decode(policy, alternating))["cache_selections"] == 8
    # After rotation equal queries differ.
    policy = LouisKV(**SMALL, jump=0.99, turned=True)
    assert counters(decode(policy, constant))["cache_selections"] == 8


def test_with_single_tokens_as_units_it_is_the_best_tokens_of_every_step():
    policy = LouisKV(budget=10, sinks=0, window=0, cluster=1, segment=1, jump=2.0)
    layer = heads(num_heads=2, num_kv_heads=2)
    q, k, v = drawn((2, 48), layer)
    _, cache = fed(policy, layer, [x[:, :40] for x in (q, k, v)], [40], capacity=48)
    for at in range(40, 46):
        out, cache = attend(cache, entries(*(x[:, at : at + 1] for x in (q, k, v)), at))
        for row, head in np.ndindex(2, 2):
            turned = np.asarray(
                layer.rotate(jnp.asarray(k[row : row + 1, :at]), positions=jnp.arange(at)[None])
            )[0, :, head]
            own = np.asarray(
                layer.rotate(
                    jnp.asarray(q[row : row + 1, at : at + 1]), positions=jnp.array([[at]])
                )
            )[0, 0, head]
            seen = np.sort(np.argsort(-(turned @ own))[:10])
            assert np.flatnonzero(cache.state.reads.chosen[row, head]).tolist() == seen.tolist()
            read = [*seen, at]
            one = layer._replace(num_heads=1, num_kv_heads=1)
            expected = plain_attention(
                q[row, at : at + 1, head : head + 1], k[row, read, head : head + 1],
                v[row, read, head : head + 1], one, np.ones((1, 11), bool),
                q_positions=[at], k_positions=np.asarray(read),
            )  # fmt: skip
            np.testing.assert_allclose(out[row, :, head : head + 1], expected, atol=2e-5)


def test_the_first_units_are_taken_whole_and_the_last_in_part():
    policy = LouisKV(**SMALL, jump=2.0)
    cache = decode(policy, ARRAYS[0][1, :1])
    state = cache.state
    chosen, of = np.asarray(state.reads.chosen)[0], np.asarray(state.of)[0]
    candidates = np.arange(64) < 36
    candidates[:2] = False  # the sinks; the window is the last four of the prompt
    for head in range(2):
        taken = np.flatnonzero(chosen[head])
        assert len(taken) == 10 and candidates[taken].all()
        whole = [
            unit for unit in set(of[head, taken])
            if chosen[head][candidates & (of[head, :64] == unit)].all()
        ]  # fmt: skip
        assert len(set(of[head, taken])) - len(whole) <= 1


def test_clusters_part_the_prompt_and_centroids_are_means():
    policy = LouisKV(**SMALL)
    q, k, v = ARRAYS
    _, cache = fed(policy, LAYER, [x[:, :40] for x in (q, k, v)], [40], capacity=64)
    state = cache.state
    sizes, of = np.asarray(state.sizes), np.asarray(state.of)
    np.testing.assert_array_equal(sizes.sum(axis=2), 40)
    assert (of[:, :, :40] >= 0).all() and (of[:, :, 40:] == -1).all()
    keys = np.asarray(state.store.keys)
    for row, head, unit in np.ndindex(2, 2, 14):
        members = keys[row, head, of[row, head] == unit]
        assert len(members) == sizes[row, head, unit]
        np.testing.assert_allclose(
            state.sums[row, head, unit], members.sum(axis=0, initial=0.0), atol=1e-5
        )


@pytest.mark.parametrize("centred", [False, True])
def test_planted_clusters_are_found_and_the_objective_never_rises(centred):
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(16, 16)))[0][:6]
    of = rng.integers(0, 6, size=(2, 3, 50))
    keys = 3 * centres[of] + 0.2 * rng.normal(size=(2, 3, 50, 16)) + 5 * centred
    found = spherical_k_means(
        jnp.asarray(keys), valid=jnp.ones((2, 50), bool), counts=jnp.asarray([6, 6]), most=8,
        centred=centred,
    )  # fmt: skip
    for row, head in np.ndindex(2, 3):
        pairs = set(zip(of[row, head].tolist(), found.of[row, head].tolist(), strict=True))
        assert len(pairs) == len(set(of[row, head].tolist()))
    noise = spherical_k_means(
        jnp.asarray(rng.normal(size=(2, 3, 50, 16))), most=8, counts=jnp.asarray([8, 5]),
        valid=jnp.arange(50)[None] < jnp.asarray([[50], [33]]),
    )  # fmt: skip
    assert (np.diff(noise.objective, axis=2) <= 1e-6).all()
    assert np.diff(noise.objective, axis=2).min() < -1e-3
    assert noise.of[1].max() <= 4 and (noise.of[1, :, 33:] == -1).all()


def test_segments_and_window_have_every_written_token_once():
    policy = LouisKV(budget=30, sinks=2, window=6, cluster=3, segment=4, jump=0.1)
    cache = decode(policy, ARRAYS[0][1, :23])
    state, end = cache.state, 63
    of, starts = np.asarray(state.of)[0], np.asarray(state.starts)[0]
    assert (of[:, 40:end] == of[:1, 40:end]).all()  # all heads alike
    written = of[0, 40:end]
    assert (np.diff(written) >= 0).all() and written.min() > of[:, :40].max()
    _, counts = np.unique(written, return_counts=True)
    assert counts.sum() == 23 and counts.max() <= 4 and len(counts) > 6
    q = ARRAYS[0][1, :23].reshape(23, -1)
    q = np.concatenate([ARRAYS[0][0, 39].reshape(1, -1), q]).reshape(24, 4, 8)
    cosines = np.sum(q[1:] * q[:-1], axis=-1)
    cosines /= np.linalg.norm(q[1:], axis=-1) * np.linalg.norm(q[:-1], axis=-1)
    jumps, begins, size = cosines.mean(axis=-1) < 0.1, [], 0
    for jump in jumps:
        begins.append(size == 0 or size == 4 or bool(jump))
        size = 1 if begins[-1] else size + 1
    np.testing.assert_array_equal(np.diff(written) > 0, begins[1:])
    in_window = np.arange(64)[40:end][starts[40:end] >= end - 6]
    begin = in_window[0]
    assert begin == 40 + max(np.flatnonzero(begins)[np.flatnonzero(begins) >= 23 - 6].min(), 0)


def test_what_was_chosen_before_is_not_moved():
    queries = ARRAYS[0][1, :2]
    policy = LouisKV(**SMALL, jump=2.0)
    once = decode(policy, queries[:1])
    twice = decode(policy, queries)
    chosen = [np.asarray(c.state.reads.chosen)[0] for c in (once, twice)]
    fresh = (chosen[1] & ~chosen[0]).sum(axis=1).mean()
    assert counters(once)["cache_tokens_moved"] == 10
    assert counters(twice)["cache_tokens_moved"] == 10 + fresh
    bytes_each = 2 * LAYER.num_kv_heads * LAYER.width * 4
    assert counters(twice)["cache_bytes_moved"] == (10 + fresh) * bytes_each


def test_a_full_table_of_units_loses_no_token():
    policy = LouisKV(budget=20, sinks=0, window=4, cluster=16, segment=1, jump=2.0)
    cache = decode(policy, ARRAYS[0][1, :20])
    assert int(cache.state.used[0]) == 8 == cache.state.sizes.shape[2]
    np.testing.assert_array_equal(np.asarray(cache.state.sizes).sum(axis=2)[0], 60)


def test_impossible_budgets_are_one_line():
    with pytest.raises(UserError, match="budget of 20 tokens for 16 sinks and a window of 4"):
        LouisKV(budget=20, sinks=16, window=4)
    with pytest.raises(UserError, match="must be at least 1"):
        LouisKV(cluster=0)

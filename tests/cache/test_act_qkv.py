"""ActQKV: probes, statistics, budgets and what is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached import attend, drawn, entries, fed, heads, plain_attention, still

from tokenlab.cache import ActQKV
from tokenlab.cache.probes import Moments, layer_budgets, probe_weights
from tokenlab.core.errors import UserError

LAYER = heads()
ARRAYS = drawn((2, 64), LAYER)
POLICY = ActQKV(budget=19, sinks=3, window=6, block=2)


def moments(mean, variance, windows=1.0):
    rows = len(mean)
    return Moments(jnp.asarray(mean), jnp.asarray(variance), jnp.full(rows, windows))


def weights(u, known=None, warm=1):
    u = jnp.asarray(u, jnp.float32)
    known = Moments.none(u.shape[0], u.shape[2]) if known is None else known
    return probe_weights(u, jnp.ones(u.shape[:2], bool), known, warm=warm)


def test_a_token_weighs_as_much_as_it_is_unlike_the_mean():
    u = np.array([[[1.0], [3.0]]])
    found = weights(u, moments([[0.0]], [[1.0]]))
    np.testing.assert_allclose(found, [[0.1, 0.9]], rtol=1e-6)
    np.testing.assert_allclose((found[..., None] * u).sum(), 2.8, rtol=1e-6)


def test_weights_sum_to_one_and_do_not_know_the_order():
    u = np.random.default_rng(0).normal(size=(3, 7, 5))
    known = moments(np.full((3, 5), 0.3), np.full((3, 5), 2.0))
    found = weights(u, known)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    order = [3, 0, 6, 2, 1, 5, 4]
    np.testing.assert_allclose(weights(u[:, order], known), found[:, jnp.asarray(order)], rtol=1e-5)
    # Equally unlike: uniform, and the probe is the mean. All equal to it: the same.
    signs = np.array([1.0, -1, -1, 1])[None, :, None] * np.ones((1, 4, 5))
    np.testing.assert_allclose(weights(signs, moments(np.zeros((1, 5)), np.ones((1, 5)))), 0.25)
    constant = np.ones((1, 4, 5))
    np.testing.assert_allclose(weights(constant, moments(np.ones((1, 5)), np.ones((1, 5)))), 0.25)
    np.testing.assert_allclose(weights(constant), 0.25)
    # Before it is warm a pass is measured by itself.
    np.testing.assert_allclose(weights(u, known, warm=2), weights(u), rtol=1e-5)


def test_budgets_follow_the_entropies():
    def shares(mu, total, least, most):
        mu = jnp.asarray(mu, jnp.float32)[:, None]
        return layer_budgets(mu, total=total, least=least, most=most)[:, 0].tolist()

    assert shares([0.9, 0.6, 0.3, 0.2], 40, 2, 20) == [18, 12, 6, 4]
    assert shares([1, 0.1, 0.1, 0.1], 40, 2, 20) == [20, 7, 6, 7]
    assert shares([0.4] * 4, 40, 2, 20) == shares([0.0] * 4, 40, 2, 20) == [10] * 4
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = shares(rng.uniform(size=6), 60, 0, 20)
        assert sum(found) <= 60 and min(found) >= 0 and max(found) <= 20
    assert sum(shares([1, 1e-9, 1e-9], 9, 3, 9)) > 9  # the least binds


def test_the_mean_is_that_of_the_window_means():
    u = jnp.asarray(np.random.default_rng(1).normal(size=(2, 24, 5)), jnp.float32)
    every = jnp.ones((2, 24), bool)
    whole = Moments.none(2, 5).then(u, every)
    parts = Moments.none(2, 5)
    for start in range(0, 24, 6):
        parts = parts.then(u[:, start : start + 6], every[:, :6])
    np.testing.assert_allclose(whole.mean, parts.mean, atol=1e-6)
    np.testing.assert_allclose(whole.mean, u.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(whole.variance, jnp.var(u, axis=1, ddof=1), rtol=1e-5)
    first = Moments.none(2, 5).then(u[:, :6], every[:, :6])
    second = first.then(u[:, 6:10], every[:, :4])
    m, v, n = u[:, 6:10].mean(axis=1), u[:, 6:10].var(axis=1), 4
    expected = first.variance * (1 - 1 / n) + v + (m - first.mean) ** 2 / (1 + 1)
    np.testing.assert_allclose(second.variance, expected / (1 + 1 - 1 / n), rtol=1e-5)
    nothing = first.then(u[:, :4], jnp.zeros((2, 4), bool))
    np.testing.assert_array_equal(nothing.mean, first.mean)
    assert nothing.windows.tolist() == first.windows.tolist()


@pytest.mark.parametrize("size", [1, 3])
def test_with_all_blocks_it_is_attention_with_far_tokens_at_one_distance(size):
    policy = dataclasses.replace(POLICY, budget=19 + 2 * 20)
    _, cache = fed(policy, LAYER, ARRAYS, [41], capacity=64)
    new = entries(*(x[:, 41 : 41 + size] for x in ARRAYS), 41)
    out, after = attend(cache, new)
    assert (after.policy.counters(after.state)["cache_selections"] == 0).all()
    n = 41 + size
    q, k, v = ARRAYS
    near = np.arange(n) >= n - 6

    def turned(x, positions):
        x = jnp.asarray(x, jnp.float32)
        return np.asarray(LAYER.rotate(x, positions=jnp.asarray(positions)[None].repeat(2, 0)))

    far_q = np.repeat(turned(q[:, 41:n], [6] * size)[:, :, None], n, axis=2)
    own_q = np.repeat(turned(q[:, 41:n], range(41, n))[:, :, None], n, axis=2)
    qs = np.where(near[None, None, :, None, None], own_q, far_q)
    ks = np.where(near[None, :, None, None], turned(k[:, :n], range(n)), k[:, :n])
    ks, vs = (np.repeat(x, 2, axis=2) for x in (ks, v[:, :n]))
    scores = LAYER.scale * np.einsum("btshe,bshe->bths", qs, ks)
    seen = np.arange(n)[None] <= np.arange(41, n)[:, None]
    weights = np.exp(np.where(seen[None, :, None], scores, -np.inf))
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("bths,bshe->bthe", weights, vs), atol=2e-5)


def test_the_blocks_nearest_to_the_probe_are_read():
    _, cache = fed(POLICY, LAYER, ARRAYS, [30, 6], capacity=64)
    state = cache.state
    # Sinks 0-2, blocks of two to 28, one token that fills none, the window from 30.
    assert state.known.tolist() == [13, 13]
    keys = np.repeat(np.asarray(state.store.keys), 2, axis=1)
    blocks = keys[:, :, 3:29].reshape(2, 4, 13, 2, 8).mean(axis=3)
    np.testing.assert_allclose(state.representatives[:, :, :13], blocks, atol=1e-5)
    new = entries(*(x[:, 36:40] for x in ARRAYS), 36)
    _, after = attend(cache, new)
    far = LAYER.rotate(new.q, positions=jnp.full((2, 4), 6))
    u = np.asarray(far).reshape(2, 4, -1)
    w = np.asarray(probe_weights(jnp.asarray(u), jnp.ones((2, 4), bool), state.moments, warm=1))
    probe = np.einsum("bt,btd->bd", w, u)
    flat = blocks.swapaxes(1, 2).reshape(2, 13, -1)
    cosines = np.einsum("bd,bnd->bn", probe, flat) / np.linalg.norm(flat, axis=2)
    for row in range(2):
        best = np.sort(np.argsort(-cosines[row])[: POLICY.blocks])
        expected = [3 + 2 * block + i for block in best for i in range(2)]
        assert np.flatnonzero(after.state.reads.chosen[row, 0]).tolist() == expected


def test_a_representative_is_of_the_tokens_with_the_most_attention():
    """Blocks of six: four are taken. Attention is counted while they are in the window."""
    policy = ActQKV(budget=6 + 12, sinks=0, window=6, block=6)
    layer = heads(num_heads=2, num_kv_heads=2, rotate=still)
    q, k, v = drawn((1, 20), layer)
    outs = {}
    for name, sizes in {"whole": [20], "in parts": [5, 4, *[1] * 11]}.items():
        _, cache = fed(policy, layer, (q, k, v), sizes, capacity=24)
        outs[name] = cache.state
    for name in ("mass", "representatives"):
        left, right = (getattr(state, name) for state in outs.values())
        np.testing.assert_allclose(left, right, atol=1e-5)
    assert outs["whole"].known.tolist() == [2]
    for head in range(2):
        mass = np.zeros(20)
        for t in range(20):
            seen = np.arange(max(0, t - 5), t + 1)
            row = np.exp(layer.scale * k[0, seen, head] @ q[0, t, head])
            mass[seen] += row / row.sum()
        np.testing.assert_allclose(outs["whole"].mass[0, head, :20], mass, rtol=1e-4)
        for block in range(2):
            top = 6 * block + np.argsort(-mass[6 * block : 6 * block + 6])[:4]
            found = outs["whole"].representatives[0, head, block]
            np.testing.assert_allclose(found, k[0, top, head].mean(axis=0), atol=1e-5)


def test_a_question_pulls_its_blocks():
    layer = heads(num_heads=1, num_kv_heads=1, rotate=still)
    q, k, v = drawn((1, 40), layer)
    target = 13  # a block that the question asks for
    q[0, 1:3] = 5 * k[0, 2 + 2 * target : 4 + 2 * target].mean(axis=0)
    chosen = {}
    for question in (None, (1, 3)):
        policy = ActQKV(budget=2 + 4 + 2 + 2, sinks=2, window=4, block=2, question=question)
        _, cache = fed(policy, layer, [x[:, :36] for x in (q, k, v)], [36], capacity=40)
        _, cache = attend(cache, entries(*(x[:, 36:39] for x in (q, k, v)), 36))
        chosen[question] = np.flatnonzero(cache.state.reads.chosen[0, 0]).tolist()
    assert chosen[(1, 3)] == [28, 29] != chosen[None]


def test_layers_share_blocks_after_enough_tokens():
    """The layer whose scores are more even reads more blocks, the other fewer."""
    policy = ActQKV(
        budget=2 + 4 + 2 * 5, sinks=2, window=4, block=2, history=3, temperature=0.05, least=1
    )
    layer = heads(rotate=still)
    _, cache = fed(policy, layer, [x[:, :40] for x in ARRAYS], [40], capacity=64)
    sharp, even = cache.state, cache.state
    even = even.replace(representatives=jnp.ones_like(even.representatives))
    states = (sharp, even)
    for step in range(4):
        new = entries(*(x[:, 40 + step : 41 + step] for x in ARRAYS), 40 + step)
        states = tuple(policy.read(state, new, heads=layer).state for state in states)
        states = policy.after_pass(states)
        quotas = [state.quota.tolist() for state in states]
        if step < 2:
            assert quotas == [[4, 4], [4, 4]]
    np.testing.assert_allclose(states[1].entropies[:, :3], 1.0, rtol=1e-5)
    shares = [
        layer_budgets(
            jnp.stack([s.entropies.mean(axis=1) for s in states]), total=8, least=1, most=8
        )
    ]
    assert quotas == shares[0].tolist() and quotas[0] < quotas[1]
    counted = [int(x) for x in policy.counters(states[1])["cache_blocks_beyond_average"]]
    assert counted == [quota - 4 for quota in quotas[1]]
    scores = jax.nn.log_softmax(jnp.zeros(3))
    assert np.isfinite(np.asarray(scores)).all()


def test_what_is_read_grows_with_the_quota():
    _, cache = fed(POLICY, LAYER, ARRAYS, [50], capacity=64)
    new = entries(*(x[:, 50:51] for x in ARRAYS), 50)
    pairs = []
    for quota in (2, POLICY.blocks, 2 * POLICY.blocks):
        state = cache.state.replace(quota=jnp.full(2, quota, jnp.int32))
        _, after = attend(cache.replace(state=state), new)
        pairs.append(float(after.pairs[0]))
    assert pairs[1] <= POLICY.budget
    assert pairs[1] - pairs[0] == 2 * (POLICY.blocks - 2)
    assert pairs[2] - pairs[1] == 2 * POLICY.blocks


def test_output_is_exact_attention_over_what_is_read():
    layer = heads(rotate=still)
    _, cache = fed(POLICY, layer, [x[:, :50] for x in ARRAYS], [50], capacity=64)
    out, after = attend(cache, entries(*(x[:, 50:51] for x in ARRAYS), 50))
    for row in range(2):
        read = np.flatnonzero(after.state.reads.chosen[row, 0]).tolist()
        read = sorted({0, 1, 2, *read, *range(3 + 2 * int(cache.state.known[row]), 51)})
        q, k, v = (x[row] for x in ARRAYS)
        expected = plain_attention(q[50:51], k[read], v[read], layer, np.ones((1, len(read)), bool))
        np.testing.assert_allclose(out[row], expected, atol=2e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"budget": 600}, "budget of 600 tokens for 64 sinks, a window of 512"),
        ({"budget": 2081}, "leave a multiple of the block"),
        ({"history": 0}, "history must be at least 1"),
        ({"least": 47}, "least is 47 blocks of 46 on average"),
        ({"question": (5, 5)}, "give its begin and its end"),
    ],
)
def test_impossible_requests_are_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        ActQKV(**fields)


def test_a_pass_longer_than_the_window_is_refused():
    with pytest.raises(UserError, match="reads 7 tokens at once and its window is 6"):
        fed(POLICY, LAYER, ARRAYS, [20, 7], capacity=64)

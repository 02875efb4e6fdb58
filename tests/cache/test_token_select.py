"""TokenSelect against votes and attention worked out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached import attend, drawn, entries, fed, heads, plain_attention, still

from kernels_pallas.decode_attention import token_scores
from tokenlab.cache import FullCache, TokenSelect
from tokenlab.core.errors import UserError

LAYER = heads()
ARRAYS = drawn((2, 48), LAYER)
POLICY = TokenSelect(budget=14, sinks=2, window=6)


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def test_equals_full_attention_where_everything_is_selected():
    sizes = [20, 6, 6, *[1] * 16]
    found, cache = fed(TokenSelect(budget=48, sinks=2, window=6), LAYER, ARRAYS, sizes)
    expected, _ = fed(FullCache(), LAYER, ARRAYS, sizes)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert (cache.policy.counters(cache.state)["cache_selections"] == 0).all()


def test_each_head_has_one_vote():
    """Logits [50, 49, 0, 0] and [0, 0, 0, 5]: votes take {0, 3}, sums would take {0, 1}."""
    layer = heads(num_heads=2, num_kv_heads=2, width=4, rotate=still)
    logits = np.array([[50, 49, 0, 0], [0, 0, 0, 5]], float)
    q = np.zeros((1, 1, 2, 4))
    q[..., 0] = 1
    k = np.zeros((1, 6, 2, 4))
    k[0, :4, :, 0] = logits.T
    votes = token_scores(
        q=jnp.asarray(q), k=jnp.asarray(k[:, :4].swapaxes(1, 2)), scale=1.0,
        q_positions=jnp.asarray([[9]]),
    )  # fmt: skip
    np.testing.assert_allclose(votes[0], [0.738, 0.276, 0.0066, 0.980], atol=6e-4)
    policy = TokenSelect(budget=4, sinks=0, window=2)
    _, cache = fed(policy, layer, (np.repeat(q, 5, axis=1), k[:, :5], k[:, :5]), [5], capacity=8)
    _, cache = attend(cache, entries(q, k[:, 5:], k[:, 5:], 5))
    assert np.flatnonzero(cache.state.reads.chosen[0, 0]).tolist() == [0, 3]


@pytest.mark.parametrize("size", [1, 3])
def test_output_is_attention_on_a_sequence_of_the_selected_tokens(size):
    _, cache = fed(POLICY, LAYER, ARRAYS, [40], capacity=48)
    q, k, v = ARRAYS
    out, after = attend(cache, entries(*(x[:, 40 : 40 + size] for x in ARRAYS), 40))
    n, groups = 40 + size, LAYER.num_heads // LAYER.num_kv_heads
    for row in range(2):
        at = jnp.asarray(6 + np.arange(size))[None]
        turned = LAYER.rotate(jnp.asarray(q[row : row + 1, 40:n], jnp.float32), positions=at)
        probe = np.asarray(turned)[0].mean(axis=0)
        votes = sum(
            softmax(k[row, 2 : n - 6, h // groups] @ probe[h]) for h in range(LAYER.num_heads)
        )
        chosen = np.sort(np.argsort(-votes)[:6]) + 2
        read = np.asarray([0, 1, *chosen, *range(n - 6, n)])
        assert np.flatnonzero(after.state.reads.chosen[row, 0]).tolist() == chosen.tolist()
        shown = read[None, :] <= np.arange(40, n)[:, None]
        expected = plain_attention(
            q[row, 40:n], k[row, read], v[row, read], LAYER, shown,
            q_positions=np.arange(14 - size, 14),
        )  # fmt: skip
        np.testing.assert_allclose(out[row], expected, atol=2e-5)


def decoded(reuse, queries):
    """Counters after a prompt of 30 tokens and one token for each query."""
    q, k, v = (x[:1, :30] for x in ARRAYS)
    policy = TokenSelect(budget=14, sinks=2, window=6, reuse=reuse)
    _, cache = fed(policy, LAYER, (q, k, v), [30], capacity=48)
    for step, query in enumerate(queries):
        _, cache = attend(cache, entries(query[None, None], k[:, :1], v[:, :1], 30 + step))
    return {name: float(x[0]) for name, x in policy.counters(cache.state).items()}


def test_how_often_a_selection_is_taken_again():
    queries = ARRAYS[0][0, 30:36]
    assert decoded(-1.0, queries)["cache_selections"] == 1
    assert decoded(1.1, queries)["cache_selections"] == 6
    twice = np.repeat(queries[:2], 2, axis=0)
    found = decoded(0.9, twice)
    assert found["cache_passes"] == 4
    cosine = (
        np.sum(queries[0] * queries[1]) / np.linalg.norm(queries[0]) / np.linalg.norm(queries[1])
    )
    assert found["cache_selections"] == (2 if cosine < 0.9 else 1)
    assert decoded(-1.0, queries)["cache_tokens_moved"] == 6
    size = 2 * LAYER.num_kv_heads * LAYER.width * 4
    assert decoded(-1.0, queries)["cache_bytes_moved"] == 6 * size


def test_a_selection_taken_again_still_has_the_newest_tokens():
    q, k, v = (x[:1] for x in ARRAYS)
    policy = TokenSelect(budget=14, sinks=2, window=6, reuse=-1.0)
    outs = []
    for change in (0.0, 5.0):
        _, cache = fed(policy, LAYER, [x[:, :30] for x in (q, k, v)], [30], capacity=48)
        for step in range(3):
            at = 30 + step
            value = v[:, at : at + 1] + change * (step == 1)
            out, cache = attend(cache, entries(q[:, at : at + 1], k[:, at : at + 1], value, at))
        outs.append(np.asarray(out))
    assert np.abs(outs[0] - outs[1]).max() > 0.01


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_votes_are_those_of_repeated_key_heads(groups):
    layer = heads(num_heads=4, num_kv_heads=4 // groups)
    q, k, _ = (jnp.asarray(x, jnp.float32) for x in drawn((2, 33), layer))
    every = jnp.repeat(k, groups, axis=2)
    scores = jnp.einsum("bhe,bshe->bhs", q[:, -1], every)
    expected = jnp.sum(jax.nn.softmax(scores, axis=-1), axis=1)
    table = jnp.asarray([[1, 0, 2], [4, 3, 5]])  # pages of 11, in this order
    pool = jnp.zeros((6, layer.num_kv_heads, 11, layer.width))
    pool = pool.at[table].set(k.reshape(2, 3, 11, -1, layer.width).swapaxes(2, 3))
    at = {"q_positions": jnp.full((2, 1), 40), "scale": 1.0}
    for impl in ("ref", "xla"):
        whole = token_scores(q=q[:, -1:], k=k.swapaxes(1, 2), impl=impl, **at)
        paged = token_scores(q=q[:, -1:], k=pool, pages=table, impl=impl, **at)
        np.testing.assert_allclose(whole, expected, atol=1e-5)
        np.testing.assert_allclose(paged, expected, atol=1e-5)


def test_neighbours_of_a_vote_come_with_it():
    layer = heads(num_heads=1, num_kv_heads=1, width=4, rotate=still)
    q, k, v = np.ones((1, 21, 1, 4)), np.zeros((1, 21, 1, 4)), np.zeros((1, 21, 1, 4))
    k[0, 9] = 3
    policy = TokenSelect(budget=6, sinks=1, window=2, smooth=3)
    _, cache = fed(policy, layer, (q, k, v), [20, 1])
    assert np.flatnonzero(cache.state.reads.chosen[0, 0]).tolist() == [8, 9, 10]


def test_impossible_requests_are_one_line():
    with pytest.raises(UserError, match="budget of 8 tokens for 2 sinks and a window of 6"):
        TokenSelect(budget=8, sinks=2, window=6)
    with pytest.raises(UserError, match="smooth is 4; a width is odd"):
        TokenSelect(smooth=4)
    with pytest.raises(UserError, match="reads 7 tokens at once and its window is 6"):
        fed(POLICY, LAYER, ARRAYS, [20, 7], capacity=48)

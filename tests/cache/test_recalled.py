"""The share of full attention that falls on what a policy reads."""

import jax.numpy as jnp
import numpy as np
import pytest
from cached import drawn, heads, still

from tokenlab.cache import ActQKV, FullCache, PageTopK, RingCache, SinkCache
from tokenlab.cache.recalled import recalled_in_decoding
from tokenlab.core.errors import UserError

LAYER = heads(rotate=still)
PROMPT, TOKENS = 12, 20
Q, K, _ = (jnp.asarray(x, jnp.float32) for x in drawn((3, TOKENS), LAYER, seed=3))


def share(seen):
    """Row by row, token by token, head by head: ``seen(at)`` are the places that are read."""
    groups = LAYER.num_heads // LAYER.num_kv_heads
    found = np.zeros((3, TOKENS - PROMPT, LAYER.num_heads))
    for row, token, head in np.ndindex(found.shape):
        at = PROMPT + token
        scores = LAYER.scale * (K[row, :at, head // groups] @ Q[row, at, head])
        weights = np.exp(np.asarray(scores, np.float64))
        found[row, token, head] = weights[list(seen(at))].sum() / weights.sum()
    return found


@pytest.mark.parametrize(
    "policy, seen",
    [
        (FullCache(), range),
        (RingCache(budget=5), lambda at: range(at - 5, at)),
        (SinkCache(budget=7, sinks=2), lambda at: [0, 1, *range(at - 5, at)]),
    ],
    ids=["full", "ring", "sinks"],
)
def test_it_is_the_mass_of_what_is_kept(policy, seen):
    found = recalled_in_decoding(policy, Q, K, prompt=PROMPT, heads=LAYER)
    np.testing.assert_allclose(found, share(seen), atol=1e-5)


def test_rows_are_apart_and_a_choice_recalls_a_part():
    policy = PageTopK(budget=8, page=2, window=2)
    found = np.asarray(recalled_in_decoding(policy, Q, K, prompt=PROMPT, heads=LAYER))
    assert (found > 0).all() and (found <= 1 + 1e-5).all() and found.max() < 0.999
    alone = recalled_in_decoding(policy, Q[1:2], K[1:2], prompt=PROMPT, heads=LAYER)
    np.testing.assert_allclose(alone[0], found[1], atol=1e-5)


def test_what_has_no_share_is_refused():
    policy = ActQKV(budget=8 + 4, sinks=2, window=4, block=2)
    with pytest.raises(UserError, match="ActQKV gives keys other positions"):
        recalled_in_decoding(policy, Q, K, prompt=PROMPT, heads=LAYER)
    for prompt in (0, TOKENS):
        with pytest.raises(UserError, match="leaves nothing to decode"):
            recalled_in_decoding(FullCache(), Q, K, prompt=prompt, heads=LAYER)

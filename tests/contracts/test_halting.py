"""Every public halting rule against a slow oracle, and what all of them promise."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tokenlab.depth
from tokenlab import config
from tokenlab.depth import EarlyHalting, FixedHalting, Halting, OnlineHalting, TokenChoice

B, T, D, M = 2, 5, 4, 3


def normed(h):
    return h / np.sqrt((h**2).sum() + 1e-5)


def early(states, params):
    scores = normed(states[0]) @ params["kernel"]
    chances = np.exp(scores - scores.max())
    return chances / chances.sum(), lambda q: int(np.argmax(q)) + 1


def online(states, params):
    left, chances = 1.0, []
    for h in states[1:M]:
        stop = 1 / (1 + np.exp(-(normed(h) @ params["kernel"] + params["bias"])))
        chances.append(left * stop)
        left *= 1 - stop
    return np.asarray([*chances, left]), lambda q: int(np.argmax(np.cumsum(q) >= 0.5)) + 1


def choice(states, params):
    scores = states[0] @ params["scores"]["kernel"]
    chances = np.exp(scores - scores.max())
    chances /= chances.sum()
    return chances, lambda q: int(np.argmax(q + params["bias"])) + 1


def fixed(states, params):
    return np.asarray([0.0, 1.0, 0.0]), lambda q: 2


MEMBERS = {
    EarlyHalting: (EarlyHalting(), early),
    OnlineHalting: (OnlineHalting(bias=-0.5), online),
    FixedHalting: (FixedHalting(depth=2), fixed),
    TokenChoice: (TokenChoice(biased=True), choice),
}
every = pytest.mark.parametrize("member", MEMBERS)


def test_the_table_holds_every_public_member():
    public = {
        member
        for member in vars(tokenlab.depth).values()
        if inspect.isclass(member)
        and issubclass(member, Halting)
        and not inspect.isabstract(member)
    }
    assert public == set(MEMBERS)


def case(member, seed=0, dtype=jnp.float32):
    part, oracle = MEMBERS[member]
    rng = np.random.default_rng(seed)
    states = [jnp.asarray(rng.normal(size=(B, T, D)), dtype) for _ in range(M + 1)]
    shapes = nn.meta.unbox(part.init(jax.random.key(0), states, depths=M)).get("params", {})
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    return part, oracle, states, params


@every
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_oracle_and_stops_where_it_says(member, seed):
    part, oracle, states, params = case(member, seed)
    chances = part.apply({"params": params}, states, depths=M)
    assert chances.dtype == jnp.float32 and chances.shape == (B, T, M)
    np.testing.assert_allclose(chances.sum(axis=-1), 1, rtol=1e-6)
    rule = part.bind({"params": params})
    found = 1 + sum(~rule.stopped(chances, depth=d) for d in range(1, M))
    for b in range(B):
        for t in range(T):
            own = [np.asarray(h[b, t], np.float64) for h in states]
            expected, stops = oracle(own, jax.tree.map(np.asarray, params))
            np.testing.assert_allclose(chances[b, t], expected, rtol=1e-5, atol=1e-7)
            assert found[b, t] == stops(expected)


@every
def test_what_is_known_so_far_decides_so_far(member):
    """With the states up to a depth, the rule says of it what it says with all of them."""
    part, _, states, params = case(member)
    whole = part.apply({"params": params}, states, depths=M)
    level = jax.random.uniform(jax.random.key(1), (B, T))
    for depth in range(1, M):
        known = part.apply({"params": params}, states[: depth + 1], depths=M)
        np.testing.assert_allclose(known.sum(axis=-1), 1, rtol=1e-6)
        hard = part.bind({"params": params}).stopped
        for rule in (hard, lambda q, depth: part.drawn(q, depth=depth, level=level)):
            np.testing.assert_array_equal(rule(known, depth=depth), rule(whole, depth=depth))


@every
def test_depths_are_drawn_as_often_as_their_chances_say(member):
    part, _, states, params = case(member)
    chances = part.apply({"params": params}, states, depths=M)[:1, :1]
    level = jax.random.uniform(jax.random.key(2), (20_000, 1))
    many = jnp.broadcast_to(chances, (20_000, 1, M))
    depth = 1 + sum(~part.drawn(many, depth=d, level=level) for d in range(1, M))
    shares = np.bincount(np.asarray(depth)[:, 0], minlength=M + 1)[1:] / 20_000
    np.testing.assert_allclose(shares, chances[0, 0], atol=0.02)


@every
def test_reads_bfloat16_in_float32_and_keeps_its_gradient_finite(member):
    part, _, states, params = case(member, dtype=jnp.bfloat16)
    zeros = [jnp.zeros_like(h) for h in states]
    assert part.apply({"params": params}, states, depths=M).dtype == jnp.float32
    slope = jax.grad(
        lambda s: part.apply({"params": params}, s, depths=M).astype(jnp.float32)[..., 0].sum()
    )(zeros)
    assert all(np.isfinite(leaf.astype("float32")).all() for leaf in slope)


@every
def test_the_second_call_compiles_nothing(member):
    part, _, _, params = case(member)
    run = jax.jit(lambda p, s: part.apply({"params": p}, s, depths=M))
    for seed in (0, 1):
        run(params, case(member, seed)[2])
    assert run._cache_size() == 1


@every
def test_the_object_is_its_own_config_and_names_its_paper(member):
    part = MEMBERS[member][0]
    loaded = config.load(config.dump(part))
    assert loaded == part and hash(loaded) == hash(part)
    assert "Reference: " in inspect.getdoc(member) and "arXiv:" in inspect.getdoc(member)


def test_a_depth_that_is_not_there_is_refused():
    states = [jnp.ones((1, 1, D))]
    with pytest.raises(ValueError, match="depth 4 is not one of 1 to 3"):
        FixedHalting(depth=4).apply({}, states, depths=M)

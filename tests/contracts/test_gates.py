"""Every public expert gate against a slow oracle, and what all of them promise."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tokenlab.routing
from tokenlab import config
from tokenlab.routing import (
    BiasedTopKGate,
    ExpertGate,
    FixedThresholdGate,
    PooledThresholdGate,
    TokenThresholdGate,
    TopKGate,
)

B, T, D, E = 3, 8, 5, 6


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def top(scores, k):
    chosen = np.zeros(scores.shape, bool)
    for at in np.ndindex(scores.shape[:-1]):
        chosen[at][sorted(range(E), key=lambda e: -scores[at][e])[:k]] = True
    return chosen


def above(threshold):
    def choose(logits, params, valid, train):
        p = softmax(logits)
        return p, (p >= threshold(p, params, valid, train)) | top(p, 1)

    return choose


def pooled(p, params, valid, train):
    return np.percentile(p[valid], 75) if train else params["threshold"][0]


def by_token(p, params, valid, train):
    return np.percentile(p, 75, axis=-1, keepdims=True)


class Row(NamedTuple):
    """A member; its probabilities and choice in NumPy; whether other tokens matter in training."""

    part: ExpertGate
    choose: Callable
    looks_around: bool = False


TABLE = {
    TopKGate: Row(TopKGate(k=2), lambda g, *_: (softmax(g), top(g, 2))),
    BiasedTopKGate: Row(
        BiasedTopKGate(k=3),
        lambda g, params, *_: (sigmoid(g), top(sigmoid(g) + np.asarray(params["bias"]), 3)),
    ),
    PooledThresholdGate: Row(PooledThresholdGate(percentile=75.0), above(pooled), True),
    TokenThresholdGate: Row(TokenThresholdGate(percentile=75.0), above(by_token)),
    FixedThresholdGate: Row(FixedThresholdGate(threshold=0.25), above(lambda *_: 0.25)),
}
every = pytest.mark.parametrize("member", TABLE)
both = pytest.mark.parametrize("train", [True, False])


def test_the_table_holds_every_public_member():
    public = {
        member
        for member in vars(tokenlab.routing).values()
        if inspect.isclass(member)
        and issubclass(member, ExpertGate)
        and not inspect.isabstract(member)
    }
    assert public == set(TABLE)


def inputs(seed=0, rows=B, width=T):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, width, D)), jnp.float32)
    valid = np.arange(width) < np.linspace(width, 3, rows).astype(int)[:, None]
    return x, jnp.asarray(valid)


@functools.cache
def parameters(part):
    x, valid = inputs()
    shapes = jax.eval_shape(
        lambda: part.init(jax.random.key(0), x, num_experts=E, valid=valid, train=False)
    )["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(rng.uniform(0.1, 0.4, size=leaf.shape), jnp.float32)
            if leaf.ndim == 1
            else jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        ),
        nn.meta.unbox(shapes),
    )


@functools.partial(jax.jit, static_argnames=("part", "train"))
def run(part, params, x, valid, *, train):
    """The choice, and the gradient of a sum of sines of the weights."""

    def total(params):
        choice = part.apply({"params": params}, x, num_experts=E, valid=valid, train=train)
        return jnp.sum(jnp.sin(3 * choice.weights)), choice

    gradient, choice = jax.grad(total, has_aux=True)(params)
    return choice, gradient


def close(left, right, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), left, right)


@every
@both
def test_equals_the_oracle(member, train):
    part, choose, _ = TABLE[member]
    params, (x, valid) = parameters(part), inputs()
    choice, gradient = run(part, params, x, valid, train=train)
    logits = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64)
    scores, chosen = choose(logits, params, np.asarray(valid), train)
    chosen = chosen & np.asarray(valid)[..., None]
    np.testing.assert_array_equal(choice.chosen, chosen)
    weights = np.where(chosen, scores, 0)
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(choice.weights, weights, atol=1e-5)
    p = scores / scores.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(choice.probabilities, p, atol=1e-5)
    assert choice.weights.dtype == choice.probabilities.dtype == jnp.float32
    counts = np.asarray(choice.chosen).sum(axis=-1)[np.asarray(valid)]
    assert counts.min() >= 1 and counts.max() <= part.most_active(E)
    for name, leaf in gradient.items():  # weights move the scores, and nothing else
        assert np.any(leaf) == (name == "kernel")


@every
def test_gradients_are_slopes(member):
    part = TABLE[member].part
    params, (x, valid) = parameters(part), inputs()
    _, gradient = run(part, params, x, valid, train=False)

    def total(kernel):
        choice, _ = run(part, params | {"kernel": kernel}, x, valid, train=False)
        return np.sin(3 * np.asarray(choice.weights, np.float64)).sum(), choice.chosen

    for at in ((0, 0), (2, 3), (4, 5)):
        ends = [total(params["kernel"].at[at].add(step)) for step in (1e-3, -1e-3)]
        assert np.array_equal(ends[0][1], ends[1][1]), "a choice changed; take another kernel"
        slope = (ends[0][0] - ends[1][0]) / 2e-3
        np.testing.assert_allclose(gradient["kernel"][at], slope, rtol=2e-2, atol=5e-3)


@every
@both
def test_padding_changes_nothing(member, train):
    part = TABLE[member].part
    params, (x, valid) = parameters(part), inputs()
    wider, _ = inputs(seed=5, rows=B + 1, width=T + 3)
    wider = wider.at[:B, :T].set(x)
    more = jnp.zeros(wider.shape[:2], bool).at[:B, :T].set(valid)
    choice, gradient = run(part, params, x, valid, train=train)
    padded, same = run(part, params, wider, more, train=train)
    close(gradient, same, atol=1e-5)
    close(choice.aux, padded.aux, atol=1e-5)
    for name in ("chosen", "weights"):
        found = np.asarray(getattr(padded, name))
        np.testing.assert_allclose(found[:B, :T], getattr(choice, name), atol=1e-6)
        assert not np.any(found[~np.asarray(more)])


@every
@both
def test_nothing_valid_is_zero_and_finite(member, train):
    part = TABLE[member].part
    x, valid = inputs()
    choice, gradient = run(part, parameters(part), x, valid & False, train=train)
    assert not np.any(choice.chosen) and not np.any(choice.weights)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert all(float(one.mean()) == 0 for one in choice.aux.values())


@every
def test_outside_training_tokens_do_not_see_each_other(member):
    """And in training only the members that say so do."""
    part, _, looks_around = TABLE[member]
    params, (x, valid) = parameters(part), inputs()
    changed = x.at[:, 4:].multiply(40.0).at[1:].multiply(40.0)

    def early(x, train):
        return np.asarray(run(part, params, x, valid, train=train)[0].weights[0, :4])

    np.testing.assert_array_equal(early(x, False), early(changed, False))
    assert np.array_equal(early(x, True), early(changed, True)) != looks_around


@every
@both
def test_rows_may_come_in_any_order(member, train):
    part, order = TABLE[member].part, jnp.asarray([2, 0, 1])
    params, (x, valid) = parameters(part), inputs()
    straight, gradient = run(part, params, x, valid, train=train)
    turned, same = run(part, params, x[order], valid[order], train=train)
    np.testing.assert_allclose(straight.weights[order], turned.weights, atol=1e-6)
    close(gradient, same, atol=1e-5)


@every
def test_bfloat16_streams_are_scored_in_float32(member):
    part = TABLE[member].part
    params, (x, valid) = parameters(part), inputs()
    low = x.astype(jnp.bfloat16)
    ours, _ = run(part, params, low, valid, train=True)
    exact, _ = run(part, params, low.astype(jnp.float32), valid, train=True)
    assert ours.weights.dtype == jnp.float32
    np.testing.assert_array_equal(ours.weights, exact.weights)


@every
def test_the_second_call_compiles_nothing_and_the_object_is_its_own_config(member):
    part = TABLE[member].part
    loaded = config.load(config.dump(part))
    assert loaded == part and hash(loaded) == hash(part)
    run(part, parameters(part), *inputs(), train=True)
    compiled = run._cache_size()
    run(loaded, parameters(part), *inputs(seed=1), train=True)
    assert run._cache_size() == compiled


@every
def test_the_paper_is_named(member):
    assert "Reference: " in inspect.getdoc(member) and "arXiv:" in inspect.getdoc(member)

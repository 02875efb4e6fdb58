"""Every public option router against NumPy, and what all of them promise."""

import functools
import inspect
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tokenlab.routing
from tokenlab import config
from tokenlab.routing import FixedOption, LearnedOption, NarrowScores, OptionRouter, RandomOption
from tokenlab.routing.chance import draws

B, T, D, C = 3, 8, 6, 3
KEY = jax.random.key(7)


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def fixed(params, x, forecast):
    option = np.ones(x.shape[:2], int)
    return option, np.eye(C)[option]


def by_chance(params, x, forecast):
    drawn = np.asarray(draws(jnp.asarray(x, jnp.float32), salt=zlib.crc32(b"")))
    option = np.select([drawn < 0.2, drawn < 0.7], [0, 1], 2)
    return option, np.broadcast_to([0.2, 0.5, 0.3], (*x.shape[:2], C))


def learned(params, x, forecast):
    p = params["scores"]
    seen = np.concatenate([x, forecast], axis=-1)
    scores = np.maximum(seen @ p["hidden"] + p["hidden_bias"], 0) @ p["kernel"] + p["bias"]
    return scores.argmax(axis=-1), softmax(scores / params["temperature"][0])


class Row(NamedTuple):
    """A member, its choice and chances in NumPy, and operations of a token."""

    part: OptionRouter
    oracle: Callable
    flops: int


TABLE = {
    FixedOption: Row(FixedOption(option=1), fixed, 0),
    RandomOption: Row(RandomOption(chances=(0.2, 0.5, 0.3)), by_chance, 0),
    LearnedOption: Row(
        LearnedOption(
            head=NarrowScores(divisor=3), mixing="drawn", temperature=2.0, coolest=0.5,
            with_forecast=True,
        ),
        learned,
        2 * 4 * (2 * D + C),
    ),
}  # fmt: skip
every = pytest.mark.parametrize("member", TABLE)


def test_the_table_holds_every_public_member():
    assert {
        member
        for member in vars(tokenlab.routing).values()
        if inspect.isclass(member)
        and issubclass(member, OptionRouter)
        and not inspect.isabstract(member)
    } == set(TABLE)


def inputs(seed=0, rows=B, width=T, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    valid = np.arange(width) < np.linspace(width, 3, rows).astype(int)[:, None]
    x, forecast = (rng.normal(size=(rows, width, D)) * valid[..., None] for _ in range(2))
    return jnp.asarray(x, dtype), jnp.asarray(forecast, dtype), jnp.asarray(valid)


@functools.cache
def parameters(part):
    x, forecast, valid = inputs()
    shapes = jax.eval_shape(
        lambda: part.init(KEY, x, forecast=forecast, options=C, valid=valid, train=False)
    )
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.abs(rng.normal(size=leaf.shape)), jnp.float32),
        nn.meta.unbox(shapes.get("params", {})),
    )


@functools.partial(jax.jit, static_argnames=("part", "train"))
def run(part, params, x, forecast, valid, *, train=False):
    """The choice, and the gradient of a sum of the weights of option 0."""

    def total(params, x):
        choice = part.apply(
            {"params": params}, x, forecast=forecast, options=C, valid=valid, train=train,
            rngs={"routes": KEY} if train else {},
        )  # fmt: skip
        return jnp.sum(choice.weights[..., 0] * jnp.cos(x[..., 0])), choice

    gradients, choice = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
    return choice, gradients


@every
def test_equals_numpy_and_is_one_option(member):
    part, oracle, flops = TABLE[member]
    x, forecast, valid = inputs()
    choice, _ = run(part, parameters(part), x, forecast, valid)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters(part))
    option, chances = oracle(params, np.asarray(x), np.asarray(forecast))
    np.testing.assert_array_equal(choice.weights, np.eye(C)[option] * np.asarray(valid)[..., None])
    np.testing.assert_allclose(choice.probabilities, chances, atol=1e-5)
    assert choice.weights.dtype == choice.probabilities.dtype == jnp.float32
    assert part.flops(D, C) == flops


@every
def test_weights_of_training_have_sum_one_and_padding_has_none(member):
    part = TABLE[member].part
    x, forecast, valid = inputs()
    choice, (gradient, _) = run(part, parameters(part), x, forecast, valid, train=True)
    np.testing.assert_allclose(np.sum(choice.weights, axis=-1), valid, atol=1e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    nothing, (gradient, stream) = run(
        part, parameters(part), 0 * x, 0 * forecast, valid & False, train=True
    )
    assert not np.any(nothing.weights) and not np.any(stream)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@every
def test_other_tokens_padding_and_the_order_of_rows_do_not_matter(member):
    part = TABLE[member].part
    x, forecast, valid = inputs()
    params = parameters(part)
    choice, _ = run(part, params, x, forecast, valid)
    pad = ((0, 1), (0, 3))
    wider = (jnp.pad(each, (*pad, (0, 0))) for each in (x, forecast))
    padded, _ = run(part, params, *wider, jnp.pad(valid, pad))
    np.testing.assert_array_equal(padded.weights[:B, :T], choice.weights)
    changed = x.at[:, 4:].multiply(-30.0)
    later, _ = run(part, params, changed, forecast, valid)
    np.testing.assert_array_equal(later.weights[:, :4], choice.weights[:, :4])
    order = jnp.asarray([2, 0, 1])
    turned, _ = run(part, params, x[order], forecast[order], valid[order])
    np.testing.assert_array_equal(turned.weights, choice.weights[order])


@every
def test_bfloat16_streams_are_scored_in_float32(member):
    part = TABLE[member].part
    x, forecast, valid = inputs(dtype=jnp.bfloat16)
    ours, _ = run(part, parameters(part), x, forecast, valid)
    exact, _ = run(
        part, parameters(part), x.astype(jnp.float32), forecast.astype(jnp.float32), valid
    )
    np.testing.assert_array_equal(ours.weights, exact.weights)
    assert ours.weights.dtype == jnp.float32


@every
def test_the_second_call_compiles_nothing_and_the_object_is_its_own_config(member):
    part = TABLE[member].part
    run(part, parameters(part), *inputs())
    compiled = run._cache_size()
    loaded = config.load(config.dump(part))
    assert loaded == part and hash(loaded) == hash(part)
    run(loaded, parameters(part), *inputs(seed=1))
    assert run._cache_size() == compiled


@every
def test_the_paper_is_named(member):
    assert "Reference: " in inspect.getdoc(member) and "arXiv:" in inspect.getdoc(member)

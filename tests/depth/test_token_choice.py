"""Mixture-of-Recursions by token choice: the output by hand, its losses, balance without a loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.depth.looped import ragged, run
from tokenlab.cache import FullCache
from tokenlab.core.context import Context, View
from tokenlab.core.duration import Clock
from tokenlab.depth import HaltingLoop, TokenChoice
from tokenlab.models import LinearHead, llama
from tokenlab.objectives import AuxiliaryTerm, Objective
from tokenlab.train.optimizer import SGD, AdamW, Constant, Group

RECURSIONS = 3


def model_of(*, biased=False, keys="recursion_wise"):
    depth = HaltingLoop(
        halting=TokenChoice(biased=biased), recursions=RECURSIONS, readout="gated", inject="none",
        keys=keys,
    )  # fmt: skip
    return llama(
        vocab_size=23, dim=16, num_layers=5, num_heads=4, num_kv_heads=2, hidden_dim=16,
        depth=depth, head=LinearHead(), max_length=64,
    )  # fmt: skip


@functools.cache
def params_of(model, seed=0):
    tokens = jnp.zeros((1, 4), int)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes["params"]),
    )


def by_hand(model, params, tokens, positions, segments):
    """All rows through the block, with keys of those that are still in the loop."""

    def layer(name, x, kept):
        segment = jnp.where(kept, segments, 0)
        where = {"positions": positions, "segments": segment}
        return model.block.apply({"params": params[name]}, x, **where)[0]

    valid = segments > 0
    start = layer("block_first", params["embedding"][tokens], valid)
    decision = params["depth"]["decision"]
    chances = jax.nn.softmax(start @ decision["scores"]["kernel"], axis=-1)
    bias = jnp.broadcast_to(decision.get("bias", jnp.zeros(RECURSIONS)), chances.shape)
    depth = 1 + jnp.argmax(chances + bias, axis=-1)
    x = start
    for r in range(1, RECURSIONS + 1):
        kept = valid & (depth >= r)
        x = jnp.where(kept[..., None], layer("block_0", x, kept), x)
    gate = jnp.take_along_axis(chances, depth[..., None] - 1, axis=-1)
    x = layer("block_last", start + gate * x, valid)
    return model.norm.apply({"params": params["norm"]}, x), depth


@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_formula_in_value_and_gradient(biased):
    model = model_of(biased=biased)
    params = params_of(model)
    tokens, positions, segments = (jnp.asarray(x) for x in ragged([9, 6], 9))
    valid = (segments > 0)[..., None]
    weights = jax.random.normal(jax.random.key(1), (*tokens.shape, 16))

    def ours(params):
        out = run(model, params, tokens, positions, segments)[1]
        return jnp.sum(jnp.where(valid, out.hidden * weights, 0)), out.trace.figures["recursions"]

    def theirs(params):
        hidden, depth = by_hand(model, params, tokens, positions, segments)
        return jnp.sum(jnp.where(valid, hidden * weights, 0)), depth

    (value, entered), slope = jax.value_and_grad(ours, has_aux=True)(params)
    (expected, depth), wanted = jax.value_and_grad(theirs, has_aux=True)(params)
    np.testing.assert_array_equal(entered[0], np.where(segments > 0, depth, 0))
    assert len(np.unique(depth)) == RECURSIONS
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), slope, wanted)
    assert np.any(slope["depth"]["decision"]["scores"]["kernel"])


@pytest.mark.parametrize("keys", ["recursion_wise", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_steps_over_a_cache_equal_one_pass(keys):
    model = model_of(keys=keys)
    assert model.causal_twin() == model
    params = params_of(model)
    tokens, positions, segments = (jnp.asarray(x) for x in ragged([8, 8], 8))
    whole, _ = run(model, params, tokens, positions, segments)
    cache = model.empty_cache(FullCache(), batch=2, capacity=8)
    parts, start = [], 0
    for width in (5, 1, 1, 1):
        part = slice(start, start + width)
        here, out = run(
            model, params, tokens[:, part], positions[:, part], segments[:, part], cache
        )
        parts.append(here)
        cache, start = out.cache, start + width
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-4)


def losses(model, params, batch):
    """The reported losses of a batch, each by its mean."""
    terms = {name: AuxiliaryTerm(name=name) for name in ("balance", "z", "dual")}
    context = Context(batch=batch, views={"policy": View(model=model, params=params)})
    return {name: value.mean() for name, value in Objective(terms=terms)(context).items()}


def test_losses_are_the_formulas_and_the_bias_balances_by_sign():
    model = model_of(biased=True)
    params = params_of(model)
    tokens, positions, segments = (jnp.asarray(x) for x in ragged([9, 6], 9))
    batch = {"tokens": tokens, "positions": positions, "segments": segments}
    valid = np.asarray(segments) > 0
    _, depth = by_hand(model, params, tokens, positions, segments)
    where = {"positions": positions, "segments": segments}
    start = model.block.apply(
        {"params": params["block_first"]}, params["embedding"][tokens], **where
    )[0]
    scores = np.asarray(start @ params["depth"]["decision"]["scores"]["kernel"])[valid]
    shares = np.bincount(np.asarray(depth)[valid], minlength=4)[1:] / valid.sum()
    chances = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    bias = np.asarray(params["depth"]["decision"]["bias"])
    found, slope = jax.value_and_grad(lambda p: losses(model, p, batch)["dual"], has_aux=False)(
        params
    )
    np.testing.assert_allclose(found, bias @ (shares - 1 / 3), rtol=1e-4)
    np.testing.assert_allclose(slope["depth"]["decision"].pop("bias"), shares - 1 / 3, rtol=1e-4)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))
    others = jax.jit(lambda p: losses(model, p, batch))(params)
    np.testing.assert_allclose(others["balance"], 3 * shares @ chances.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(
        others["z"], (np.log(np.exp(scores).sum(axis=1)) ** 2).mean(), rtol=1e-4
    )
    rule = SGD(learning_rate=Constant(peak=1e-3), sign=True)
    optimizer = AdamW(
        learning_rate=Constant(peak=0.0),
        groups=(Group(parameters=("*/decision/bias",), optimizer=rule),),
    ).build(Clock(tokens_per_step=1, tokens_per_epoch=lambda: 1))
    gradient = jax.grad(lambda p: losses(model, p, batch)["dual"])(params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    moved = updates["depth"]["decision"]["bias"]
    np.testing.assert_allclose(moved, 1e-3 * np.sign(1 / 3 - shares), rtol=1e-6)


def test_even_depths_make_the_balance_loss_one():
    part = TokenChoice()
    states = [jnp.zeros((1, 6, 3))] * (RECURSIONS + 1)
    eye = jnp.tile(jnp.eye(3) * 1e-6, (2, 1))[None]  # each depth is the best of two tokens
    states = [eye, *states[1:]]
    params = {"scores": {"kernel": jnp.eye(3)}}
    _, kept = part.apply({"params": params}, states, depths=3, mutable=["reports"])
    balance = kept["reports"]["balance"][0]
    assert float(balance.mean()) == pytest.approx(1.0, rel=1e-5)

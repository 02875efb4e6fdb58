"""Sums over the vocabulary and top logits, against whole logits in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from kernels_pallas.linear_cross_entropy import (
    LinearCrossEntropyConfig,
    Projection,
    kl_divergence,
    linear_cross_entropy,
    sum_over_vocabulary,
    top_logits,
)

B, T, V = 2, 5, 37


def _arrays(widths=(8, 6), dtype=jnp.float32, vocabulary=V, length=T):
    """(hidden, weight, bias) of one model per width."""
    keys = iter(jax.random.split(jax.random.key(0), 3 * len(widths)))
    return tuple(
        (
            jax.random.normal(next(keys), (B, length, width)).astype(dtype),
            jax.random.normal(next(keys), (vocabulary, width)).astype(dtype),
            jax.random.normal(next(keys), (vocabulary,)).astype(dtype),
        )
        for width in widths
    )


def _projected(model, softcap=None, axes=()):
    hidden, weight, bias = model
    targets = jnp.zeros(hidden.shape[:2], jnp.int32)
    logits = linear_cross_entropy(
        hidden=hidden, weight=weight, bias=bias, targets=targets, softcap=softcap, impl="xla",
        vocabulary_axes=axes,
    )  # fmt: skip
    return Projection(hidden, weight, logits.log_sum_exp, bias, softcap)


def _logp(model, softcap=None):
    """The specification: whole logits, in the widest precision there is here."""
    hidden, weight, bias = (x.astype(jnp.float32) for x in model)
    logits = jnp.einsum("btd,vd->btv", hidden, weight) + bias[None, None]
    return jax.nn.log_softmax(logits if softcap is None else softcap * jnp.tanh(logits / softcap))


def _jensen_shannon(log_p, log_q):
    middle = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return 0.5 * (jnp.exp(log_p) * (log_p - middle) + jnp.exp(log_q) * (log_q - middle))


def _total_variation(log_p, log_q):
    return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))


def _renyi(log_p):
    return jnp.exp(0.5 * log_p)


FUNCTIONS = {"jensen-shannon": _jensen_shannon, "total variation": _total_variation}


@pytest.mark.parametrize("block", [1, 10, 36, None])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradient_equal_whole_logits(name, block):
    models, function = _arrays(), FUNCTIONS[name]
    cotangent = jax.random.normal(jax.random.key(9), (B, T))
    config = LinearCrossEntropyConfig(block_vocabulary=block)

    def ours(models):
        pair = _projected(models[0], 3.0), _projected(models[1])
        return jnp.sum(cotangent * sum_over_vocabulary(function, *pair, config=config))

    def whole(models):
        values = function(_logp(models[0], 3.0), _logp(models[1]))
        return jnp.sum(cotangent * jnp.sum(values, axis=-1))

    for a, b in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(ours))(models)),
        jax.tree.leaves(jax.value_and_grad(whole)(models)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_kl_divergence_is_a_float64_loop_zero_of_itself_and_positive():
    p, q = _arrays()
    ours = kl_divergence(_projected(p), _projected(q))
    logps = []
    for hidden, weight, bias in (p, q):
        logits = np.einsum("btd,vd->btv", *(np.asarray(x, np.float64) for x in (hidden, weight)))
        logits += np.asarray(bias, np.float64)
        logps.append(logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True)))
    expected = np.sum(np.exp(logps[0]) * (logps[0] - logps[1]), axis=-1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert np.all(expected > 0.1)
    np.testing.assert_allclose(kl_divergence(_projected(p), _projected(p)), 0.0, atol=1e-6)


def test_one_distribution_alone_and_bfloat16():
    (model,) = _arrays(widths=(8,), dtype=jnp.bfloat16)
    ours = sum_over_vocabulary(
        _renyi, _projected(model), config=LinearCrossEntropyConfig(block_vocabulary=10)
    )
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, jnp.sum(_renyi(_logp(model)), -1), rtol=1e-5)

    def total(model):
        return jnp.sum(sum_over_vocabulary(_renyi, _projected(model)))

    exact = jax.grad(lambda model: jnp.sum(_renyi(_logp(model))))(
        jax.tree.map(lambda x: x.astype(jnp.float32), model)
    )
    for a, b in zip(jax.grad(total)(model), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2**-6 * float(jnp.max(abs(b))))


def test_what_does_not_go_together_is_refused():
    p, q = _arrays()
    other = (q[0], q[1][:-1], q[2][:-1])
    with pytest.raises(ValueError, match="compare the same tokens and vocabulary"):
        kl_divergence(_projected(p), _projected(other))
    hidden, weight, _ = p
    for k in (0, V + 1):
        with pytest.raises(ValueError, match="a vocabulary of 37 has 1 to as many"):
            top_logits(hidden=hidden, weight=weight, k=k)


@settings(deadline=None, max_examples=25)
@given(
    k=st.integers(1, V),
    block=st.integers(1, V),
    softcap=st.sampled_from([None, 2.0]),
    levels=st.sampled_from([3, None]),
)
def test_top_logits_are_those_of_a_stable_sort(k, block, softcap, levels):
    """``levels`` rounds the logits, so that many are equal."""
    hidden, weight, bias = _arrays(widths=(8,))[0]
    if levels is not None:
        hidden, bias = jnp.ones_like(hidden) / 8, jnp.round(bias)
        weight = jnp.broadcast_to(jnp.round(weight[:, :1]), weight.shape)
    config = LinearCrossEntropyConfig(block_vocabulary=block)
    top = top_logits(hidden=hidden, weight=weight, bias=bias, k=k, softcap=softcap, config=config)
    logits = jnp.einsum("btd,vd->btv", hidden, weight) + bias[None, None]
    logits = np.asarray(logits if softcap is None else softcap * jnp.tanh(logits / softcap))
    expected = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(top.ids, expected)
    np.testing.assert_allclose(
        top.logits, np.take_along_axis(logits, expected, -1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("gathered", [2**22, 100])
def test_top_logits_differentiate_as_chosen_logits(gathered, monkeypatch):
    """In one piece, and a few tokens at a time with the last chunk ragged."""
    monkeypatch.setattr("kernels_pallas.linear_cross_entropy.top._GATHERED", gathered)
    model = _arrays(widths=(8,))[0]
    cotangent = jax.random.normal(jax.random.key(9), (B, T, 4))

    def ours(model):
        hidden, weight, bias = model
        top = top_logits(hidden=hidden, weight=weight, bias=bias, k=4, softcap=3.0)
        return jnp.sum(cotangent * top.logits)

    def whole(model):
        hidden, weight, bias = model
        logits = 3.0 * jnp.tanh((jnp.einsum("btd,vd->btv", hidden, weight) + bias[None, None]) / 3)
        return jnp.sum(cotangent * jax.lax.top_k(logits, 4)[0])

    for a, b in zip(jax.grad(ours)(model), jax.grad(whole)(model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_whole_logits_are_never_alive():
    vocabulary, length = 32_768, 256
    models = _arrays(vocabulary=vocabulary, length=length)
    whole = B * length * vocabulary * 4
    config = LinearCrossEntropyConfig(block_vocabulary=256)

    def divergence(models):
        p, q = map(_projected, models)
        return jnp.sum(kl_divergence(p, q, config=config))

    def top(models):
        hidden, weight, bias = models[0]
        return jnp.sum(top_logits(hidden=hidden, weight=weight, bias=bias, k=8, config=config)[0])

    for function in (divergence, top):
        compiled = jax.jit(jax.grad(function)).lower(models).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 0.25 * whole


def compare_on_eight_devices():
    """Run in a process that has them."""
    models = _arrays(vocabulary=48)

    def both(models, axes=()):
        p, q = (_projected(model, 3.0, axes) for model in models)
        hidden, weight, bias = models[0]
        top = top_logits(hidden=hidden, weight=weight, bias=bias, k=9, vocabulary_axes=axes)
        divergence = kl_divergence(p, q, vocabulary_axes=axes)
        return jnp.concatenate([divergence[..., None], top.logits], -1), top.ids

    def value_and_gradient(function):
        values, pull_back, ids = jax.vjp(function, models, has_aux=True)
        return values, ids, pull_back(jnp.cos(jnp.arange(values.size)).reshape(values.shape))

    mesh = jax.make_mesh((8,), ("vocabulary",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        split = P("vocabulary")
        mapped = jax.shard_map(
            functools.partial(both, axes=("vocabulary",)),
            in_specs=(((P(), split, split),) * 2,),
            out_specs=P(),
            check_vma=False,
        )
        ours = jax.jit(lambda: value_and_gradient(mapped))()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(value_and_gradient(both)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    print("EQUAL", jax.device_count())


def test_parts_of_the_vocabulary_give_what_the_whole_gives():
    """With parts of 6 entries, fewer than the 9 that are asked for."""
    module = "kernels_pallas.test_linear_cross_entropy_distribution"
    script = f"import tests.{module} as test; test.compare_on_eight_devices()"
    assert "EQUAL 8" in run_on_devices(8, script)

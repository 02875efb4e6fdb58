"""Every public feed-forward layer against NumPy, and what all of them promise."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

import tokenlab.models
from tokenlab import config
from tokenlab.core.reports import REPORTS
from tokenlab.models import (
    FeedForward,
    Forecaster,
    GeGLU,
    MixtureOfExperts,
    Pattention,
    PattentionFeedForward,
    PrunedSwiGLU,
    RoutedFeedForward,
    SwiGLU,
)
from tokenlab.routing import (
    FixedThresholdGate,
    LearnedOption,
    PooledThresholdGate,
    TopKGate,
)

DIM, HIDDEN = 8, 12


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gated(activation):
    def layer(params, x, valid):
        gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
        return (activation(x @ gate) * (x @ up)) @ down

    return layer


def experts(params, x, valid):
    """One token at a time: the two likeliest experts, by their probabilities."""
    out = np.zeros(x.shape)
    for at in zip(*np.nonzero(valid), strict=True):
        scores = np.exp(x[at] @ params["gate"]["kernel"])
        best = np.argsort(-scores)[:2]
        for e in best:
            hidden = silu(x[at] @ params["up_gate"][e]) * (x[at] @ params["up"][e])
            out[at] += scores[e] / scores[best].sum() * (hidden @ params["down"][e])
    return out


def learned_tokens(params, x, valid):
    scores = x @ params["pattention"]["keys"].T
    scores *= math.sqrt(6) / np.linalg.norm(scores, axis=-1, keepdims=True)
    return scores * scipy.stats.norm.cdf(scores) @ params["pattention"]["values"]


def forecast(params, x, valid):
    return x @ params["narrow"]["kernel"] @ params["wide"]["kernel"]


def big_or_small(params, x, valid):
    """One token at a time: the layer of the higher score."""
    big, small = (gated(silu)(params[name], x, valid) for name in ("unit", "stand_in_0"))
    scores = x @ params["routing"]["scores"]["kernel"]
    out = np.zeros(x.shape)
    for at in zip(*np.nonzero(valid), strict=True):
        out[at] = (big if scores[at][0] >= scores[at][1] else small)[at]
    return out


class Row(NamedTuple):
    """A member, its output in NumPy, and operations of a token beside those it reports."""

    part: FeedForward
    oracle: Callable
    flops: int


TABLE = {
    SwiGLU: Row(SwiGLU(hidden_dim=HIDDEN), gated(silu), 6 * DIM * HIDDEN),
    PrunedSwiGLU: Row(PrunedSwiGLU(hidden_dim=HIDDEN, pruned=0.5), gated(silu), 6 * DIM * HIDDEN),
    GeGLU: Row(GeGLU(hidden_dim=HIDDEN), gated(gelu), 6 * DIM * HIDDEN),
    MixtureOfExperts: Row(
        MixtureOfExperts(num_experts=5, hidden_dim=HIDDEN, gate=TopKGate(k=2)), experts, 10 * DIM
    ),
    PattentionFeedForward: Row(
        PattentionFeedForward(pattention=Pattention(tokens=6)), learned_tokens, 4 * 6 * DIM
    ),
    Forecaster: Row(Forecaster(rank=3), forecast, 4 * 3 * DIM),
    RoutedFeedForward: Row(
        RoutedFeedForward(
            unit=SwiGLU(hidden_dim=HIDDEN),
            stand_ins=(SwiGLU(hidden_dim=2),),
            router=LearnedOption(),
        ),
        big_or_small,
        4 * DIM,
    ),
}
every = pytest.mark.parametrize("member", TABLE)
OF_TOKENS = (
    "active_experts",
    "gate_entropy",
    "option",
    "option_entropy",
)  # the reports that have a figure per token


def test_the_table_holds_every_public_member():
    assert {
        member
        for member in vars(tokenlab.models).values()
        if inspect.isclass(member)
        and issubclass(member, FeedForward)
        and not inspect.isabstract(member)
    } == set(TABLE)


def inputs(lengths=(9, 5, 2), width=9, seed=0, dtype=jnp.float32):
    x = np.random.default_rng(seed).normal(size=(len(lengths), width, DIM))
    valid = np.arange(width) < np.asarray(lengths)[:, None]
    return jnp.asarray(x, dtype), jnp.asarray(valid)


@functools.cache
def parameters(part):
    shapes = jax.eval_shape(lambda: part.init(jax.random.key(0), inputs()[0]))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes),
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def differentiated(part, params, x, valid, train=False):
    """Output and reports, and gradients of a sum over the tokens that are not padding."""

    def total(params, x):
        out, kept = part.apply({"params": params}, x, valid=valid, train=train, mutable=[REPORTS])
        real = jnp.where(valid[..., None], jnp.sin(out.astype(jnp.float32)), 0)
        return jnp.sum(real), (out, kept.get(REPORTS, {}))

    gradients, (out, reports) = jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)
    return out, reports, gradients


def run(part, *arrays, train=False):
    return differentiated(part, parameters(part), *arrays, train)


def close(left, right, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), left, right)


@every
def test_equals_numpy_and_costs_what_it_says(member):
    part, oracle, flops = TABLE[member]
    x, valid = inputs()
    out, _, _ = run(part, x, valid)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters(part))
    expected = oracle(params, np.asarray(x, np.float64), np.asarray(valid))
    real = np.asarray(valid)
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=1e-5)
    assert part.flops(DIM) == flops


@every
def test_padding_changes_nothing_whatever_it_holds(member):
    part = TABLE[member].part
    x, valid = inputs()
    out, reports, (gradient, _) = run(part, x, valid)
    wider, more = inputs(lengths=(9, 5, 2, 0), width=13, seed=4)
    wider = jnp.where(more[..., None], wider.at[:3, :9].set(x), 1e3)
    padded, same_reports, (same, stream) = run(part, wider, more)
    real = np.asarray(valid)
    np.testing.assert_allclose(np.asarray(padded)[:3, :9][real], np.asarray(out)[real], atol=1e-5)
    close(same, gradient, atol=1e-4)
    assert not np.any(np.asarray(stream)[~np.asarray(more)])
    for name, (one,) in reports.items():
        other = same_reports[name][0]
        close(one, other[:3, :9] if name in OF_TOKENS else other)


@every
def test_fully_masked_is_finite_and_has_no_gradient(member):
    x, valid = inputs()
    for train in (False, True):
        out, _, gradients = run(TABLE[member].part, x, valid & False, train=train)
        assert np.all(np.isfinite(out))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@every
def test_every_token_by_itself(member):
    """Outside training the output of a token depends on it alone: by its Jacobian, and by batch."""
    part, (x, valid) = TABLE[member].part, inputs()
    params = parameters(part)

    @jax.jit
    def pulled(x, at):
        out, back = jax.vjp(lambda x: part.apply({"params": params}, x, valid=valid), x)
        chosen = jnp.arange(out.shape[1]) == at
        return back(jnp.where(chosen[None, :, None], out, 0))[0]

    gradient = np.asarray(pulled(x, 4))
    assert np.any(gradient[0, 4]) and not np.any(np.delete(gradient, 4, axis=1))
    out, _, _ = run(part, x, valid)
    alone, _, _ = run(part, x[1:2], valid[1:2])
    np.testing.assert_allclose(alone[0, :5], out[1, :5], atol=1e-5)


@every
def test_rows_may_come_in_any_order(member):
    part, order = TABLE[member].part, jnp.asarray([2, 0, 1])
    x, valid = inputs()
    out, _, (gradient, _) = run(part, x, valid, train=True)
    moved, _, (same, _) = run(part, x[order], valid[order], train=True)
    close(moved, out[order])
    close(same, gradient, atol=1e-4)


@every
def test_bfloat16_stays_bfloat16_near_float32(member):
    part = TABLE[member].part
    x, valid = inputs(dtype=jnp.bfloat16)
    exact, _, _ = run(part, x.astype(jnp.float32), valid)
    out, _, (gradient, _) = run(part, x, valid)
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    real = np.asarray(valid)
    scale = float(jnp.abs(exact).max())
    close(np.asarray(out, np.float32)[real], np.asarray(exact)[real], atol=0.03 * scale)


@every
def test_the_second_call_compiles_nothing_and_the_object_is_its_own_config(member):
    part = TABLE[member].part
    run(part, *inputs())
    compiled = differentiated._cache_size()
    loaded = config.load(config.dump(part))
    assert loaded == part and hash(loaded) == hash(part)
    run(loaded, *inputs(seed=1))
    assert differentiated._cache_size() == compiled


@every
def test_the_paper_is_named(member):
    assert "Reference: " in inspect.getdoc(member) and "arXiv:" in inspect.getdoc(member)


# ---------------------------------------------------------------- the two forms of experts

GATES = {
    "top": TopKGate(k=2),
    "pooled": PooledThresholdGate(percentile=70.0),
    "capped": FixedThresholdGate(threshold=0.1, most=3),
}


@pytest.mark.parametrize(
    ("gate", "dtype"),
    [*((gate, jnp.float32) for gate in GATES), ("pooled", jnp.bfloat16)],
)
def test_sorted_tokens_give_what_masked_experts_give(gate, dtype):
    x, valid = inputs(dtype=dtype)
    gated = dtype == jnp.float32
    dense, ordered = (
        run(
            MixtureOfExperts(
                num_experts=5, hidden_dim=HIDDEN, gate=GATES[gate], gated=gated, form=form
            ),
            x,
            valid,
            train=True,
        )
        for form in ("dense", "sorted")
    )
    assert ordered[0].dtype == dtype
    exact = dtype == jnp.float32
    for ours, expected in zip(
        jax.tree.leaves(ordered[::2]), jax.tree.leaves(dense[::2]), strict=True
    ):
        expected = np.asarray(expected, np.float32)
        atol = 2e-5 if exact else 0.05 * np.abs(expected).max() + 1e-3
        np.testing.assert_allclose(np.asarray(ours, np.float32), expected, atol=atol)
    close(ordered[1], dense[1])
    counts = np.asarray(dense[1]["active_experts"][0])
    assert np.array_equal(counts > 0, valid) and len(np.unique(counts)) > 1
    assert float(dense[1]["flops"][0]) == counts.sum() * 2 * (3 if gated else 2) * DIM * HIDDEN

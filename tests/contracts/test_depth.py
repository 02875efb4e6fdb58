"""What every depth program promises, in a small model; members have oracles of their own."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tokenlab.depth
from tokenlab import config
from tokenlab.depth import (
    DepthProgram,
    EarlyHalting,
    HaltingLoop,
    MixtureOfRecursions,
    Recursive,
    Sequential,
    SkipDecode,
    TokenChoice,
)
from tokenlab.models import llama

MEMBERS = {
    "sequential": Sequential(),
    "recursive": Recursive(recursions=3),
    "recursive shared": Recursive(recursions=3, keys="shared"),
    "mixture": MixtureOfRecursions(recursions=3),
    "mixture shared": MixtureOfRecursions(recursions=3, keys="shared"),
    "mixture hybrid": MixtureOfRecursions(recursions=3, keys="hybrid"),
    "halting": HaltingLoop(recursions=3),
    "skip": SkipDecode(counts=(5, 4, 4, 3, 2), prompt_length=2),
    "skip, shared bottom": SkipDecode(counts=(5, 4, 2), keep="bottom"),
    "halting early shared": HaltingLoop(
        recursions=3, halting=EarlyHalting(), keys="shared", inject="concat"
    ),
    "choice": HaltingLoop(
        recursions=3, halting=TokenChoice(biased=True), readout="gated", inject="none"
    ),
    "halting hard": HaltingLoop(recursions=3, readout="hard", inject="none"),
    "halting of shared streams": HaltingLoop(recursions=3, readout="expected_loss"),
    "halting drawn, shared": HaltingLoop(recursions=3, readout="straight_through"),
}
SECOND = ("shared", "hybrid", "hard")  # ways of a member that is there in another
every = pytest.mark.parametrize(
    "member",
    [
        pytest.param(m, marks=pytest.mark.slow if any(way in m for way in SECOND) else ())
        for m in MEMBERS
    ],
)


def model_of(member, **rest):
    return llama(
        vocab_size=29, dim=16, num_layers=5, num_heads=2, num_kv_heads=1, hidden_dim=24,
        depth=MEMBERS[member], **rest,
    )  # fmt: skip


def rows(lengths, width, seed=0):
    """One document per row, the same one for the same place in ``lengths``."""
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.integers(0, 29, 64)[:width] for _ in lengths])
    positions = np.tile(np.arange(width), (len(lengths), 1))
    segments = (positions < np.asarray(lengths)[:, None]).astype(int)
    return {"tokens": tokens, "positions": positions, "segments": segments}


def run(model, params, batch):
    return _run(model, params, {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()})


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, arrays):
    arrays = dict(arrays)
    return model.apply({"params": params}, arrays.pop("tokens"), **arrays)


def initialised(model):
    tokens = jnp.zeros((1, 8), int)
    variables = jax.jit(model.init)(
        jax.random.key(0), tokens, positions=tokens, segments=tokens + 1
    )
    params = nn.meta.unbox(variables["params"])
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), params)


def test_the_table_holds_every_public_member():
    public = {
        member
        for member in vars(tokenlab.depth).values()
        if inspect.isclass(member)
        and issubclass(member, DepthProgram)
        and not inspect.isabstract(member)
    }
    assert public == {type(member) for member in MEMBERS.values()}


@every
def test_padding_changes_nothing_and_is_traced_as_nothing(member):
    model = model_of(member)
    params = initialised(model)
    padded, plain = run(model, params, rows([7, 12], 12)), run(model, params, rows([7], 7))
    np.testing.assert_allclose(padded.hidden[:1, :7], plain.hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(padded.trace.depth[:1, :7], plain.trace.depth)
    assert not np.any(padded.trace.depth[0, 7:]) and not np.any(padded.trace.active[:, 0, 7:])
    np.testing.assert_array_equal(padded.trace.active.sum(axis=0), padded.trace.depth)


@every
def test_fully_masked_rows_are_finite_in_value_and_gradient(member):
    model = model_of(member)
    params = initialised(model)
    batch = rows([0, 5], 8)

    def total(params):
        out = run(model, params, batch)
        aux = sum(part.mean() for part in out.trace.aux.values())
        return jnp.where(jnp.asarray(batch["segments"])[:, :, None] > 0, out.hidden, 0).sum() + aux

    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@every
def test_rows_may_come_in_any_order(member):
    model = model_of(member)
    params = initialised(model)
    batch, order = rows([9, 4, 12], 12), [2, 0, 1]
    straight = run(model, params, batch)
    turned = run(model, params, {name: value[order] for name, value in batch.items()})
    valid = batch["segments"][order] > 0
    np.testing.assert_allclose(
        straight.hidden[np.asarray(order)][valid], turned.hidden[valid], rtol=1e-4, atol=1e-5
    )


@every
def test_the_stream_keeps_its_dtype(member):
    model = model_of(member, dtype="bfloat16")
    out = run(model, initialised(model), rows([8], 8))
    assert out.hidden.dtype == jnp.bfloat16 and np.isfinite(out.hidden.astype("float32")).all()


@every
def test_the_second_call_compiles_nothing(member):
    model = model_of(member)
    params, jitted = initialised(model), jax.jit(lambda p, b: run(model, p, b))
    for seed in (0, 1):
        jitted(params, {k: jnp.asarray(v) for k, v in rows([8, 3], 8, seed).items()})
    assert jitted._cache_size() == 1


@every
def test_the_causal_twin_has_no_gradient_from_the_future(member):
    model = model_of(member).causal_twin()
    params = initialised(model)
    batch = rows([10], 10) | {"tokens": np.arange(10)[None]}

    @jax.jit
    def of_token_four(embedding):
        return run(model, params | {"embedding": embedding}, batch).hidden[0, 4].sum()

    gradient = jax.grad(of_token_four)(params["embedding"])
    assert not np.any(gradient[5:10]) and np.all(np.abs(gradient[:5]).max(axis=1) > 0)


RECOMPUTED = [("dots", member) for member in ("sequential", "mixture")]  # the quick ones


@pytest.mark.parametrize(
    ("member", "remat"),
    [
        pytest.param(
            member,
            remat,
            marks=() if (remat, member) in RECOMPUTED else pytest.mark.slow,
        )
        for member in MEMBERS
        for remat in ("dots", "full")
    ],
)
def test_remat_changes_no_gradient(member, remat):
    model = model_of(member)
    saved = config.replace(model, {"depth.remat": remat})
    params, batch = initialised(model), rows([8, 5], 8)
    one, two = (
        jax.jit(jax.grad(lambda p, m=m: (run(m, p, batch).hidden ** 2).mean()))(params)
        for m in (model, saved)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)


@every
def test_the_object_is_its_own_config(member):
    loaded = config.load(config.dump(MEMBERS[member]))
    assert loaded == MEMBERS[member] and hash(loaded) == hash(MEMBERS[member])


def test_methods_from_papers_name_them():
    for member in (Recursive, MixtureOfRecursions, HaltingLoop, SkipDecode):
        assert "Reference: " in inspect.getdoc(member) and "arXiv:" in inspect.getdoc(member)

"""Every public mixer: what all of them promise; their oracles are under tests/models."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import tokenlab.models
from tokenlab import config
from tokenlab.models import (
    MMATE,
    Attention,
    Forecaster,
    Grid,
    KeptShare,
    Mixer,
    Pattention,
    PattentionAttention,
    PooledScores,
    RoutedMixer,
    TokenDroppingAttention,
    Window,
)
from tokenlab.routing import LearnedOption

DIM = 16
ATTENTION = Attention(num_heads=4, num_kv_heads=2)
TABLE = {
    Attention: ATTENTION,
    PattentionAttention: PattentionAttention(
        num_heads=4, num_kv_heads=2, pattention=Pattention(tokens=8)
    ),
    RoutedMixer: RoutedMixer(
        unit=ATTENTION, stand_ins=(Forecaster(rank=3),), router=LearnedOption()
    ),
    TokenDroppingAttention: TokenDroppingAttention(
        num_heads=4, num_kv_heads=2, informativeness=PooledScores(), block=3,
        kept=KeptShare(share=0.6),
    ),
    MMATE: MMATE(
        attention=ATTENTION, grid=Grid(height=3, width=4, start=1), shifted=True, chunk=8,
        window=Window(frames=1, height=2, width=2),
    ),
}  # fmt: skip
every = pytest.mark.parametrize("member", TABLE)


def test_the_table_holds_every_public_member():
    assert {
        member
        for member in vars(tokenlab.models).values()
        if inspect.isclass(member) and issubclass(member, Mixer)
    } - {Mixer} == set(TABLE)


def batch(lengths=(20, 17, 6), width=20, seed=0, dtype=jnp.float32):
    """Rows of one document each, of which all but the last two tokens are given."""
    place = np.broadcast_to(np.arange(width), (len(lengths), width))
    segments = (place < np.asarray(lengths)[:, None]).astype(np.int32)
    x = np.random.default_rng(seed).normal(size=(*place.shape, DIM))
    return {
        "x": jnp.asarray(x, dtype),
        "positions": jnp.asarray(place * segments, jnp.int32),
        "segments": jnp.asarray(segments),
        "prompt": jnp.asarray(place < np.asarray(lengths)[:, None] - 2),
    }


@functools.cache
def parameters(part):
    """Larger than at the start of training, so that no term hides behind another."""
    shapes = jax.eval_shape(lambda: part.init(jax.random.key(0), **batch()))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.4, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes),
    )


def run(part, arrays):
    return differentiated(part, parameters(part), arrays)


@functools.partial(jax.jit, static_argnums=0)
def differentiated(part, params, arrays):
    """The output, and the gradient of a sum over the tokens that are not padding."""

    def total(params):
        out, cache = part.apply({"params": params}, **arrays)
        assert cache is None
        valid = (arrays["segments"] > 0)[..., None]
        return jnp.sum(jnp.where(valid, jnp.sin(out.astype(jnp.float32)), 0)), out

    gradient, out = jax.grad(total, has_aux=True)(params)
    return out, gradient


def close(left, right, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), left, right)


@every
def test_padding_changes_nothing(member):
    part, real = TABLE[member], np.asarray(batch()["segments"] > 0)
    wider = batch(lengths=(20, 17, 6, 0), width=27, seed=5)
    wider["x"] = wider["x"].at[:3, :20].set(batch()["x"])
    out, gradient = run(part, batch())
    padded, same = run(part, wider)
    close(np.asarray(padded)[:3, :20][real], np.asarray(out)[real])
    close(same, gradient, atol=5e-4)


@every
def test_fully_masked_is_zero_and_finite(member):
    nothing = batch() | {"segments": jnp.zeros((3, 20), jnp.int32)}
    out, gradient = run(TABLE[member], nothing)
    assert not np.any(out) and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@every
def test_rows_may_come_in_any_order(member):
    part, order = TABLE[member], jnp.asarray([2, 0, 1])
    out, gradient = run(part, batch())
    moved, same = run(part, {name: rows[order] for name, rows in batch().items()})
    close(moved, out[order])
    close(same, gradient, atol=5e-4)


@every
def test_bfloat16_stays_bfloat16_near_float32(member):
    part = TABLE[member]
    exact, _ = run(part, batch())
    out, gradient = run(part, batch(dtype=jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    real = np.asarray(batch()["segments"] > 0)
    scale = float(jnp.abs(exact).max())
    close(np.asarray(out, np.float32)[real], np.asarray(exact)[real], atol=0.05 * scale)


@every
def test_the_second_call_compiles_nothing_and_the_object_is_its_own_config(member):
    part = TABLE[member]
    run(part, batch())
    compiled = differentiated._cache_size()
    loaded = config.load(config.dump(part))
    assert loaded == part and hash(loaded) == hash(part)
    run(loaded, batch(seed=1))
    assert differentiated._cache_size() == compiled


@every
def test_the_paper_is_named(member):
    assert "Reference: " in inspect.getdoc(member) and "arXiv:" in inspect.getdoc(member)

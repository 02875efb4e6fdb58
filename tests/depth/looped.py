"""Looped models small enough to run in every way that there is, and inputs for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab.depth import MixtureOfRecursions, Recursive
from tokenlab.models import LinearHead, llama

VOCABULARY = 23
KEYS = ("recursion_wise", "shared", "hybrid")
each = pytest.mark.parametrize(
    "keys", [key if key == "hybrid" else pytest.param(key, marks=pytest.mark.slow) for key in KEYS]
)
PROGRAMS = {"all": Recursive, "routed": MixtureOfRecursions}


def model_of(program="routed", keys="recursion_wise", *, recursions=3, layers=5, **rest):
    """Grouped queries, and a layer of its own at each end."""
    options = {"max_length": 64, "head": LinearHead()} | rest
    mixer = options.pop("mixer", {})
    network = llama(
        vocab_size=VOCABULARY, dim=16, num_layers=layers, num_heads=4, num_kv_heads=2,
        hidden_dim=16, depth=PROGRAMS[program](recursions=recursions, keys=keys), **options,
    )  # fmt: skip
    block = network.block.clone(mixer=network.block.mixer.clone(**mixer))
    return network.clone(block=block)


@functools.cache
def params_of(model, seed=0, scale=0.3):
    """Random ones, so large that routers differ from each other."""
    tokens = jnp.zeros((1, 4), int)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=scale, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes["params"]),
    )


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens, positions, segments, cache=None):
    """Logits, and what a pass gives."""
    where = {"positions": positions, "segments": segments}
    out = model.apply({"params": params}, tokens, cache=cache, **where)
    return model.apply({"params": params}, out.hidden, method="logits"), out


def ragged(lengths, width, seed=0):
    """Tokens, positions and segments of rows with padding behind them."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (len(lengths), width))
    positions = np.tile(np.arange(width), (len(lengths), 1))
    segments = (positions < np.asarray(lengths)[:, None]).astype(int)
    return tuple(jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments))


def read(model, params, policy, batch, sizes, *, capacity=None):
    """Logits of all tokens, read in passes of ``sizes`` over a cache, and the last pass."""
    tokens, positions, segments = batch
    capacity = capacity or tokens.shape[1]
    cache, start, found = model.empty_cache(policy, batch=len(tokens), capacity=capacity), 0, []
    for size in sizes:
        part = slice(start, start + size)
        logits, out = run(
            model, params, tokens[:, part], positions[:, part], segments[:, part], cache
        )
        found.append(np.asarray(logits))
        cache, start = out.cache, start + size
    return np.concatenate(found, axis=1), out


def attention(params, heads, q_input, keys, positions, shown):
    """Of queries from normalised ``q_input`` over ``keys``, all rows dense; the output projection
    behind it."""
    batch, length, _ = q_input.shape
    q = (q_input @ params["q"]["kernel"]).reshape(batch, length, heads.num_heads, -1)
    q, k = (heads.rotate(x, positions=positions) for x in (q, keys[0]))
    groups = heads.num_heads // heads.num_kv_heads
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, keys[1]))
    scores = heads.scale * jnp.einsum("bthe,bshe->bhts", q, k)
    scores = jnp.where(shown[:, None], scores, -1e30)
    weights = jnp.where(shown[:, None], jax.nn.softmax(scores), 0)
    out = jnp.einsum("bhts,bshe->bthe", weights, v).reshape(batch, length, -1)
    return out @ params["out"]["kernel"]

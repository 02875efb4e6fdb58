"""One layer of a cache, fed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_sparse_attention import Causal
from tokenlab.cache import Entries, Heads, Room
from tokenlab.cache.layers import LayerCache
from tokenlab.models import Rotary


def still(x, *, positions):
    """No rotation: scores depend on contents alone."""
    return x


def heads(num_heads=4, num_kv_heads=2, width=8, rotate=None, softcap=None):
    return Heads(
        num_heads=num_heads, num_kv_heads=num_kv_heads, width=width, scale=width**-0.5,
        softcap=softcap, rotate=Rotary(base=100.0) if rotate is None else rotate,
    )  # fmt: skip


def entries(q, k, v, start=0, dtype="float32", lengths=None):
    """Arrays ``[B, T, ., E]`` as tokens from position ``start`` on, ``lengths`` of them real."""
    rows, length = np.shape(k)[:2]
    positions = np.broadcast_to(np.reshape(start, (-1, 1)) + np.arange(length), (rows, length))
    lengths = np.full(rows, length) if lengths is None else np.asarray(lengths)
    segments = np.arange(length)[None] < lengths[:, None]
    return Entries(
        *(jnp.asarray(x, dtype) for x in (q, k, v)),
        jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32),
    )  # fmt: skip


def drawn(shape, layer, seed=0):
    """Random queries, keys and values of ``shape = (rows, tokens)``."""
    rng = np.random.default_rng(seed)
    counts = layer.num_heads, layer.num_kv_heads, layer.num_kv_heads
    return [rng.normal(size=(*shape, count, layer.width)) for count in counts]


def empty(policy, layer, rows, capacity, dtype="float32"):
    state = policy.init(Room(rows, capacity, dtype), layer)
    pairs = jnp.zeros(rows)
    return LayerCache(policy=policy, heads=layer, stage="first", state=state, pairs=pairs)


@functools.partial(jax.jit, static_argnames=("stage", "rule"))
def attend(cache, new, stage="next", rule=None):
    """What the tokens read, and the cache with them; ``pairs`` are those of this pass."""
    cache = cache.replace(stage=stage, pairs=jnp.zeros_like(cache.pairs))
    out, after = cache.attend(new, rule=rule or Causal(), impl=None)
    return out, after.replace(stage="next")


def fed(policy, layer, arrays, sizes, *, capacity=None, dtype="float32", rule=None, first=True):
    """Outputs of all tokens, read in passes of ``sizes``, and the cache."""
    rows, total = arrays[1].shape[:2]
    cache, start, outs = empty(policy, layer, rows, capacity or total, dtype), 0, []
    for size in sizes:
        new = entries(*(x[:, start : start + size] for x in arrays), start, dtype)
        stage = "first" if first and start == 0 else "next"
        out, cache = attend(cache, new, stage=stage, rule=rule)
        outs.append(np.asarray(out, np.float32))
        start += size
    return np.concatenate(outs, axis=1), cache


def plain_attention(q, k, v, layer, shown, *, q_positions=None, k_positions=None):
    """NumPy attention of ``q [T, H, E]`` over ``k, v [S, K, E]``, where ``shown [T, S]``."""

    def turned(x, positions):
        positions = np.arange(len(x)) if positions is None else positions
        new = jnp.asarray(x, jnp.float32)[None]
        return np.asarray(layer.rotate(new, positions=jnp.asarray(positions)[None]))[0]

    q, k = turned(q, q_positions), turned(k, k_positions)
    groups = layer.num_heads // layer.num_kv_heads
    k, v = np.repeat(k, groups, axis=1), np.repeat(np.asarray(v), groups, axis=1)
    scores = np.where(shown[None], layer.scale * np.einsum("the,she->hts", q, k), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hts,she->the", weights, v)

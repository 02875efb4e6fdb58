"""How much attention keys get, without the matrix of all pairs in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenlab.cache.base import Heads
from tokenlab.core.arrays import Array, Bool, Float, Int

_BLOCK = 128


def attention_rows(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B K S E"],
    *,
    q_positions: Int[Array, "B T"],
    q_valid: Bool[Array, "B T"],
    k_positions: Int[Array, "B L S"],
    heads: Heads,
    bias: Float[Array, "B K S"] | None = None,
    window: int | None = None,
) -> Float[Array, "B K G T S"]:
    """Softmax weights of each query, float32; 0 for what it does not see.

    Args:
        q: queries.
        k: keys of each head.
        q_positions: of the queries.
        q_valid: which queries are none of padding; the others have weights of 0.
        k_positions: of the keys, of each head or of all alike; -1 for no key.
        heads: how they score.
        bias: added to scores.
        window: positions that a query sees, itself among them; None is all before it.
    """
    batch, length, _, width = q.shape
    grouped = q.reshape(batch, length, heads.num_kv_heads, -1, width)
    scores = heads.scale * jnp.einsum(
        "btkge,bkse->bkgts", grouped, k, preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )  # fmt: skip
    if heads.softcap is not None:
        scores = heads.softcap * jnp.tanh(scores / heads.softcap)
    if bias is not None:
        scores += bias[:, :, None, None]
    ahead = q_positions[:, None, :, None] - k_positions[:, :, None]
    shown = (k_positions >= 0)[:, :, None] & (ahead >= 0) & q_valid[:, None, :, None]
    if window is not None:
        shown &= ahead < window
    shown = shown[:, :, None]
    return jnp.where(shown, jax.nn.softmax(jnp.where(shown, scores, -1e30), axis=-1), 0.0)


def attention_mass(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B K S E"],
    *,
    q_positions: Int[Array, "B T"],
    q_valid: Bool[Array, "B T"],
    k_positions: Int[Array, "B L S"],
    heads: Heads,
    bias: Float[Array, "B K S"] | None = None,
    window: int | None = None,
) -> Float[Array, "B K G S"]:
    """Sum over the queries of :func:`attention_rows`, in blocks of queries."""
    length = q.shape[1]
    size = min(length, _BLOCK)
    missing = -length % size

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1)

    def step(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        rows = attention_rows(
            block[0], k, q_positions=block[1], q_valid=block[2], k_positions=k_positions,
            heads=heads, bias=bias, window=window,
        )  # fmt: skip
        return total + jnp.sum(rows, axis=3), None

    groups = heads.num_heads // heads.num_kv_heads
    none = jnp.zeros((len(q), heads.num_kv_heads, groups, k.shape[2]), jnp.float32)
    return jax.lax.scan(step, none, (blocks(q), blocks(q_positions), blocks(q_valid)))[0]

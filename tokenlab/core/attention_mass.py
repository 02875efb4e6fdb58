"""How much attention keys get, without the matrix of all pairs in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_attention import MaskRule
from tokenlab.core.arrays import Array, Float, Int


def attention_rows(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B K S E"],
    q_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B T"],
    kv_positions: Int[Array, "B L S"],
    kv_segments: Int[Array, "B L S"],
    rule: MaskRule,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "B K S"] | None = None,
) -> Float[Array, "B K G T S"]:
    """Softmax weights of each query, float32; 0 for what it does not see.

    Args:
        q: queries.
        k: keys of each head.
        q_positions: of the queries.
        q_segments: of the queries; those of segment 0 have weights of 0.
        kv_positions: of the keys, of each head or of all alike.
        kv_segments: of the keys, likewise; 0 is no key.
        rule: which keys a query sees.
        scale: factor of the scores.
        softcap: bound of the absolute scores.
        bias: added to scores.
    """
    batch, length, _, width = q.shape
    grouped = q.reshape(batch, length, k.shape[1], -1, width)
    scores = scale * jnp.einsum(
        "btkge,bkse->bkgts", grouped, k, preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )  # fmt: skip
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias[:, :, None, None]
    shown = rule(
        q_positions[:, None, :, None],
        kv_positions[:, :, None],
        q_segments[:, None, :, None],
        kv_segments[:, :, None],
    )[:, :, None]
    # A finite value, so that a query that sees nothing has no NaN.
    return jnp.where(shown, jax.nn.softmax(jnp.where(shown, scores, -1e30), axis=-1), 0.0)


def attention_mass(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B K S E"],
    q_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B T"],
    kv_positions: Int[Array, "B L S"],
    kv_segments: Int[Array, "B L S"],
    rule: MaskRule,
    scale: float,
    softcap: float | None = None,
    bias: Float[Array, "B K S"] | None = None,
    block: int = 128,
) -> Float[Array, "B K G S"]:
    """Sum over the queries of :func:`attention_rows`, ``block`` queries at a time."""
    batch, length, heads, _ = q.shape
    block = min(length, block)

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -length % block), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(batch, -1, block, *x.shape[2:]).swapaxes(0, 1)

    def step(total: Array, some: tuple[Array, Array, Array]) -> tuple[Array, None]:
        rows = attention_rows(
            q=some[0], k=k, q_positions=some[1], q_segments=some[2], kv_positions=kv_positions,
            kv_segments=kv_segments, rule=rule, scale=scale, softcap=softcap, bias=bias,
        )  # fmt: skip
        return total + jnp.sum(rows, axis=3), None

    none = jnp.zeros((batch, k.shape[1], heads // k.shape[1], k.shape[2]), jnp.float32)
    return jax.lax.scan(step, none, (blocks(q), blocks(q_positions), blocks(q_segments)))[0]

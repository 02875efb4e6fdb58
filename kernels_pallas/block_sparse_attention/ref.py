"""The specification: all scores, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention.masks import MaskRule
from kernels_pallas.block_sparse_attention.specs import BlockSparseAttentionConfig


def block_sparse_attention(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    rule: MaskRule,
    scale: float,
    softcap: float | None,
    config: BlockSparseAttentionConfig,
) -> Float[Array, "B T H E"]:
    """See :func:`kernels_pallas.block_sparse_attention.block_sparse_attention`."""
    del config
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btkge,bske->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores *= scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible = rule(
        q_positions[:, None, None, :, None],
        kv_positions[:, None, None, None, :],
        q_segments[:, None, None, :, None],
        kv_segments[:, None, None, None, :],
    )
    # A row that sees nothing has equal finite scores here, so its gradient is finite too.
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    weights = jnp.where(visible, weights, 0.0)
    out = jnp.einsum("bkgts,bske->btkge", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)

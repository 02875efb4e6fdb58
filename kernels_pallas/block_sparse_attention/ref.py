"""The specification: all scores, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_sparse_attention import blocks as block_lists
from kernels_pallas.block_sparse_attention.masks import MaskRule
from kernels_pallas.block_sparse_attention.specs import NOTHING, BlockSparseAttentionConfig


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
    blocks: Int[Array, "B Q N"] | None,
    block_shape: tuple[int, int],
    config: BlockSparseAttentionConfig,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """See :func:`kernels_pallas.block_sparse_attention.partial_attention`."""
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
    if blocks is not None:
        visible &= _listed(blocks, block_shape, *scores.shape[3:])[:, None, None]
    # A row that sees nothing has equal finite scores here, so its gradient is finite too.
    scores = jnp.where(visible, scores, NOTHING)
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)
    out = jnp.einsum("bkgts,bske->btkge", weights, v, preferred_element_type=jnp.float32)
    log_sum_exp = jax.nn.logsumexp(scores, axis=-1)
    log_sum_exp = jnp.where(jnp.any(visible, axis=-1), log_sum_exp, NOTHING)
    log_sum_exp = jnp.einsum("bkgt->btkg", log_sum_exp).reshape(q.shape[:3])
    return out.reshape(q.shape).astype(q.dtype), log_sum_exp


def _listed(
    blocks: Int[Array, "B Q N"], block_shape: tuple[int, int], queries: int, keys: int
) -> Bool[Array, "B T S"]:
    """Pairs of tokens in listed pairs of blocks."""
    block_q, block_k = block_shape
    found = block_lists.listed(blocks, block_lists.count(keys, block_k))
    found = jnp.repeat(jnp.repeat(found, block_q, axis=1), block_k, axis=2)
    return found[:, :queries, :keys]

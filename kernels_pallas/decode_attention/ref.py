"""The specification: every row in one piece, all scores, in float32."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_sparse_attention import NOTHING
from kernels_pallas.block_sparse_attention import blocks as block_lists
from kernels_pallas.decode_attention.specs import DecodeAttentionConfig


def decode_attention(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    v: Float[Array, "P K Y E"],
    shown: Bool[Array, "B T S"],
    pages: Int[Array, "B N"] | None,
    selected: Int[Array, "B L M"] | None,
    unit: int,
    scale: float,
    softcap: float | None,
    config: DecodeAttentionConfig,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """See :func:`kernels_pallas.decode_attention.partial_decode_attention`."""
    del config
    seen = shown[:, None]
    if selected is not None:
        slots = shown.shape[2]
        units = block_lists.listed(selected, block_lists.count(slots, unit))
        seen &= jnp.repeat(units, unit, axis=2)[:, :, None, :slots]
    scores = _scores(q, k, seen, pages, scale, softcap)
    seen = seen[:, :, None]
    weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0)
    values = jnp.where(jnp.any(seen, axis=(2, 3))[..., None], _rows(v, pages), 0)
    out = jnp.einsum(
        "bkgts,bkse->btkge",
        weights,
        values,
        preferred_element_type=jnp.float32,
        precision=_precision(q),
    )
    log_sum_exp = jax.nn.logsumexp(scores, axis=-1)
    log_sum_exp = jnp.where(jnp.any(seen, axis=-1), log_sum_exp, NOTHING)
    log_sum_exp = jnp.einsum("bkgt->btkg", log_sum_exp).reshape(q.shape[:3])
    return out.reshape(q.shape).astype(q.dtype), log_sum_exp


def token_scores(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    shown: Bool[Array, "B T S"],
    pages: Int[Array, "B N"] | None,
    scale: float,
    softcap: float | None,
    config: DecodeAttentionConfig,
) -> Float[Array, "B K S"]:
    """See :func:`kernels_pallas.decode_attention.token_scores`; votes by key head."""
    del config
    seen = shown[:, None]
    scores = _scores(q, k, seen, pages, scale, softcap)
    votes = jnp.where(seen[:, :, None], jax.nn.softmax(scores, axis=-1), 0.0)
    return jnp.where(jnp.any(seen, axis=2), jnp.sum(votes, axis=(2, 3)), NOTHING)


def _scores(
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    seen: Bool[Array, "B L T S"],
    pages: Int[Array, "B N"] | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B K G T S"]:
    """Those not seen are finite, so that a query that sees nothing has finite gradients."""
    keys = jnp.where(jnp.any(seen, axis=2)[..., None], _rows(k, pages), 0)
    grouped = q.reshape(*q.shape[:2], k.shape[1], -1, q.shape[3])
    scores = jnp.einsum(
        "btkge,bkse->bkgts",
        grouped,
        keys,
        preferred_element_type=jnp.float32,
        precision=_precision(q),
    )
    scores *= scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(seen[:, :, None], scores, NOTHING)


def _rows(
    pool: Float[Array, "P K Y E"], pages: Int[Array, "B N"] | None
) -> Float[Array, "B K S E"]:
    if pages is None:
        return pool
    rows = jnp.take(pool, jnp.maximum(pages, 0), axis=0, mode="clip")
    batch, count, heads, page, width = rows.shape
    return jnp.swapaxes(rows, 1, 2).reshape(batch, heads, count * page, width)


def _precision(q: Float[Array, "B T H E"]) -> lax.Precision | None:
    return lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

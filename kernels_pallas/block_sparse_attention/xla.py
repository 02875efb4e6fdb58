"""A loop over the pairs of blocks that may see each other; probabilities are recomputed.

Scores are held transposed, keys by queries. Then all seven matrix products of the forward and
backward pass contract the last axis of the left side with the first of the right, which is what
a CPU runs fastest, and the softmax reduces over the outer axis, which vectorises.

Axes: ``b`` rows, ``k`` key/value heads, ``g`` query heads of one of them, ``t`` queries,
``s`` keys, ``e`` width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_sparse_attention.masks import MaskRule
from kernels_pallas.block_sparse_attention.specs import BlockSparseAttentionConfig

# Stands in for -inf, whose differences would be NaN.
_NEVER = -1e30

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class _Static(NamedTuple):
    rule: MaskRule
    scale: float
    softcap: float | None
    block: int


class _Tokens(NamedTuple):
    q_positions: Int[Array, "B T"]
    kv_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]


def supports(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B S K E"],
    rule: MaskRule,
    config: BlockSparseAttentionConfig,
    **others: object,
) -> str | None:
    """Why this form cannot run, or ``None``: skipping blocks needs queries that are the keys."""
    del others
    queries, keys = q.shape[1], k.shape[1]
    if queries == keys or _block_map(rule, config.of(queries), queries, keys).all():
        return None
    return f"{rule} skips blocks by index, which needs as many queries ({queries}) as keys ({keys})"


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
    queries, keys = q.shape[1], k.shape[1]
    static = _Static(rule, scale, softcap, config.of(queries))
    tokens = _Tokens(q_positions, kv_positions, q_segments, kv_segments)
    out = _attention(static, q, k, v, tokens)
    if _block_map(rule, static.block, queries, keys).all():
        return out
    return jnp.where(_in_order(tokens)[:, None, None, None], out, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, tokens: _Tokens):
    return _forward(static, q, k, v, tokens)[0]


def _forward(static: _Static, q, k, v, tokens: _Tokens):
    groups = q.shape[2] // k.shape[2]
    blocked = _blocked_tokens(tokens, static.block)
    q_egt = _blocked(q, static.block, groups, "nbkegt")
    k_se = _blocked(k, static.block, 1, "nbkgte")[:, :, :, 0]
    v_es = _blocked(v, static.block, 1, "nbkegt")[:, :, :, :, 0]

    def accumulate(carry, pair):
        (i, j), (highest, total, out) = pair, carry
        scores = _masked(static, _scores(static, k_se[j], q_egt[i]), blocked, i, j)
        higher = jnp.maximum(highest[i], jnp.max(scores, axis=2))
        weights = jnp.exp(scores - higher[:, :, None])
        kept = jnp.exp(highest[i] - higher)
        block = _product("bkes,bksgt->bkegt", v_es[j], weights.astype(v.dtype))
        return (
            _put(highest, i, higher),
            _put(total, i, total[i] * kept + jnp.sum(weights, axis=2)),
            _put(out, i, out[i] * kept[:, :, None] + block),
        ), None

    out = jnp.zeros(q_egt.shape, jnp.float32)
    total = jnp.zeros_like(out[:, :, :, 0])
    # Above _NEVER, so that a query that sees nothing has weights of zero, not of one.
    highest = jnp.full_like(total, 0.5 * _NEVER)
    pairs = _pairs(static, q.shape[1], k.shape[1])
    (highest, total, out), _ = lax.scan(accumulate, (highest, total, out), pairs)
    total = jnp.where(total > 0, total, 1.0)
    out = _whole(out / total[:, :, :, None], "nbkegt", q)
    return out, (q, k, v, tokens, out, highest + jnp.log(total))


def _backward(static: _Static, residuals, cotangent):
    q, k, v, tokens, out, log_sum_exp = residuals
    groups, size = q.shape[2] // k.shape[2], static.block
    blocked = _blocked_tokens(tokens, size)
    q_egt, o_egt = (_blocked(x, size, groups, "nbkegt") for x in (q, cotangent))
    q_gte, o_gte = (_blocked(x, size, groups, "nbkgte") for x in (q, cotangent))
    k_se, v_se = (_blocked(x, size, 1, "nbkgte")[:, :, :, 0] for x in (k, v))
    k_es = _blocked(k, size, 1, "nbkegt")[:, :, :, :, 0]
    inner = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    inner = _blocked(inner[..., None], size, groups, "nbkegt")[:, :, :, 0]

    def accumulate(carry, pair):
        (i, j), (q_gradient, k_gradient, v_gradient) = pair, carry
        scores = _scores(static, k_se[j], q_egt[i])
        weights = jnp.exp(_masked(static, scores, blocked, i, j) - log_sum_exp[i][:, :, None])
        by_weights = _product("bkse,bkegt->bksgt", v_se[j], o_egt[i])
        by_scores = weights * (by_weights - inner[i][:, :, None]) * static.scale
        if static.softcap is not None:
            by_scores *= 1.0 - jnp.square(scores / static.softcap)
        by_scores, weights = by_scores.astype(q.dtype), weights.astype(q.dtype)
        to_q = _product("bkes,bksgt->bkegt", k_es[j], by_scores)
        to_k = _product("bksgt,bkgte->bkse", by_scores, q_gte[i])
        to_v = _product("bksgt,bkgte->bkse", weights, o_gte[i])
        return (
            _put(q_gradient, i, q_gradient[i] + to_q),
            _put(k_gradient, j, k_gradient[j] + to_k),
            _put(v_gradient, j, v_gradient[j] + to_v),
        ), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q_egt, k_se, v_se)]
    pairs = _pairs(static, q.shape[1], k.shape[1])
    (q_gradient, k_gradient, v_gradient), _ = lax.scan(accumulate, tuple(zeros), pairs)
    return (
        _whole(q_gradient, "nbkegt", q),
        _whole(k_gradient[:, :, :, None], "nbkgte", k),
        _whole(v_gradient[:, :, :, None], "nbkgte", v),
        None,
    )


_attention.defvjp(_forward, _backward)


def _blocked(x: Float[Array, "B T H E"], block: int, groups: int, axes: str) -> Float[Array, "..."]:
    """Blocks ``n`` of tokens ``t`` first; the last one is padded with zeros."""
    batch, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, block, heads // groups, groups, width)
    return jnp.einsum(f"bntkge->{axes}", x)


def _whole(x: Float[Array, "..."], axes: str, like: Float[Array, "B T H E"]) -> Float[Array, "..."]:
    """Undoes ``_blocked``, in the shape and dtype of ``like``."""
    x = jnp.einsum(f"{axes}->bntkge", x)
    return x.reshape(like.shape[0], -1, *like.shape[2:])[:, : like.shape[1]].astype(like.dtype)


def _blocked_tokens(tokens: _Tokens, block: int) -> _Tokens:
    """``[n, B, t]``; padding is segment 0."""

    def blocked(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)))
        return x.reshape(x.shape[0], -1, block).swapaxes(0, 1)

    return _Tokens(*map(blocked, tokens))


def _put(blocks: Float[Array, "..."], index: Int[Array, ""], block: Float[Array, "..."]):
    return lax.dynamic_update_index_in_dim(blocks, block, index, 0)


def _block_map(rule: MaskRule, block: int, queries: int, keys: int) -> Bool[np.ndarray, "nq nk"]:
    return rule.block_map(block, block, -(-queries // block), -(-keys // block))


def _pairs(static: _Static, queries: int, keys: int) -> tuple[Int[Array, " P"], Int[Array, " P"]]:
    """The blocks of queries and of keys that may see each other."""
    i, j = np.nonzero(_block_map(static.rule, static.block, queries, keys))
    return jnp.asarray(i), jnp.asarray(j)


def _scores(static: _Static, k_se: Float[Array, "B K S E"], q_egt: Float[Array, "B K E G T"]):
    scores = _product("bkse,bkegt->bksgt", k_se, q_egt) * static.scale
    if static.softcap is None:
        return scores
    return static.softcap * jnp.tanh(scores / static.softcap)


def _masked(static: _Static, scores, blocked: _Tokens, i: Int[Array, ""], j: Int[Array, ""]):
    visible = static.rule(
        blocked.q_positions[i][:, None, None, None, :],
        blocked.kv_positions[j][:, None, :, None, None],
        blocked.q_segments[i][:, None, None, None, :],
        blocked.kv_segments[j][:, None, :, None, None],
    )
    return jnp.where(visible, scores, _NEVER)


def _in_order(tokens: _Tokens) -> Bool[Array, " B"]:
    """Rows for which a map of blocks by index holds (see ``MaskRule.block_map``)."""
    same = tokens.q_positions == tokens.kv_positions
    same &= tokens.q_segments == tokens.kv_segments
    order = jnp.argsort(tokens.q_segments, axis=1, stable=True)
    positions = jnp.take_along_axis(tokens.q_positions, order, axis=1)
    segments = jnp.take_along_axis(tokens.q_segments, order, axis=1)
    apart = jnp.diff(positions, axis=1) >= jnp.diff(order, axis=1)
    apart |= (jnp.diff(segments, axis=1) != 0) | (segments[:, 1:] == 0)
    return jnp.all(same, axis=1) & jnp.all(apart, axis=1)

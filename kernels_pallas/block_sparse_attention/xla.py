"""A loop over the pairs of blocks that may see each other; probabilities are recomputed.

Scores are held transposed, keys by queries. Then all seven matrix products of the forward and
backward pass contract the last axis of the left side with the first of the right, which is what
a CPU runs fastest, and the softmax reduces over the outer axis, which vectorises.

A static map is a loop over its pairs, of all rows at a time; lists at run time are a loop over
their slots, of all blocks of queries at a time, whose blocks of keys are gathered.

Axes: ``b`` rows, ``k`` key/value heads, ``g`` query heads of one of them, ``t`` queries,
``s`` keys, ``e`` width; ``n`` blocks.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_sparse_attention import blocks as block_lists
from kernels_pallas.block_sparse_attention.blocks import Tokens
from kernels_pallas.block_sparse_attention.masks import MaskRule
from kernels_pallas.block_sparse_attention.specs import NOTHING, BlockSparseAttentionConfig

# Masked scores; below NOTHING, so that a query that sees nothing has weights of zero, not of one.
_NEVER = 2 * NOTHING

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class _Static(NamedTuple):
    rule: MaskRule
    scale: float
    softcap: float | None
    block_q: int
    block_k: int


class _Running(NamedTuple):
    """Of an online softmax."""

    highest: Float[Array, "*N K G T"]
    total: Float[Array, "*N K G T"]
    out: Float[Array, "*N K E G T"]


def supports(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B S K E"],
    rule: MaskRule,
    blocks: Int[Array, "B Q N"] | None,
    config: BlockSparseAttentionConfig,
    **others: object,
) -> str | None:
    """Why this form cannot run, or ``None``: skipping blocks needs queries that are the keys."""
    del others
    queries, keys = q.shape[1], k.shape[1]
    block = config.of(queries)
    if blocks is not None:
        return None
    return block_lists.static_map_refusal(rule, block, block, queries, keys)


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
    queries, keys = q.shape[1], k.shape[1]
    tokens = Tokens(q_positions, kv_positions, q_segments, kv_segments)
    if blocks is not None:
        blocks = block_lists.distinct(blocks, block_lists.count(keys, block_shape[1]))
        return _attention(_Static(rule, scale, softcap, *block_shape), q, k, v, tokens, blocks)
    block = config.of(queries)
    static = _Static(rule, scale, softcap, block, block)
    out, log_sum_exp = _attention(static, q, k, v, tokens, None)
    visible = block_lists.static_map(rule, block, block, queries, keys)
    return block_lists.where_in_order(out, log_sum_exp, tokens, rule, visible)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, tokens: Tokens, blocks):
    return _forward(static, q, k, v, tokens, blocks)[0]


def _forward(static: _Static, q, k, v, tokens: Tokens, blocks):
    groups = q.shape[2] // k.shape[2]
    blocked = _blocked_tokens(static, tokens)
    q_egt = _blocked(q, static.block_q, groups, "nbkegt")
    k_se = _blocked(k, static.block_k, 1, "nbkgte")[:, :, :, 0]
    v_es = _blocked(v, static.block_k, 1, "nbkegt")[:, :, :, :, 0]

    def one_pair(running, pair):
        i, j = pair
        before = _Running(*(x[i] for x in running))
        visible = _visible(static, _q_side(blocked, i), _kv_side(blocked, j))
        after = _accumulate(static, before, q_egt[i], k_se[j], v_es[j], visible)
        return _Running(*(_put(x, i, y) for x, y in zip(running, after, strict=True))), None

    def one_slot(running, slot):
        at = _gather(slot)
        visible = _listed_visible(static, blocked, slot)
        return _accumulate(static, running, q_egt, k_se[at], v_es[at], visible), None

    out = jnp.zeros(q_egt.shape, jnp.float32)
    total = jnp.zeros_like(out[:, :, :, 0])
    running = _Running(jnp.full_like(total, NOTHING), total, out)
    if blocks is None:
        running, _ = lax.scan(one_pair, running, _pairs(static, q.shape[1], k.shape[1]))
    else:
        running, _ = lax.scan(one_slot, running, blocks.transpose(2, 1, 0))
    total = jnp.where(running.total > 0, running.total, 1.0)
    out = _whole(running.out / total[:, :, :, None], "nbkegt", q)
    log_sum_exp = (running.highest + jnp.log(total))[:, :, :, None]
    like = jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32)
    log_sum_exp = _whole(log_sum_exp, "nbkegt", like)
    return (out, log_sum_exp[..., 0]), (q, k, v, tokens, blocks, out, log_sum_exp)


def _backward(static: _Static, residuals, cotangents):
    q, k, v, tokens, blocks, out, log_sum_exp = residuals
    cotangent, by_log_sum_exp = cotangents
    groups = q.shape[2] // k.shape[2]
    blocked = _blocked_tokens(static, tokens)
    inner = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    inner = (inner - by_log_sum_exp)[..., None]

    def of_queries(x, axes="nbkegt"):
        return _blocked(x, static.block_q, groups, axes)

    k_se, v_se = (_blocked(x, static.block_k, 1, "nbkgte")[:, :, :, 0] for x in (k, v))
    queries = _Queries(
        of_queries(q),
        of_queries(q, "nbkgte"),
        of_queries(cotangent),
        of_queries(cotangent, "nbkgte"),
        of_queries(log_sum_exp)[:, :, :, 0],
        of_queries(inner)[:, :, :, 0],
    )
    k_es = _blocked(k, static.block_k, 1, "nbkegt")[:, :, :, :, 0]

    def one_pair(gradients, pair):
        i, j = pair
        visible = _visible(static, _q_side(blocked, i), _kv_side(blocked, j))
        own = _Queries(*(x[i] for x in queries))
        to_q, to_k, to_v = _gradients(static, own, k_se[j], k_es[j], v_se[j], visible)
        of_q, of_k, of_v = gradients
        of_q = _put(of_q, i, of_q[i] + to_q)
        return (of_q, _put(of_k, j, of_k[j] + to_k), _put(of_v, j, of_v[j] + to_v)), None

    def one_slot(gradients, slot):
        at = _gather(slot)
        visible = _listed_visible(static, blocked, slot)
        to_q, to_k, to_v = _gradients(static, queries, k_se[at], k_es[at], v_se[at], visible)
        of_q, of_k, of_v = gradients
        return (of_q + to_q, of_k.at[at].add(to_k), of_v.at[at].add(to_v)), None

    gradients = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries.q_egt, k_se, v_se))
    if blocks is None:
        gradients, _ = lax.scan(one_pair, gradients, _pairs(static, q.shape[1], k.shape[1]))
    else:
        gradients, _ = lax.scan(one_slot, gradients, blocks.transpose(2, 1, 0))
    return (
        _whole(gradients[0], "nbkegt", q),
        _whole(gradients[1][:, :, :, None], "nbkgte", k),
        _whole(gradients[2][:, :, :, None], "nbkgte", v),
        None,
        None,
    )


_attention.defvjp(_forward, _backward)


class _Queries(NamedTuple):
    """What the backward pass needs of queries, with ``o`` the gradient by their results."""

    q_egt: Float[Array, "*N K E G T"]
    q_gte: Float[Array, "*N K G T E"]
    o_egt: Float[Array, "*N K E G T"]
    o_gte: Float[Array, "*N K G T E"]
    log_sum_exp: Float[Array, "*N K G T"]
    inner: Float[Array, "*N K G T"]


def _accumulate(static: _Static, running: _Running, q_egt, k_se, v_es, visible) -> _Running:
    """One more block of keys for blocks of queries."""
    scores = jnp.where(visible, _scores(static, k_se, q_egt), _NEVER)
    higher = jnp.maximum(running.highest, jnp.max(scores, axis=-3))
    weights = jnp.exp(scores - higher[..., None, :, :])
    kept = jnp.exp(running.highest - higher)
    block = _product("...kes,...ksgt->...kegt", v_es, weights.astype(v_es.dtype))
    return _Running(
        higher,
        running.total * kept + jnp.sum(weights, axis=-3),
        running.out * kept[..., None, :, :] + block,
    )


def _gradients(static: _Static, own: _Queries, k_se, k_es, v_se, visible):
    """By queries, keys and values, of blocks of queries with a block of keys each."""
    scores = _scores(static, k_se, own.q_egt)
    shown = jnp.where(visible, scores, _NEVER)
    weights = jnp.exp(shown - own.log_sum_exp[..., None, :, :])
    by_weights = _product("...kse,...kegt->...ksgt", v_se, own.o_egt)
    by_scores = weights * (by_weights - own.inner[..., None, :, :]) * static.scale
    if static.softcap is not None:
        by_scores *= 1.0 - jnp.square(scores / static.softcap)
    by_scores, weights = by_scores.astype(k_se.dtype), weights.astype(k_se.dtype)
    return (
        _product("...kes,...ksgt->...kegt", k_es, by_scores),
        _product("...ksgt,...kgte->...kse", by_scores, own.q_gte),
        _product("...ksgt,...kgte->...kse", weights, own.o_gte),
    )


def _blocked(x: Float[Array, "B T H E"], block: int, groups: int, axes: str) -> Float[Array, "..."]:
    """Blocks ``n`` of tokens ``t`` first; the last one is padded with zeros."""
    batch, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, block, heads // groups, groups, width)
    return jnp.einsum(f"bntkge->{axes}", x)


def _whole(x: Float[Array, "..."], axes: str, like: Any) -> Float[Array, "..."]:
    """Undoes ``_blocked``, in the shape and dtype of ``like``."""
    x = jnp.einsum(f"{axes}->bntkge", x)
    return x.reshape(like.shape[0], -1, *like.shape[2:])[:, : like.shape[1]].astype(like.dtype)


def _blocked_tokens(static: _Static, tokens: Tokens) -> Tokens:
    """``[n, B, t]``; padding is segment 0."""

    def blocked(x, block):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)))
        return x.reshape(x.shape[0], -1, block).swapaxes(0, 1)

    sizes = (static.block_q, static.block_k) * 2
    return Tokens(*map(blocked, tokens, sizes))


def _put(blocks: Float[Array, "..."], index: Int[Array, ""], block: Float[Array, "..."]):
    return lax.dynamic_update_index_in_dim(blocks, block, index, 0)


def _pairs(static: _Static, queries: int, keys: int) -> tuple[Int[Array, " P"], Int[Array, " P"]]:
    """The blocks of queries and of keys that may see each other."""
    sizes = static.block_q, static.block_k
    i, j = np.nonzero(block_lists.static_map(static.rule, *sizes, queries, keys))
    return jnp.asarray(i), jnp.asarray(j)


def _gather(slot: Int[Array, "Q B"]) -> tuple[Int[Array, "Q B"], Int[Array, "1 B"]]:
    """Index of the block of keys that each block of queries lists, any one if it lists none."""
    return jnp.maximum(slot, 0), jnp.arange(slot.shape[1])[None]


def _scores(static: _Static, k_se: Float[Array, "*N K S E"], q_egt: Float[Array, "*N K E G T"]):
    scores = _product("...kse,...kegt->...ksgt", k_se, q_egt) * static.scale
    if static.softcap is None:
        return scores
    return static.softcap * jnp.tanh(scores / static.softcap)


def _q_side(blocked: Tokens, index: Array | slice) -> tuple[Array, Array]:
    return blocked.q_positions[index], blocked.q_segments[index]


def _kv_side(blocked: Tokens, index: Array | tuple[Array, Array]) -> tuple[Array, Array]:
    return blocked.kv_positions[index], blocked.kv_segments[index]


def _visible(
    static: _Static, queries: tuple[Array, Array], keys: tuple[Array, Array]
) -> Bool[Array, "*N 1 S 1 T"]:
    (q_pos, q_seg), (kv_pos, kv_seg) = queries, keys
    return static.rule(
        q_pos[..., None, None, None, :],
        kv_pos[..., None, :, None, None],
        q_seg[..., None, None, None, :],
        kv_seg[..., None, :, None, None],
    )


def _listed_visible(static: _Static, blocked: Tokens, slot: Int[Array, "Q B"]):
    visible = _visible(static, _q_side(blocked, slice(None)), _kv_side(blocked, _gather(slot)))
    return visible & (slot >= 0)[..., None, None, None, None]

"""A loop over the pairs of blocks that may see each other; probabilities are recomputed.

Scores are held transposed, keys by queries. Then all seven matrix products of the forward and
backward pass contract the last axis of the left side with the first of the right, which is what
a CPU runs fastest, and the softmax reduces over the outer axis, which vectorises.

A static map is a loop over its pairs, of all rows at a time. Lists at run time are sorted by their
length and walked in groups, each as far as its longest list goes, so that the work is that of the
pairs that are listed, however few they are of those that there is room for.

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

# Heads of blocks of queries whose lists are walked together: enough to fill all cores, few enough
# for their scores to stay in cache.
_TOGETHER = 32

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

    if blocks is None:
        pairs = _pairs(static, q.shape[1], k.shape[1])
        running, _ = lax.scan(one_pair, _nothing_yet(q_egt), pairs)
    else:
        running = _over_lists(static, blocked, blocks, q_egt, k_se, v_es)
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

    if blocks is None:
        gradients = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries.q_egt, k_se, v_se))
        gradients, _ = lax.scan(one_pair, gradients, _pairs(static, q.shape[1], k.shape[1]))
    else:
        gradients = _gradients_over_lists(static, blocked, blocks, queries, (k_se, k_es, v_se))
    return (
        _whole(gradients[0], "nbkegt", q),
        _whole(gradients[1][:, :, :, None], "nbkgte", k),
        _whole(gradients[2][:, :, :, None], "nbkgte", v),
        None,
        None,
    )


_attention.defvjp(_forward, _backward)


class _Group(NamedTuple):
    """Blocks of queries whose lists are walked together; blocks are numbered over all rows.

    Attributes:
        queries: the blocks of queries.
        keys: the block of keys in each place of their lists; behind the last one -1.
        longest: places of the longest list.
    """

    queries: Int[Array, "*C R"]
    keys: Int[Array, "*C N R"]
    longest: Int[Array, "*C"]


class _Lists(NamedTuple):
    """Lists in groups, the longest first, and where in them each block of queries is."""

    groups: _Group
    places: Int[Array, " Q"]


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


def _over_lists(static: _Static, blocked: Tokens, blocks, q_egt, k_se, v_es) -> _Running:
    """The softmax of all blocks of queries, each over the blocks of keys that it lists."""
    lists = _sorted_lists(blocks, len(k_se), q_egt.shape[2] * q_egt.shape[4])
    q_flat, k_flat, v_flat = _flat((q_egt, k_se, v_es))

    def one_group(_, group: _Group):
        q_group = q_flat[group.queries]

        def one_slot(slot, running):
            at, visible = _listed(static, blocked, group, slot)
            return _accumulate(static, running, q_group, k_flat[at], v_flat[at], visible)

        return None, lax.fori_loop(0, group.longest, one_slot, _nothing_yet(q_group))

    _, grouped = lax.scan(one_group, None, lists.groups)
    return _Running(*(_in_place(x, lists, q_egt) for x in grouped))


def _gradients_over_lists(static: _Static, blocked: Tokens, blocks, queries: _Queries, keys):
    """By queries, keys and values."""
    k_se, _, v_se = keys
    lists = _sorted_lists(blocks, len(k_se), k_se.shape[2] * queries.q_egt.shape[4])
    flat, every = _flat(keys), _Queries(*_flat(queries))

    def one_group(of_keys, group: _Group):
        own = _Queries(*(x[group.queries] for x in every))

        def one_slot(slot, gradients):
            at, visible = _listed(static, blocked, group, slot)
            k_se, k_es, v_se = (x[at] for x in flat)
            to_q, to_k, to_v = _gradients(static, own, k_se, k_es, v_se, visible)
            of_q, of_k, of_v = gradients
            return of_q + to_q, of_k.at[at].add(to_k), of_v.at[at].add(to_v)

        start = jnp.zeros(own.q_egt.shape, jnp.float32), *of_keys
        of_q, *of_keys = lax.fori_loop(0, group.longest, one_slot, start)
        return tuple(of_keys), of_q

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in _flat((k_se, v_se)))
    (of_k, of_v), of_q = lax.scan(one_group, zeros, lists.groups)
    of_q = _in_place(of_q, lists, queries.q_egt)
    return of_q, of_k.reshape(k_se.shape), of_v.reshape(v_se.shape)


def _sorted_lists(blocks: Int[Array, "B Q N"], num_k: int, heads: int) -> _Lists:
    """The lists, each without holes, by length."""
    batch, num_q, _ = blocks.shape
    together = min(max(1, _TOGETHER // heads), batch * num_q)
    keys = jnp.sort(jnp.where(blocks < 0, num_k, blocks), axis=2)
    row = jnp.arange(batch)[:, None, None]
    keys = jnp.where(keys < num_k, keys * batch + row, -1)
    keys = keys.swapaxes(0, 1).reshape(batch * num_q, -1)
    lengths = jnp.sum(keys >= 0, axis=1)
    order = jnp.argsort(-lengths)
    filled = jnp.pad(order, (0, -len(order) % together), constant_values=-1).reshape(-1, together)
    groups = _Group(
        queries=jnp.maximum(filled, 0),
        keys=jnp.where(filled[:, :, None] < 0, -1, keys[filled]).swapaxes(1, 2),
        longest=lengths[filled[:, 0]],
    )
    return _Lists(groups, jnp.argsort(order))


def _flat(arrays: Any) -> list[Array]:
    """Blocks of all rows behind one another."""
    return [x.reshape(-1, *x.shape[2:]) for x in arrays]


def _in_place(x: Float[Array, "C R ..."], lists: _Lists, like: Any) -> Float[Array, "..."]:
    """Results of groups, as blocks of rows again."""
    x = x.reshape(-1, *x.shape[2:])[lists.places]
    return x.reshape(*like.shape[:2], *x.shape[1:])


def _listed(
    static: _Static, blocked: Tokens, group: _Group, slot: Int[Array, ""]
) -> tuple[Int[Array, " R"], Bool[Array, "R 1 S 1 T"]]:
    """The block of keys in one place of each list, and what is seen of it; nothing past the end."""
    at = lax.dynamic_index_in_dim(group.keys, slot, 0, keepdims=False)
    there, at = at >= 0, jnp.maximum(at, 0)
    q_positions, kv_positions, q_segments, kv_segments = _flat(blocked)
    queries = q_positions[group.queries], q_segments[group.queries]
    visible = _visible(static, queries, (kv_positions[at], kv_segments[at]))
    return at, visible & there[:, None, None, None, None]


def _nothing_yet(q_egt: Float[Array, "*N K E G T"]) -> _Running:
    out = jnp.zeros(q_egt.shape, jnp.float32)
    total = jnp.zeros_like(out[..., 0, :, :])
    return _Running(jnp.full_like(total, NOTHING), total, out)


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

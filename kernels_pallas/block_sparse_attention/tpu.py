"""Flash attention over a flat list of pairs of blocks, in Pallas for the TPU's Mosaic compiler.

The list is handed over ahead of the grid (scalar prefetch), so that only listed blocks are loaded
and each takes one grid step; results stay in VMEM while their block does. The block that stays is
on sublanes, so that hardly a product turns a matrix of scores.

Statistics per query are in base 2: ``exp2`` is what the hardware has.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention import blocks as block_lists
from kernels_pallas.block_sparse_attention import operands, pairs, tpu_backward, tpu_forward
from kernels_pallas.block_sparse_attention.blocks import Tokens
from kernels_pallas.block_sparse_attention.masks import MaskRule
from kernels_pallas.block_sparse_attention.specs import BlockSparseAttentionConfig
from kernels_pallas.block_sparse_attention.tpu_operands import LANES, Static, operands_of
from kernels_pallas.common import dispatch

# Of the scalar memory that holds the list.
_LIST_BYTES = 1 << 19


class _Passes(NamedTuple):
    """What is static of each pass; they differ in block sizes."""

    forward: Static
    backward: Static


def supports(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    rule: MaskRule,
    blocks: Int[Array, "B Q N"] | None,
    block_shape: tuple[int, int],
    config: BlockSparseAttentionConfig,
    **others: object,
) -> str | None:
    """Why this form cannot run, or ``None``."""
    del others
    reason = dispatch.needs("tpu", config.interpret)
    if reason is not None:
        return reason
    if q.dtype not in (jnp.bfloat16, jnp.float32) or {k.dtype, v.dtype} != {q.dtype}:
        return f"it takes bfloat16 or float32 alike, not {q.dtype}, {k.dtype}, {v.dtype}"
    for block_q, block_k in _tiles(q, k, rule, blocks, block_shape, config):
        reason = _refusal(q, k, rule, blocks, block_q, block_k, config)
        if reason is not None:
            return reason
    return None


def _refusal(q, k, rule, blocks, block_q: int, block_k: int, config) -> str | None:
    """Why blocks of that size cannot be used, or ``None``."""
    queries, keys = q.shape[1], k.shape[1]
    if not config.interpret and (block_q % LANES or block_k % LANES):
        return f"blocks of {block_q} queries and {block_k} keys are not multiples of {LANES}"
    num_q, num_k = block_lists.count(queries, block_q), block_lists.count(keys, block_k)
    if max(num_q, num_k) > pairs.MOST_BLOCKS:
        return f"{max(num_q, num_k)} blocks are more than {pairs.MOST_BLOCKS}; use larger ones"
    if blocks is None:
        visible = block_lists.static_map(rule, block_q, block_k, queries, keys)
        entries = int(visible.sum()) + (~visible.any(1)).sum() + (~visible.any(0)).sum()
    else:
        entries = blocks.shape[1] * blocks.shape[2] + num_k
    # Rows with lists of their own may be taken a few at a time.
    rows = q.shape[0] if blocks is None else 1
    if 4 * rows * entries > _LIST_BYTES:
        return f"{rows} rows of {entries} pairs of blocks overflow the scalar memory"
    if blocks is None:
        return block_lists.static_map_refusal(rule, block_q, block_k, queries, keys)
    return None


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
    sizes = _tiles(q, k, rule, blocks, block_shape, config)
    passes = _Passes(*(Static(rule, scale, softcap, *size, config.interpret) for size in sizes))
    queries, keys = q.shape[1], k.shape[1]
    tokens = Tokens(q_positions, kv_positions, q_segments, kv_segments)
    if blocks is not None:
        blocks = block_lists.distinct(blocks, block_lists.count(keys, block_shape[1]))
        return _by_rows(passes, q, k, v, tokens, blocks)
    out, log_sum_exp = _attention(passes, q, k, v, tokens, None)
    maps = (block_lists.static_map(rule, *size, queries, keys) for size in sizes)
    # Whichever pass skips something; so that none of them is wrong unseen.
    visible = min(maps, key=lambda blocks: blocks.all())
    return block_lists.where_in_order(out, log_sum_exp, tokens, rule, visible)


def _by_rows(passes: _Passes, q, k, v, tokens: Tokens, blocks):
    """As many rows at a time as have room for their lists in the scalar memory."""
    rows, num_q, slots = blocks.shape
    entries = num_q * slots + block_lists.count(k.shape[1], passes.forward.block_k)
    most = max(1, _LIST_BYTES // (4 * entries))
    if rows <= most:
        return _attention(passes, q, k, v, tokens, blocks)
    together = max(n for n in range(1, most + 1) if rows % n == 0)
    split = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), (q, k, v, tokens, blocks))
    found = lax.map(lambda some: _attention(passes, *some), split)
    return tuple(x.reshape(rows, *x.shape[2:]) for x in found)


def _tiles(q, k, rule, blocks, block_shape, config) -> list[tuple[int, int]]:
    """Sizes of the blocks of the forward and of the backward pass."""
    if blocks is not None:
        return [block_shape] * 2
    call = {"queries": q.shape[1], "keys": k.shape[1], "width": q.shape[3], "dtype": q.dtype}
    return [config.tiles(which, rule=rule, **call) for which in ("forward", "backward")]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(passes: _Passes, q, k, v, tokens: Tokens, blocks):
    return _forward(passes, q, k, v, tokens, blocks)[0]


def _forward(passes: _Passes, q, k, v, tokens: Tokens, blocks):
    static = passes.forward
    padded = operands.padded_tokens(tokens, *static.sizes)
    rows = _entries(static, padded, blocks, q, k, by_rows=True)
    out, log_sum_exp = tpu_forward.run(static, rows, operands_of(static, padded, q, k, v))
    out = jnp.swapaxes(out, 1, 2)[:, : q.shape[1]]
    log_sum_exp = jnp.swapaxes(log_sum_exp[:, :, 0], 1, 2)[:, : q.shape[1]]
    return (out, log_sum_exp), (q, k, v, tokens, blocks, out, log_sum_exp)


def _backward(passes: _Passes, residuals, cotangents):
    q, k, v, tokens, blocks, out, log_sum_exp = residuals
    cotangent, by_log_sum_exp = cotangents
    static = passes.backward
    tokens = operands.padded_tokens(tokens, *static.sizes)
    sides = operands_of(static, tokens, q, k, v)
    inner = operands.inner_products(out, cotangent, by_log_sum_exp)
    per_query = jnp.stack([log_sum_exp * math.log2(math.e), inner], axis=1)
    per_query = operands.whole(per_query.transpose(0, 3, 1, 2), static.block_q, 3)
    cotangent = operands.whole(jnp.swapaxes(cotangent, 1, 2), static.block_q, 2)
    columns = _entries(static, tokens, blocks, q, k, by_rows=False)
    to_q, to_k, to_v = tpu_backward.by_columns(
        static, columns, sides, cotangent, per_query, queries=tpu_backward.fits(sides)
    )
    if to_q is None:
        rows = _entries(static, tokens, blocks, q, k, by_rows=True)
        to_q = tpu_backward.by_queries(static, rows, sides, cotangent, per_query)
    else:
        to_q = (to_q * static.scale).astype(q.dtype)
    to_q, to_k, to_v = (jnp.swapaxes(x, 1, 2) for x in (to_q, to_k, to_v))
    return to_q[:, : q.shape[1]], to_k[:, : k.shape[1]], to_v[:, : k.shape[1]], None, None


_attention.defvjp(_forward, _backward)


def _entries(static: Static, tokens: Tokens, blocks, q, k, *, by_rows: bool) -> pairs.Listed:
    sizes = static.sizes
    found = operands.pairs_of(static.rule, blocks, sizes, q.shape[1], k.shape[1], by_rows=by_rows)
    shortened = blocks is not None
    return pairs.packed(found, static.rule, tokens, *sizes, by_rows=by_rows, shortened=shortened)

"""Flash attention over a flat list of pairs of blocks, in Pallas for the TPU's Mosaic compiler.

The list is handed over ahead of the grid (scalar prefetch), so that only listed blocks are loaded
and each takes one grid step; results stay in VMEM while their block does. Queries lie on sublanes
and keys on lanes, except in the kernel of the key and value gradients, which is transposed: so
the block that stays is always on sublanes, and no product transposes a matrix of scores.

Statistics per query are in base 2: ``exp2`` is what the hardware has.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention import blocks as block_lists
from kernels_pallas.block_sparse_attention import operands, pairs
from kernels_pallas.block_sparse_attention.blocks import Tokens
from kernels_pallas.block_sparse_attention.masks import MaskRule, RangeRule
from kernels_pallas.block_sparse_attention.specs import NOTHING, BlockSparseAttentionConfig
from kernels_pallas.common import dispatch

# Masked scores; below NOTHING, so that a query that sees nothing has weights of zero, not of one.
_NEVER = 2 * NOTHING
_LANES = 128
# Of the scalar memory that holds the list.
_LIST_BYTES = 1 << 19


class _Static(NamedTuple):
    rule: MaskRule
    scale: float
    softcap: float | None
    block_q: int
    block_k: int
    interpret: Any


class _Sides(NamedTuple):
    """Operands as the kernels take them: heads first, whole blocks."""

    q_tokens: Int[Array, "B 2 T"]
    kv_tokens: Int[Array, "B 2 S"]
    q: Float[Array, "B H T E"]
    k: Float[Array, "B K S E"]
    v: Float[Array, "B K S E"]


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
    queries, keys = q.shape[1], k.shape[1]
    block_q, block_k = block_shape if blocks is not None else config.tiles(queries, keys)
    if not config.interpret and (block_q % _LANES or block_k % _LANES):
        return f"blocks of {block_q} queries and {block_k} keys are not multiples of {_LANES}"
    num_q, num_k = block_lists.count(queries, block_q), block_lists.count(keys, block_k)
    if max(num_q, num_k) > pairs.MOST_BLOCKS:
        return f"{max(num_q, num_k)} blocks are more than {pairs.MOST_BLOCKS}; use larger ones"
    if blocks is None:
        visible = block_lists.static_map(rule, block_q, block_k, queries, keys)
        entries = int(visible.sum()) + (~visible.any(1)).sum() + (~visible.any(0)).sum()
    else:
        entries = blocks.shape[1] * blocks.shape[2] + num_k
    if 4 * q.shape[0] * entries > _LIST_BYTES:
        return f"{q.shape[0]} rows of {entries} pairs of blocks overflow the scalar memory"
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
    queries, keys = q.shape[1], k.shape[1]
    block_q, block_k = block_shape if blocks is not None else config.tiles(queries, keys)
    static = _Static(rule, scale, softcap, block_q, block_k, config.interpret)
    tokens = Tokens(q_positions, kv_positions, q_segments, kv_segments)
    if blocks is not None:
        blocks = block_lists.distinct(blocks, block_lists.count(keys, block_k))
        return _attention(static, q, k, v, tokens, blocks)
    out, log_sum_exp = _attention(static, q, k, v, tokens, None)
    visible = block_lists.static_map(rule, block_q, block_k, queries, keys)
    return block_lists.where_in_order(out, log_sum_exp, tokens, visible)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, tokens: Tokens, blocks):
    return _forward(static, q, k, v, tokens, blocks)[0]


def _forward(static: _Static, q, k, v, tokens: Tokens, blocks):
    tokens = operands.padded_tokens(tokens, static.block_q, static.block_k)
    entries = _row_entries(static, tokens, blocks, q.shape[1], k.shape[1])
    sides = _sides(static, tokens, q, k, v)
    out, log_sum_exp = _run_forward(static, entries, sides)
    out = jnp.swapaxes(out, 1, 2)[:, : q.shape[1]]
    log_sum_exp = jnp.swapaxes(log_sum_exp[:, :, 0], 1, 2)[:, : q.shape[1]]
    return (out, log_sum_exp), (q, k, v, tokens, blocks, out, log_sum_exp)


def _backward(static: _Static, residuals, cotangents):
    q, k, v, tokens, blocks, out, log_sum_exp = residuals
    cotangent, by_log_sum_exp = cotangents
    queries, keys = q.shape[1], k.shape[1]
    sides = _sides(static, tokens, q, k, v)
    inner = operands.inner_products(out, cotangent, by_log_sum_exp)
    per_query = jnp.stack([log_sum_exp * math.log2(math.e), inner], axis=1)
    per_query = operands.whole(per_query.transpose(0, 3, 1, 2), static.block_q, 3)
    cotangent = operands.whole(jnp.swapaxes(cotangent, 1, 2), static.block_q, 2)
    rows = _row_entries(static, tokens, blocks, queries, keys)
    to_q = _run_backward_q(static, rows, sides, cotangent, per_query)
    columns = _column_entries(static, tokens, blocks, queries, keys)
    to_k, to_v = _run_backward_kv(static, columns, sides, cotangent, per_query)
    to_q, to_k, to_v = (jnp.swapaxes(x, 1, 2) for x in (to_q, to_k, to_v))
    return to_q[:, :queries], to_k[:, :keys], to_v[:, :keys], None, None


_attention.defvjp(_forward, _backward)


def _sides(static: _Static, tokens: Tokens, q: Array, k: Array, v: Array) -> _Sides:
    return _Sides(
        jnp.stack([tokens.q_positions, tokens.q_segments], axis=1),
        jnp.stack([tokens.kv_positions, tokens.kv_segments], axis=1),
        operands.whole(jnp.swapaxes(q, 1, 2), static.block_q, 2),
        operands.whole(jnp.swapaxes(k, 1, 2), static.block_k, 2),
        operands.whole(jnp.swapaxes(v, 1, 2), static.block_k, 2),
    )


def _row_entries(static: _Static, tokens: Tokens, blocks, queries: int, keys: int) -> Array:
    sizes = static.block_q, static.block_k
    listed = operands.row_pairs(static.rule, blocks, sizes, queries, keys)
    return pairs.packed(listed, static.rule, tokens, *sizes, by_rows=True)


def _column_entries(static: _Static, tokens: Tokens, blocks, queries: int, keys: int) -> Array:
    sizes = static.block_q, static.block_k
    listed = operands.column_pairs(static.rule, blocks, sizes, queries, keys)
    return pairs.packed(listed, static.rule, tokens, *sizes, by_rows=False)


class _Specs:
    """Blocks of the operands at an entry of the list; grids are ``(row, head, entry[, group])``."""

    def __init__(self, static: _Static, entries: Array, sides: _Sides, *, by_rows: bool):
        self.batch, self.heads, _, self.width = sides.q.shape
        self.kv_heads = sides.k.shape[1]
        self.group = self.heads // self.kv_heads
        self.pairs = entries.shape[0] // self.batch
        self.static, self.by_rows = static, by_rows

    def _spec(self, shape: tuple[int | None, ...], *, queries: bool, axis: int) -> pl.BlockSpec:
        """Of an array ``[B, ...]`` or ``[B, heads, ...]`` with tokens along ``axis``."""
        block = pairs.outer if queries == self.by_rows else pairs.inner

        def index(b, h, p, *rest):
            *group, entries = rest
            if self.by_rows:
                head = h if queries else h // self.group
            else:
                head = h * self.group + group[0] if queries else h
            at = [b] + [head] * (len(shape) == 4) + [0, 0]
            at[axis] = block(entries[b * self.pairs + p])
            return tuple(at)

        return pl.BlockSpec(shape, index)

    def vectors(self, *, queries: bool) -> pl.BlockSpec:
        """``[B, heads, T, E]``."""
        return self._spec((None, None, self._size(queries), self.width), queries=queries, axis=2)

    def sides(self) -> list[pl.BlockSpec]:
        """Of the five arrays of :class:`_Sides`."""
        tokens = [
            self._spec((None, 2, self._size(queries)), queries=queries, axis=2)
            for queries in (True, False)
        ]
        return [*tokens, *(self.vectors(queries=queries) for queries in (True, False, False))]

    def per_query(self, count: int) -> pl.BlockSpec:
        """``[B, H, count, T]``."""
        return self._spec((None, None, count, self._size(True)), queries=True, axis=3)

    def _size(self, queries: bool) -> int:
        return self.static.block_q if queries else self.static.block_k


def _run_forward(static: _Static, entries: Array, sides: _Sides) -> tuple[Array, Array]:
    specs = _Specs(static, entries, sides, by_rows=True)
    lanes = math.gcd(static.block_k, _LANES)
    rows = static.block_q
    return pl.pallas_call(
        functools.partial(_forward_kernel, static=static, count=specs.pairs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(specs.batch, specs.heads, specs.pairs),
            in_specs=specs.sides(),
            out_specs=[specs.vectors(queries=True), specs.per_query(1)],
            scratch_shapes=[
                pltpu.VMEM((rows, lanes), jnp.float32),
                pltpu.VMEM((rows, lanes), jnp.float32),
                pltpu.VMEM((rows, specs.width), jnp.float32),
                pltpu.VMEM((2, rows, lanes), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(sides.q.shape, sides.q.dtype),
            jax.ShapeDtypeStruct((*sides.q.shape[:2], 1, sides.q.shape[2]), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=static.interpret,
        name="block_sparse_attention_forward",
    )(entries, *sides)


def _forward_kernel(
    entries,
    q_tokens,
    kv_tokens,
    q,
    k,
    v,
    out,
    log_sum_exp,
    highest,
    total,
    accumulated,
    q_columns,
    *,
    static: _Static,
    count: int,
):
    """``highest`` is equal along lanes; ``total`` sums over them only at the end."""
    entry = entries[pl.program_id(0) * count + pl.program_id(2)]

    @pl.when(entry & pairs.FIRST != 0)
    def _():
        highest[...] = jnp.full_like(highest, NOTHING)
        total[...] = jnp.zeros_like(total)
        accumulated[...] = jnp.zeros_like(accumulated)
        q_columns[...] = _columns(q_tokens, q_columns.shape)

    def accumulate(*, masked: bool):
        scores = _scores(static, _product_nt(q[...], k[...]))
        if masked:
            scores = jnp.where(_visible(static, q_columns, kv_tokens), scores, _NEVER)
        before = highest[...]
        higher = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - _widen(higher, scores.shape[1]))
        kept = jnp.exp2(before - higher)
        highest[...] = higher
        total[...] = total[...] * kept + _sum_of_lanes(weights, total.shape[1])
        block = _product_nn(weights.astype(v.dtype), v[...])
        accumulated[...] = accumulated[...] * _widen(kept, block.shape[1]) + block

    _for_live(static, entry, accumulate)

    @pl.when(entry & pairs.LAST != 0)
    def _():
        summed = jnp.sum(total[...], axis=1, keepdims=True)
        summed = jnp.where(summed > 0, summed, 1.0)
        out[...] = (accumulated[...] / summed).astype(out.dtype)
        rows = (highest[...] + jnp.log2(summed)) * math.log(2.0)
        # NOTHING was never scaled to base 2.
        rows = jnp.where(highest[...] > NOTHING, rows, NOTHING)
        log_sum_exp[...] = rows.T[:1]


def _run_backward_q(
    static: _Static, entries: Array, sides: _Sides, cotangent: Array, per_query: Array
) -> Array:
    specs = _Specs(static, entries, sides, by_rows=True)
    lanes = math.gcd(static.block_k, _LANES)
    rows = static.block_q
    return pl.pallas_call(
        functools.partial(_backward_q_kernel, static=static, count=specs.pairs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(specs.batch, specs.heads, specs.pairs),
            in_specs=[*specs.sides(), specs.vectors(queries=True), specs.per_query(2)],
            out_specs=specs.vectors(queries=True),
            scratch_shapes=[
                pltpu.VMEM((rows, specs.width), jnp.float32),
                pltpu.VMEM((2, rows, lanes), jnp.int32),
                pltpu.VMEM((2, rows, lanes), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(sides.q.shape, sides.q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=static.interpret,
        name="block_sparse_attention_backward_q",
    )(entries, *sides, cotangent, per_query)


def _backward_q_kernel(
    entries,
    q_tokens,
    kv_tokens,
    q,
    k,
    v,
    cotangent,
    per_query,
    to_q,
    accumulated,
    q_columns,
    statistics,
    *,
    static: _Static,
    count: int,
):
    entry = entries[pl.program_id(0) * count + pl.program_id(2)]

    @pl.when(entry & pairs.FIRST != 0)
    def _():
        accumulated[...] = jnp.zeros_like(accumulated)
        q_columns[...] = _columns(q_tokens, q_columns.shape)
        statistics[...] = _columns(per_query, statistics.shape)

    def accumulate(*, masked: bool):
        scores = _scores(static, _product_nt(q[...], k[...]))
        keys = scores.shape[1]
        weights = jnp.exp2(scores - _widen(statistics[0], keys))
        if masked:
            weights = jnp.where(_visible(static, q_columns, kv_tokens), weights, 0.0)
        by_weights = _product_nt(cotangent[...], v[...])
        by_scores = weights * (by_weights - _widen(statistics[1], keys))
        by_scores = _by_products(static, by_scores, scores)
        accumulated[...] += _product_nn(by_scores.astype(k.dtype), k[...])

    _for_live(static, entry, accumulate)

    @pl.when(entry & pairs.LAST != 0)
    def _():
        to_q[...] = (accumulated[...] * static.scale).astype(to_q.dtype)


def _run_backward_kv(
    static: _Static, entries: Array, sides: _Sides, cotangent: Array, per_query: Array
) -> tuple[Array, Array]:
    specs = _Specs(static, entries, sides, by_rows=False)
    lanes = math.gcd(static.block_q, _LANES)
    rows = static.block_k
    return pl.pallas_call(
        functools.partial(_backward_kv_kernel, static=static, count=specs.pairs, group=specs.group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(specs.batch, specs.kv_heads, specs.pairs, specs.group),
            in_specs=[*specs.sides(), specs.vectors(queries=True), specs.per_query(2)],
            out_specs=[specs.vectors(queries=False)] * 2,
            scratch_shapes=[
                pltpu.VMEM((rows, specs.width), jnp.float32),
                pltpu.VMEM((rows, specs.width), jnp.float32),
                pltpu.VMEM((2, rows, lanes), jnp.int32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (sides.k, sides.v)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=static.interpret,
        name="block_sparse_attention_backward_kv",
    )(entries, *sides, cotangent, per_query)


def _backward_kv_kernel(
    entries,
    q_tokens,
    kv_tokens,
    q,
    k,
    v,
    cotangent,
    per_query,
    to_k,
    to_v,
    accumulated_k,
    accumulated_v,
    kv_columns,
    *,
    static: _Static,
    count: int,
    group: int,
):
    """Keys on sublanes, queries on lanes; heads of a group one after the other at each pair."""
    entry = entries[pl.program_id(0) * count + pl.program_id(2)]
    head = pl.program_id(3)

    @pl.when((entry & pairs.FIRST != 0) & (head == 0))
    def _():
        accumulated_k[...] = jnp.zeros_like(accumulated_k)
        accumulated_v[...] = jnp.zeros_like(accumulated_v)
        kv_columns[...] = _columns(kv_tokens, kv_columns.shape)

    def accumulate(*, masked: bool):
        scores = _scores(static, _product_nt(k[...], q[...]))
        weights = jnp.exp2(scores - per_query[:1])
        if masked:
            weights = jnp.where(_visible(static, q_tokens, kv_columns), weights, 0.0)
        accumulated_v[...] += _product_nn(weights.astype(cotangent.dtype), cotangent[...])
        by_weights = _product_nt(v[...], cotangent[...])
        by_scores = _by_products(static, weights * (by_weights - per_query[1:]), scores)
        accumulated_k[...] += _product_nn(by_scores.astype(q.dtype), q[...])

    _for_live(static, entry, accumulate)

    @pl.when((entry & pairs.LAST != 0) & (head == group - 1))
    def _():
        to_k[...] = (accumulated_k[...] * static.scale).astype(to_k.dtype)
        to_v[...] = accumulated_v[...].astype(to_v.dtype)


def _for_live(static: _Static, entry: Array, accumulate: Any) -> None:
    """Computes a pair, unmasked if nothing of it is hidden."""
    if not isinstance(static.rule, RangeRule):
        pl.when(entry & pairs.LIVE != 0)(functools.partial(accumulate, masked=True))
        return
    kind = entry & (pairs.LIVE | pairs.WHOLE)
    pl.when(kind == pairs.LIVE)(functools.partial(accumulate, masked=True))
    pl.when(kind == pairs.LIVE | pairs.WHOLE)(functools.partial(accumulate, masked=False))


def _precision(dtype: Any) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _product_nt(a: Array, b: Array) -> Array:
    """``a bᵀ``."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1,)), ((), ())),
        precision=_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _product_nn(a: Array, b: Array) -> Array:
    """``a b``."""
    return lax.dot_general(
        a,
        b,
        (((1,), (0,)), ((), ())),
        precision=_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _scores(static: _Static, products: Array) -> Array:
    """In base 2."""
    if static.softcap is None:
        return products * (static.scale * math.log2(math.e))
    capped = jnp.tanh(products * (static.scale / static.softcap))
    return capped * (static.softcap * math.log2(math.e))


def _by_products(static: _Static, by_scores: Array, scores: Array) -> Array:
    """Gradient by the products, up to ``scale``, from that by the scores, which are in base 2."""
    if static.softcap is None:
        return by_scores
    return by_scores * (1.0 - jnp.square(scores * (math.log(2.0) / static.softcap)))


def _visible(static: _Static, q_tokens: Any, kv_tokens: Any) -> Array:
    """One side is a row ``[2, n]``, the other columns ``[2, m, lanes]``; gives ``[m, n]``."""
    rows = kv_tokens if len(q_tokens.shape) == 3 else q_tokens
    columns = q_tokens if len(q_tokens.shape) == 3 else kv_tokens
    shape = columns.shape[1], rows.shape[1]

    def whole(tokens: Any, which: int) -> Array:
        if len(tokens.shape) == 3:
            return _widen(tokens[which], shape[1])
        return jnp.broadcast_to(tokens[which : which + 1], shape)

    sides = q_tokens, kv_tokens
    return static.rule(*(whole(side, which) for which in (0, 1) for side in sides))


def _columns(rows: Any, shape: tuple[int, ...]) -> Array:
    """Rows ``[c, n]`` as columns ``[c, n, lanes]``, equal along lanes."""
    turned = (jnp.broadcast_to(rows[i : i + 1], shape[:0:-1]).T for i in range(shape[0]))
    return jnp.stack(tuple(turned))


def _widen(x: Array, width: int) -> Array:
    """``[n, lanes]``, equal along lanes, as ``[n, width]``."""
    if width <= x.shape[1]:
        return x[:, :width]
    if width % x.shape[1]:
        return jnp.broadcast_to(x[:, :1], (x.shape[0], width))
    return jnp.tile(x, (1, width // x.shape[1]))


def _sum_of_lanes(x: Array, lanes: int) -> Array:
    """Sums columns that are ``lanes`` apart: whole registers, nothing across lanes."""
    parts = [x[:, start : start + lanes] for start in range(0, x.shape[1], lanes)]
    return functools.reduce(jnp.add, parts)

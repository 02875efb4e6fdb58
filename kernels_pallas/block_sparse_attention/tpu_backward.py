"""The backward kernels: one for all gradients, or two where those of the queries overflow VMEM.

Scores are recomputed. What walks along columns has keys on sublanes and queries on
lanes, so that only the product for the queries turns a matrix of scores.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels_pallas.block_sparse_attention import pairs
from kernels_pallas.block_sparse_attention import tpu_tiles as tiles
from kernels_pallas.block_sparse_attention.tpu_operands import (
    LANES,
    VMEM_BYTES,
    Operands,
    Specs,
    Static,
)

# What the gradients of the queries of a group of heads may take of VMEM, of 64 MiB or more.
_RESIDENT_BYTES = 24 << 20


def fits(operands: Operands) -> bool:
    """Whether one kernel can hold the gradients of all queries that share a key head."""
    _, heads, queries, width = operands.q.shape
    group = heads // operands.k.shape[1]
    lanes = -(-width // LANES) * LANES
    twice = 2  # for the pipeline
    return twice * 4 * group * queries * lanes <= _RESIDENT_BYTES


def by_columns(
    static: Static,
    listed: pairs.Listed,
    operands: Operands,
    cotangent: Array,
    per_query: Array,
    *,
    queries: bool,
) -> tuple[Array | None, Array, Array]:
    """Gradients by queries (float32, up to ``scale``; None unless asked for), keys and values."""
    specs = Specs(static, listed, operands, by_rows=False)
    rows, group = static.block_k, specs.group
    of_queries = jax.ShapeDtypeStruct(operands.q.shape, jnp.float32) if queries else None
    return pl.pallas_call(
        functools.partial(_by_columns_kernel, static=static, count=specs.pairs, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(specs.batch, specs.kv_heads, specs.steps, group),
            in_specs=[*specs.all(), specs.vectors(queries=True), specs.per_query(2)],
            out_specs=[
                specs.per_group() if queries else None,
                *[specs.vectors(queries=False)] * 2,
            ],
            scratch_shapes=[
                pltpu.VMEM((rows, specs.width), jnp.float32),
                pltpu.VMEM((rows, specs.width), jnp.float32),
                pltpu.VMEM((rows, math.gcd(static.block_q, LANES)), jnp.int32),
            ],
        ),
        out_shape=[
            of_queries,
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (operands.k, operands.v)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=static.interpret,
        name="block_sparse_attention_backward" + ("" if queries else "_kv"),
    )(listed.entries, *operands, cotangent, per_query)


def _by_columns_kernel(
    entries,
    q_tokens,
    kv_tokens,
    q,
    k,
    v,
    cotangent,
    per_query,
    to_q,
    to_k,
    to_v,
    accumulated_k,
    accumulated_v,
    kv_positions,
    *,
    static: Static,
    count: int,
    group: int,
):
    """Keys on sublanes, queries on lanes; heads of a group one after the other at each pair."""
    entry = entries[pl.program_id(0) * count + pl.program_id(2)]
    head = pl.program_id(3)
    queries = tiles.span(pairs.inner(entry), static.block_q)
    keys = tiles.span(pairs.outer(entry), static.block_k)

    if to_q is not None:

        @pl.when((pl.program_id(2) == 0) & (head == 0))
        def _():
            to_q[...] = jnp.zeros_like(to_q)

    @pl.when((entry & pairs.FIRST != 0) & (head == 0))
    def _():
        accumulated_k[...] = jnp.zeros_like(accumulated_k)
        accumulated_v[...] = jnp.zeros_like(accumulated_v)

    @pl.when((entry & pairs.TURN != 0) & (head == 0))
    def _():
        kv_positions[...] = tiles.column(kv_tokens[:1, keys], kv_positions.shape[1])

    def accumulate(masks: tiles.Masks):
        scores = tiles.scores(static, tiles.product_nt(k[...], q[...]))
        columns = tiles.Side.of_columns(kv_positions, kv_tokens, keys)
        shown = tiles.shown(static, masks, scores, tiles.Side.of_rows(q_tokens, queries), columns)
        weights = jnp.exp2(shown - per_query[head, :1, queries])
        accumulated_v[...] += tiles.product_nn(weights.astype(cotangent.dtype), cotangent[...])
        by_weights = tiles.product_nt(v[...], cotangent[...])
        slopes = weights * (by_weights - per_query[head, 1:, queries])
        by_scores = tiles.by_products(static, slopes, scores).astype(q.dtype)
        accumulated_k[...] += tiles.product_nn(by_scores, q[...])
        if to_q is not None:
            to_q[head, queries] += tiles.product_tn(by_scores, k[...])

    tiles.for_live(static, entry, accumulate)

    @pl.when((entry & pairs.LAST != 0) & (head == group - 1))
    def _():
        to_k[...] = (accumulated_k[...] * static.scale).astype(to_k.dtype)
        to_v[...] = accumulated_v[...].astype(to_v.dtype)


def by_queries(
    static: Static, listed: pairs.Listed, operands: Operands, cotangent: Array, per_query: Array
) -> Array:
    """Gradient by the queries, along rows."""
    specs = Specs(static, listed, operands, by_rows=True)
    lanes = math.gcd(static.block_k, LANES)
    rows = static.block_q
    return pl.pallas_call(
        functools.partial(_by_queries_kernel, static=static, count=specs.pairs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(specs.batch, specs.heads, specs.steps),
            in_specs=[*specs.all(), specs.vectors(queries=True), specs.per_query(2)],
            out_specs=specs.vectors(queries=True),
            scratch_shapes=[
                pltpu.VMEM((rows, specs.width), jnp.float32),
                pltpu.VMEM((2, rows, lanes), jnp.float32),
                pltpu.VMEM((rows, lanes), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=static.interpret,
        name="block_sparse_attention_backward_q",
    )(listed.entries, *operands, cotangent, per_query)


def _by_queries_kernel(
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
    statistics,
    q_positions,
    *,
    static: Static,
    count: int,
):
    entry = entries[pl.program_id(0) * count + pl.program_id(2)]
    queries = tiles.span(pairs.outer(entry), static.block_q)
    keys = tiles.span(pairs.inner(entry), static.block_k)

    @pl.when(entry & pairs.FIRST != 0)
    def _():
        accumulated[...] = jnp.zeros_like(accumulated)
        for i in range(2):
            row = per_query[0, i : i + 1, queries]
            statistics[i] = tiles.column(row, statistics.shape[2])

    @pl.when(entry & pairs.TURN != 0)
    def _():
        q_positions[...] = tiles.column(q_tokens[:1, queries], q_positions.shape[1])

    def accumulate(masks: tiles.Masks):
        scores = tiles.scores(static, tiles.product_nt(q[...], k[...]))
        width = scores.shape[1]
        columns = tiles.Side.of_columns(q_positions, q_tokens, queries)
        rows = tiles.Side.of_rows(kv_tokens, keys)
        shown = tiles.shown(static, masks, scores, columns, rows)
        weights = jnp.exp2(shown - tiles.widen(statistics[0], width))
        by_weights = tiles.product_nt(cotangent[...], v[...])
        by_scores = weights * (by_weights - tiles.widen(statistics[1], width))
        by_scores = tiles.by_products(static, by_scores, scores)
        accumulated[...] += tiles.product_nn(by_scores.astype(k.dtype), k[...])

    tiles.for_live(static, entry, accumulate)

    @pl.when(entry & pairs.LAST != 0)
    def _():
        to_q[...] = (accumulated[...] * static.scale).astype(to_q.dtype)

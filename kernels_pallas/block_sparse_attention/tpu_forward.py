"""The forward kernel: queries on sublanes, keys on lanes."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels_pallas.block_sparse_attention import pairs
from kernels_pallas.block_sparse_attention import tpu_tiles as tiles
from kernels_pallas.block_sparse_attention.specs import NOTHING
from kernels_pallas.block_sparse_attention.tpu_operands import (
    LANES,
    VMEM_BYTES,
    Operands,
    Specs,
    Static,
)


def run(static: Static, listed: pairs.Listed, operands: Operands) -> tuple[Array, Array]:
    """Results ``[B, H, T, E]`` and log-sum-exps ``[B, H, 1, T]``, along rows."""
    specs = Specs(static, listed, operands, by_rows=True)
    lanes = math.gcd(static.block_k, LANES)
    rows = static.block_q
    return pl.pallas_call(
        functools.partial(_kernel, static=static, count=specs.pairs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(specs.batch, specs.heads, specs.steps),
            in_specs=specs.all(),
            out_specs=[specs.vectors(queries=True), specs.per_query(1)],
            scratch_shapes=[
                pltpu.VMEM((rows, lanes), jnp.float32),
                pltpu.VMEM((rows, lanes), jnp.float32),
                pltpu.VMEM((rows, specs.width), jnp.float32),
                pltpu.VMEM((rows, lanes), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
            jax.ShapeDtypeStruct((*operands.q.shape[:2], 1, operands.q.shape[2]), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=static.interpret,
        name="block_sparse_attention_forward",
    )(listed.entries, *operands)


def _kernel(
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
    q_positions,
    *,
    static: Static,
    count: int,
):
    """``highest`` is equal along lanes; ``total`` sums over them only at the end.

    ``total`` and ``accumulated`` hold anything until a query has seen a key.
    """
    entry = entries[pl.program_id(0) * count + pl.program_id(2)]
    queries = tiles.span(pairs.outer(entry), static.block_q)
    keys = tiles.span(pairs.inner(entry), static.block_k)
    lanes = highest.shape[1]

    @pl.when(entry & pairs.FIRST != 0)
    def _():
        highest[...] = jnp.full_like(highest, NOTHING)

    @pl.when(entry & pairs.TURN != 0)
    def _():
        q_positions[...] = tiles.column(q_tokens[:1, queries], lanes)

    def accumulate(masks: tiles.Masks):
        scores = tiles.scores(static, tiles.product_nt(q[...], k[...]))
        columns = tiles.Side.of_columns(q_positions, q_tokens, queries)
        rows = tiles.Side.of_rows(kv_tokens, keys)
        scores = tiles.shown(static, masks, scores, columns, rows)
        before = highest[...]
        higher = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - tiles.widen(higher, scores.shape[1]))
        kept = jnp.exp2(before - higher)
        highest[...] = higher
        total[...] = _scaled(total[...], kept) + tiles.sum_of_lanes(weights, lanes)
        block = tiles.product_nn(weights.astype(v.dtype), v[...])
        kept = tiles.widen(kept, block.shape[1])
        accumulated[...] = _scaled(accumulated[...], kept) + block

    tiles.for_live(static, entry, accumulate)

    @pl.when(entry & pairs.LAST != 0)
    def _():
        summed = jnp.sum(total[...], axis=1, keepdims=True)
        best, rows = highest[...], jnp.broadcast_to(summed, highest.shape)
        seen = best > NOTHING
        inverse = jnp.where(seen, 1.0 / summed, 0.0)
        inverse = tiles.widen(inverse, accumulated.shape[1])
        out[...] = _scaled(accumulated[...], inverse).astype(out.dtype)
        log_sum_exp[0, :, queries] = _log_sum_exp(tiles.row(best), tiles.row(rows))


def _log_sum_exp(best: Array, summed: Array) -> Array:
    """To base e, of what was summed relative to the best score, to base 2."""
    return jnp.where(best > NOTHING, (best + jnp.log2(summed)) * math.log(2.0), NOTHING)


def _scaled(x: Array, factor: Array) -> Array:
    """``x · factor``, and 0 for a factor of 0, whatever ``x`` holds."""
    return jnp.where(factor > 0.0, x * factor, 0.0)

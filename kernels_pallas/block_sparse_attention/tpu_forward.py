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


def run(static: Static, entries: Array, operands: Operands) -> tuple[Array, Array]:
    """Results ``[B, H, T, E]`` and log-sum-exps ``[B, H, 1, T]``, along rows."""
    specs = Specs(static, entries, operands, by_rows=True)
    lanes = math.gcd(static.block_k, LANES)
    rows = static.block_q
    return pl.pallas_call(
        functools.partial(_kernel, static=static, count=specs.pairs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(specs.batch, specs.heads, specs.pairs),
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
    )(entries, *operands)


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
    """``highest`` is equal along lanes; ``total`` sums over them only at the end."""
    entry = entries[pl.program_id(0) * count + pl.program_id(2)]
    queries = tiles.span(pairs.outer(entry), static.block_q)
    keys = tiles.span(pairs.inner(entry), static.block_k)

    @pl.when(entry & pairs.FIRST != 0)
    def _():
        highest[...] = jnp.full_like(highest, NOTHING)
        total[...] = jnp.zeros_like(total)
        accumulated[...] = jnp.zeros_like(accumulated)
        q_positions[...] = tiles.column(q_tokens[:1, queries], q_positions.shape[1])

    def accumulate(masks: tiles.Masks):
        scores = tiles.scores(static, tiles.product_nt(q[...], k[...]))
        columns = tiles.Side(
            q_positions[...], lambda: tiles.column(q_tokens[1:, queries], q_positions.shape[1])
        )
        rows = tiles.Side(kv_tokens[:1, keys], lambda: kv_tokens[1:, keys])
        scores = tiles.shown(static, masks, scores, columns, rows)
        before = highest[...]
        higher = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - tiles.widen(higher, scores.shape[1]))
        kept = jnp.exp2(before - higher)
        highest[...] = higher
        total[...] = total[...] * kept + tiles.sum_of_lanes(weights, total.shape[1])
        block = tiles.product_nn(weights.astype(v.dtype), v[...])
        accumulated[...] = accumulated[...] * tiles.widen(kept, block.shape[1]) + block

    tiles.for_live(static, entry, accumulate)

    @pl.when(entry & pairs.LAST != 0)
    def _():
        summed = jnp.sum(total[...], axis=1, keepdims=True)
        summed = jnp.where(summed > 0, summed, 1.0)
        out[...] = (accumulated[...] / summed).astype(out.dtype)
        rows = (highest[...] + jnp.log2(summed)) * math.log(2.0)
        # NOTHING was never scaled to base 2.
        rows = jnp.where(highest[...] > NOTHING, rows, NOTHING)
        log_sum_exp[0, :, queries] = rows.T[:1]

"""The forward kernel for Hopper; its parts are those of ``gpu_tiles``."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels_pallas.block_sparse_attention import gpu_tiles as parts
from kernels_pallas.block_sparse_attention.gpu_tiles import ROWS, Place, Sides, Static
from kernels_pallas.block_sparse_attention.specs import NOTHING


def forward(static: Static, sides: Sides) -> tuple[Float[Array, "B T H E"], Float[Array, "B H T"]]:
    """Attention, and its log-sum-exp."""
    batch, queries, heads, width = sides.q.shape
    outer, inner, slots = static.tiles
    groups, dtype = outer // ROWS, sides.q.dtype
    run = parts.kernel(
        _kernel,
        static,
        name="block_sparse_attention_forward",
        grid=(heads, queries // outer, batch),
        computing=groups,
        out_type=(
            jax.ShapeDtypeStruct(sides.q.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ),
        scratch_types=(
            parts.tiled((groups, ROWS, width), dtype),
            parts.tiled((slots, inner, width), dtype),
            parts.tiled((slots, inner, width), dtype),
            plgpu.SMEM((groups, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups, num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups, num_barriers=slots),
        ),
    )
    return run(*sides)


def _kernel(
    inner,
    bounds,
    q_tokens,
    kv_tokens,
    q,
    k,
    v,
    out,
    log_sum_exp,
    q_tile,
    k_tiles,
    v_tiles,
    log_sum_exp_tile,
    q_ready,
    k_ready,
    v_ready,
    k_free,
    v_free,
    *,
    static: Static,
):
    at, tiles = Place.here(bounds, repeat=1, last_first=True), static.tiles
    groups = tiles.outer // ROWS

    @pl.when(at.group == groups)
    def _copies():
        parts.set_registers(groups, copies=True)
        for i in range(groups):
            rows = pl.ds(at.tile * tiles.outer + i * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q.at[at.batch, rows, at.head], q_tile.at[i], q_ready)

        def copy(step, slot, of, to, ready):
            source = at.batch, at.inner_rows(inner, step, tiles.inner), at.key_head(static.group)
            plgpu.copy_gmem_to_smem(of.at[source], to.at[slot], ready.at[slot])

        at.copy_each(
            tiles.slots,
            (k_free, functools.partial(copy, of=k, to=k_tiles, ready=k_ready)),
            (v_free, functools.partial(copy, of=v, to=v_tiles, ready=v_ready)),
        )

    @pl.when(at.group < groups)
    def _computes():
        parts.set_registers(groups, copies=False)
        own = pl.ds(at.tile * tiles.outer + at.group * ROWS, ROWS)
        own_tokens = parts.tokens(q_tokens, at.batch, own, parts.BY_ROW)
        own_tile = q_tile.at[at.group]
        plgpu.barrier_wait(q_ready)

        def visit(step, running, *, masked: bool):
            slot = parts.slot_of(step, tiles.slots)
            plgpu.barrier_wait(k_ready.at[slot])
            (products,) = parts.products_nt(([own_tile], [k_tiles.at[slot]]))
            plgpu.barrier_arrive(k_free.at[slot])
            scores = parts.scores(static, products)
            if masked:
                rows = at.inner_rows(inner, step, tiles.inner)
                tokens = parts.tokens(kv_tokens, at.batch, rows, parts.BY_COLUMN)
                visible = parts.visible(
                    static.rule, own_tokens, tokens, scores.shape, rows_are_queries=True
                )
                scores = jnp.where(visible, scores, parts.NEVER)
            (accumulated, *statistics), weights = _make_room(running, scores)
            plgpu.barrier_wait(v_ready.at[slot])
            accumulated = parts.plus_product(accumulated, weights.astype(v.dtype), v_tiles.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return accumulated, *statistics

        running = (
            parts.filled((ROWS, q.shape[3]), 0.0, plgpu.Layout.WGMMA),
            parts.filled((ROWS,), NOTHING, parts.BY_ROW),
            parts.filled((ROWS,), 0.0, parts.BY_ROW),
        )
        own_tile[...], log_sum_exp_tile.at[at.group][...] = _results(
            at.for_each(visit, running), out.dtype
        )
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_tile, out.at[at.batch, own, at.head])
        plgpu.copy_smem_to_gmem(
            log_sum_exp_tile.at[at.group], log_sum_exp.at[at.batch, at.head, own]
        )
        plgpu.wait_smem_to_gmem(0)


def _make_room(running: Any, scores: Array) -> tuple[tuple[Array, Array, Array], Array]:
    """A step of the online softmax before its product: what was summed, scaled; the weights."""
    accumulated, highest, total = running
    higher = jnp.maximum(highest, jnp.max(scores, axis=1))
    kept = jnp.exp2(highest - higher)
    weights = jnp.exp2(scores - parts.along_rows(higher, scores.shape))
    accumulated = accumulated * parts.along_rows(kept, accumulated.shape)
    return (accumulated, higher, total * kept + jnp.sum(weights, axis=1)), weights


def _results(running: Any, dtype: Any) -> tuple[Array, Array]:
    accumulated, highest, total = running
    total = jnp.where(total > 0, total, 1.0)
    out = accumulated * parts.along_rows(1.0 / total, accumulated.shape)
    # NOTHING was never scaled to base 2.
    log_sum_exp = highest * math.log(2.0) + jnp.log(total)
    return out.astype(dtype), jnp.where(highest > NOTHING, log_sum_exp, NOTHING)

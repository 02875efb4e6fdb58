"""The forward kernel for Hopper; its parts are those of ``gpu_tiles``."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels_pallas.block_sparse_attention import gpu_tiles as parts
from kernels_pallas.block_sparse_attention.gpu_tiles import ROWS, Place, Sides, Static
from kernels_pallas.block_sparse_attention.specs import NOTHING
from kernels_pallas.common import hopper


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
            hopper.tiled((groups, ROWS, width), dtype),
            hopper.tiled((slots, inner, width), dtype),
            hopper.tiled((slots, inner, width), dtype),
            plgpu.SMEM((groups, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups, num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups, num_barriers=slots),
        ),
    )
    return run(*sides)


class _Refs(NamedTuple):
    """Operands, results, shared memory and barriers, in the kernel's order."""

    inner: Any
    bounds: Any
    q_tokens: Any
    kv_tokens: Any
    q: Any
    k: Any
    v: Any
    out: Any
    log_sum_exp: Any
    q_tile: Any
    k_tiles: Any
    v_tiles: Any
    log_sum_exp_tile: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any


def _kernel(*arguments: Any, static: Static) -> None:
    refs = _Refs(*arguments)
    at, groups = Place.here(refs.bounds, repeat=1, last_first=True), static.tiles.outer // ROWS
    pl.when(at.group == groups)(functools.partial(_copy, refs, at, static))
    pl.when(at.group < groups)(functools.partial(_compute, refs, at, static))


def _copy(refs: _Refs, at: Place, static: Static) -> None:
    tiles, groups = static.tiles, static.tiles.outer // ROWS
    parts.set_registers(groups, copies=True)
    for i in range(groups):
        rows = pl.ds(at.tile * tiles.outer + i * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(refs.q.at[at.batch, rows, at.head], refs.q_tile.at[i], refs.q_ready)

    def copy(step, slot, of, to, ready):
        source = at.batch, at.inner_rows(refs.inner, step, tiles.inner), at.key_head(static.group)
        plgpu.copy_gmem_to_smem(of.at[source], to.at[slot], ready.at[slot])

    hopper.copy_each(
        at.steps,
        tiles.slots,
        (refs.k_free, functools.partial(copy, of=refs.k, to=refs.k_tiles, ready=refs.k_ready)),
        (refs.v_free, functools.partial(copy, of=refs.v, to=refs.v_tiles, ready=refs.v_ready)),
    )


def _compute(refs: _Refs, at: Place, static: Static) -> None:
    tiles, groups = static.tiles, static.tiles.outer // ROWS
    parts.set_registers(groups, copies=False)
    own = pl.ds(at.tile * tiles.outer + at.group * ROWS, ROWS)
    own_tokens = parts.tokens(refs.q_tokens, at.batch, own, parts.BY_ROW)
    own_tile = refs.q_tile.at[at.group]
    plgpu.barrier_wait(refs.q_ready)

    def visit(step, running, *, masked: bool):
        slot = hopper.slot_of(step, tiles.slots)
        plgpu.barrier_wait(refs.k_ready.at[slot])
        (products,) = parts.products_nt(([own_tile], [refs.k_tiles.at[slot]]))
        plgpu.barrier_arrive(refs.k_free.at[slot])
        scores = parts.scores(static, products)
        if masked:
            visible = at.visible(
                static, refs.inner, refs.kv_tokens, step, own_tokens, scores.shape,
                rows_are_queries=True,
            )  # fmt: skip
            scores = jnp.where(visible, scores, parts.NEVER)
        (accumulated, *statistics), weights = _make_room(running, scores)
        plgpu.barrier_wait(refs.v_ready.at[slot])
        accumulated = parts.plus_product(
            accumulated, weights.astype(refs.v.dtype), refs.v_tiles.at[slot]
        )
        plgpu.barrier_arrive(refs.v_free.at[slot])
        return accumulated, *statistics

    running = (
        parts.filled((ROWS, refs.q.shape[3]), 0.0, plgpu.Layout.WGMMA),
        parts.filled((ROWS,), NOTHING, parts.BY_ROW),
        parts.filled((ROWS,), 0.0, parts.BY_ROW),
    )
    own_tile[...], refs.log_sum_exp_tile.at[at.group][...] = _results(
        at.for_each(visit, running), refs.out.dtype
    )
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own_tile, refs.out.at[at.batch, own, at.head])
    plgpu.copy_smem_to_gmem(
        refs.log_sum_exp_tile.at[at.group], refs.log_sum_exp.at[at.batch, at.head, own]
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

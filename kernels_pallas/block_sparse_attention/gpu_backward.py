"""The backward kernels for Hopper; their parts are those of ``gpu_tiles``.

Both recompute the probabilities. ``per_query`` has each query's log-sum-exp in base 2 and what is
subtracted from the gradients by its scores (``operands.inner_products``).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels_pallas.block_sparse_attention import gpu_tiles as parts
from kernels_pallas.block_sparse_attention.gpu_tiles import ROWS, Place, Sides, Static
from kernels_pallas.common import hopper

# Columns of the two gradients of keys and values that a warpgroup has registers for.
_PART = 128


def backward_q(
    static: Static,
    sides: Sides,
    cotangent: Float[Array, "B T H E"],
    per_query: Float[Array, "B H 2 T"],
) -> Float[Array, "B T H E"]:
    """The gradient by the queries."""
    batch, queries, heads, width = sides.q.shape
    outer, inner, slots = static.tiles
    groups, dtype = outer // ROWS, sides.q.dtype
    run = parts.kernel(
        _kernel_q,
        static,
        name="block_sparse_attention_backward_q",
        grid=(heads, queries // outer, batch),
        computing=groups,
        out_type=jax.ShapeDtypeStruct(sides.q.shape, dtype),
        scratch_types=(
            hopper.tiled((groups, ROWS, width), dtype),
            hopper.tiled((groups, ROWS, width), dtype),
            hopper.tiled((slots, inner, width), dtype),
            hopper.tiled((slots, inner, width), dtype),
            plgpu.Barrier(num_arrivals=2 * groups),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.Barrier(num_arrivals=groups, num_barriers=slots),
        ),
    )
    return run(*sides, cotangent, per_query)


def backward_kv(
    static: Static,
    sides: Sides,
    cotangent: Float[Array, "B T H E"],
    per_query: Float[Array, "B H 2 T"],
) -> tuple[Float[Array, "B S K E"], Float[Array, "B S K E"]]:
    """The gradients by the keys and by the values."""
    batch, keys, kv_heads, width = sides.k.shape
    outer, inner, slots = static.tiles
    part = min(width, _PART)
    pieces, groups, dtype = width // part, outer // ROWS, sides.k.dtype
    computing = groups * pieces
    run = parts.kernel(
        _kernel_kv,
        static,
        name="block_sparse_attention_backward_kv",
        grid=(kv_heads, keys // outer, batch),
        computing=computing,
        out_type=[jax.ShapeDtypeStruct(sides.k.shape, dtype)] * 2,
        scratch_types=(
            hopper.tiled((groups, pieces, ROWS, part), dtype),
            hopper.tiled((groups, pieces, ROWS, part), dtype),
            hopper.tiled((slots, pieces, inner, part), dtype),
            hopper.tiled((slots, pieces, inner, part), dtype),
            plgpu.SMEM((slots, 2, inner), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * computing),
            plgpu.Barrier(num_arrivals=2 * pieces + 2, num_barriers=slots),
            plgpu.Barrier(num_arrivals=computing, num_barriers=slots),
            plgpu.Barrier(num_arrivals=computing),
        ),
    )
    to_k, to_v = run(*sides, cotangent, per_query)
    return to_k, to_v


class _RefsQ(NamedTuple):
    """Operands, result, shared memory and barriers, in the kernel's order."""

    inner: Any
    bounds: Any
    q_tokens: Any
    kv_tokens: Any
    q: Any
    k: Any
    v: Any
    cotangent: Any
    per_query: Any
    to_q: Any
    q_tile: Any
    cotangent_tile: Any
    k_tiles: Any
    v_tiles: Any
    own_ready: Any
    ready: Any
    free: Any


def _kernel_q(*arguments: Any, static: Static) -> None:
    refs = _RefsQ(*arguments)
    at, groups = Place.here(refs.bounds, repeat=1, last_first=True), static.tiles.outer // ROWS
    pl.when(at.group == groups)(functools.partial(_copy_q, refs, at, static))
    pl.when(at.group < groups)(functools.partial(_compute_q, refs, at, static))


def _copy_q(refs: _RefsQ, at: Place, static: Static) -> None:
    tiles, groups = static.tiles, static.tiles.outer // ROWS
    parts.set_registers(groups, copies=True)
    for i in range(groups):
        own = at.batch, pl.ds(at.tile * tiles.outer + i * ROWS, ROWS), at.head
        plgpu.copy_gmem_to_smem(refs.q.at[own], refs.q_tile.at[i], refs.own_ready)
        plgpu.copy_gmem_to_smem(refs.cotangent.at[own], refs.cotangent_tile.at[i], refs.own_ready)

    def copy(step, slot):
        source = at.batch, at.inner_rows(refs.inner, step, tiles.inner), at.key_head(static.group)
        plgpu.copy_gmem_to_smem(refs.k.at[source], refs.k_tiles.at[slot], refs.ready.at[slot])
        plgpu.copy_gmem_to_smem(refs.v.at[source], refs.v_tiles.at[slot], refs.ready.at[slot])

    hopper.copy_each(at.steps, tiles.slots, (refs.free, copy))


def _compute_q(refs: _RefsQ, at: Place, static: Static) -> None:
    tiles, groups = static.tiles, static.tiles.outer // ROWS
    parts.set_registers(groups, copies=False)
    own = pl.ds(at.tile * tiles.outer + at.group * ROWS, ROWS)
    own_tokens = parts.tokens(refs.q_tokens, at.batch, own, parts.BY_ROW)
    log_sum_exp, subtracted = (
        hopper.load(refs.per_query.at[at.batch, at.head, i, own], parts.BY_ROW) for i in (0, 1)
    )
    plgpu.barrier_wait(refs.own_ready)

    def visit(step, total, *, masked: bool):
        slot = hopper.slot_of(step, tiles.slots)
        plgpu.barrier_wait(refs.ready.at[slot])
        group = parts.anew(at.group)
        products, by_weights = parts.products_nt(
            ([refs.q_tile.at[group]], [refs.k_tiles.at[slot]]),
            ([refs.cotangent_tile.at[group]], [refs.v_tiles.at[slot]]),
        )
        scores = parts.scores(static, products)
        weights = jnp.exp2(scores - parts.along_rows(log_sum_exp, scores.shape))
        if masked:
            visible = at.visible(
                static, refs.inner, refs.kv_tokens, step, own_tokens, scores.shape,
                rows_are_queries=True,
            )  # fmt: skip
            weights = jnp.where(visible, weights, 0.0)
        slopes = parts.slopes(static, weights, scores)
        by_products = slopes * (by_weights - parts.along_rows(subtracted, scores.shape))
        total = parts.plus_product(total, by_products.astype(refs.k.dtype), refs.k_tiles.at[slot])
        plgpu.barrier_arrive(refs.free.at[slot])
        return total

    total = at.for_each(visit, parts.filled((ROWS, refs.q.shape[3]), 0.0, plgpu.Layout.WGMMA))
    refs.q_tile[at.group] = (total * static.scale).astype(refs.to_q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(refs.q_tile.at[at.group], refs.to_q.at[at.batch, own, at.head])
    plgpu.wait_smem_to_gmem(0)


class _RefsKV(NamedTuple):
    """Operands, results, shared memory and barriers, in the kernel's order."""

    inner: Any
    bounds: Any
    q_tokens: Any
    kv_tokens: Any
    q: Any
    k: Any
    v: Any
    cotangent: Any
    per_query: Any
    to_k: Any
    to_v: Any
    k_tile: Any
    v_tile: Any
    q_tiles: Any
    cotangent_tiles: Any
    per_query_tiles: Any
    own_ready: Any
    ready: Any
    free: Any
    done: Any


def _kernel_kv(*arguments: Any, static: Static) -> None:
    """Keys are rows, queries columns; heads of a group one after the other at each pair.

    Where a head is wider than a part, two warpgroups have the same rows: both compute the scores,
    and each accumulates the gradients of its part of the columns.
    """
    refs = _RefsKV(*arguments)
    at = Place.here(refs.bounds, repeat=static.group, last_first=False)
    groups, pieces = refs.k_tile.shape[:2]
    pl.when(at.group == groups * pieces)(functools.partial(_copy_kv, refs, at, static))
    pl.when(at.group < groups * pieces)(functools.partial(_compute_kv, refs, at, static))


def _copy_kv(refs: _RefsKV, at: Place, static: Static) -> None:
    tiles, (groups, pieces, _, part) = static.tiles, refs.k_tile.shape
    parts.set_registers(groups * pieces, copies=True)
    for i in range(groups):
        rows = pl.ds(at.tile * tiles.outer + i * ROWS, ROWS)
        for j in range(pieces):
            own = at.batch, rows, at.head, pl.ds(j * part, part)
            plgpu.copy_gmem_to_smem(refs.k.at[own], refs.k_tile.at[i, j], refs.own_ready)
            plgpu.copy_gmem_to_smem(refs.v.at[own], refs.v_tile.at[i, j], refs.own_ready)

    def copy(step, slot):
        rows, head = at.inner_rows(refs.inner, step, tiles.inner), at.inner_head(step)
        to = refs.ready.at[slot]
        for j in range(pieces):
            source = at.batch, rows, head, pl.ds(j * part, part)
            plgpu.copy_gmem_to_smem(refs.q.at[source], refs.q_tiles.at[slot, j], to)
            plgpu.copy_gmem_to_smem(refs.cotangent.at[source], refs.cotangent_tiles.at[slot, j], to)
        for i in (0, 1):
            source = at.batch, head, i, rows
            plgpu.copy_gmem_to_smem(refs.per_query.at[source], refs.per_query_tiles.at[slot, i], to)

    hopper.copy_each(at.steps, tiles.slots, (refs.free, copy))


def _compute_kv(refs: _RefsKV, at: Place, static: Static) -> None:
    tiles, (groups, pieces, _, part) = static.tiles, refs.k_tile.shape
    parts.set_registers(groups * pieces, copies=False)
    own_rows = lax.div(at.group, jnp.int32(pieces))
    own_part = lax.rem(at.group, jnp.int32(pieces))
    rows = pl.ds(at.tile * tiles.outer + own_rows * ROWS, ROWS)
    own_tokens = parts.tokens(refs.kv_tokens, at.batch, rows, parts.BY_ROW)
    plgpu.barrier_wait(refs.own_ready)

    def visit(step, totals, *, masked: bool):
        slot = hopper.slot_of(step, tiles.slots)
        plgpu.barrier_wait(refs.ready.at[slot])

        def visible(shape):
            return at.visible(
                static, refs.inner, refs.q_tokens, step, own_tokens, shape, rows_are_queries=False
            )

        held = parts.anew(own_rows)
        totals = _plus_gradients(
            static,
            totals,
            k=[refs.k_tile.at[held, j] for j in range(pieces)],
            v=[refs.v_tile.at[held, j] for j in range(pieces)],
            q=[refs.q_tiles.at[slot, j] for j in range(pieces)],
            cotangent=[refs.cotangent_tiles.at[slot, j] for j in range(pieces)],
            q_part=refs.q_tiles.at[slot, own_part],
            cotangent_part=refs.cotangent_tiles.at[slot, own_part],
            per_query=refs.per_query_tiles.at[slot],
            visible=visible if masked else None,
        )
        # Copies go by another way to memory than the loads of statistics; these end first.
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.free.at[slot])
        return totals

    zeros = parts.filled((ROWS, part), 0.0, plgpu.Layout.WGMMA)
    by_k, by_v = at.for_each(visit, (zeros, zeros))
    # Another warpgroup may still read these rows.
    plgpu.barrier_arrive(refs.done)
    plgpu.barrier_wait(refs.done)
    refs.k_tile[own_rows, own_part] = (by_k * static.scale).astype(refs.to_k.dtype)
    refs.v_tile[own_rows, own_part] = by_v.astype(refs.to_v.dtype)
    plgpu.commit_smem()
    to = at.batch, rows, at.head, pl.ds(own_part * part, part)
    plgpu.copy_smem_to_gmem(refs.k_tile.at[own_rows, own_part], refs.to_k.at[to])
    plgpu.copy_smem_to_gmem(refs.v_tile.at[own_rows, own_part], refs.to_v.at[to])
    plgpu.wait_smem_to_gmem(0)


def _plus_gradients(
    static: Static,
    totals: tuple[Array, Array],
    *,
    k: list[Any],
    v: list[Any],
    q: list[Any],
    cotangent: list[Any],
    q_part: Any,
    cotangent_part: Any,
    per_query: Any,
    visible: Any,
) -> tuple[Array, Array]:
    """By keys and by values, of one more tile of queries; lists are parts of the width."""
    by_k, by_v = totals
    (products,) = parts.products_nt((k, q))
    scores = parts.scores(static, products)
    log_sum_exp, subtracted = (hopper.load(per_query.at[i], parts.BY_COLUMN) for i in (0, 1))
    weights = jnp.exp2(scores - parts.along_columns(log_sum_exp, scores.shape))
    if visible is not None:
        weights = jnp.where(visible(scores.shape), weights, 0.0)
    slopes = parts.slopes(static, weights, scores)
    by_v = parts.plus_product(by_v, weights.astype(q_part.dtype), cotangent_part)
    # Not together with the first product: there are no registers for both.
    (by_weights,) = parts.products_nt((v, cotangent))
    by_products = slopes * (by_weights - parts.along_columns(subtracted, scores.shape))
    return parts.plus_product(by_k, by_products.astype(q_part.dtype), q_part), by_v

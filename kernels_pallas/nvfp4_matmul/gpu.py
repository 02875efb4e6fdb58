"""A few tokens times packed codes, in Pallas for Mosaic-GPU: tensor cores of Hopper.

Columns of the weight are rows of the tensor cores' left side, which is in registers; the tokens are
the eight columns of the right side, in shared memory. So codes become numbers where they are
multiplied, and each byte of the weight is copied once, whatever the number of tokens.

Contracted positions may be summed in any order. An instruction takes one position of each of 16
*blocks*: so the scales of a tile are an array of the shape of its codes, and serve all 16 positions
of a block. The last 16 blocks may overlap those before them; tokens are zero where they do.

The bits of E2M1 are those of a float16 that is 2^-14 of it, the smallest too, and a code times a
scale is exact in float16: one product of two float16 scales a code, and the results are multiplied
by 2^14. A thread block has two warpgroups that compute, each half the positions of a block, and one
that copies into a ring of slots. The contraction is split where columns are too few to fill a GPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, UInt8

from kernels_pallas.common import hopper
from kernels_pallas.nvfp4_matmul.codes import BLOCK
from kernels_pallas.nvfp4_matmul.ref import dequantised
from kernels_pallas.nvfp4_matmul.specs import MOST_ROWS, Nvfp4MatmulConfig

# Blocks that are multiplied at a time: the depth of an instruction.
_DEPTH = 16
_PAIRS = BLOCK // 2
_COMPUTING = 2
_SLOTS = 4
# Thread blocks that run at a time: two on each of an H100's multiprocessors.
_AT_ONCE = 264
_SPLIT, _TILE, _THREAD = "split", "tile", "warpgroup"


def supports(
    *,
    x: UInt8[Array, "M P"],
    weight_scales: Float[Array, "G N"],
    config: Nvfp4MatmulConfig,
    **others: object,
) -> str | None:
    """Why this form cannot run, or ``None``."""
    del others
    reason = hopper.needs(config.interpret)
    if reason is not None:
        return reason
    (blocks, columns), chosen = weight_scales.shape, config.block_columns
    if x.shape[0] > MOST_ROWS:
        return f"{x.shape[0]} tokens are more than {MOST_ROWS}"
    if blocks < _DEPTH:
        return f"a contraction of {BLOCK * blocks} is shorter than {BLOCK * _DEPTH}"
    if chosen not in (None, 64, 128):
        return f"block_columns={chosen} is neither 64 nor 128"
    if columns % (chosen or 64):
        return f"{columns} columns are no multiple of {chosen or 64}"
    if weight_scales.dtype != jnp.float8_e4m3fn:
        return f"scales are {weight_scales.dtype}, not float8_e4m3fn"
    return None


def nvfp4_matmul(
    *,
    x: UInt8[Array, "M P"],
    x_scales: Float[Array, "M G"],
    weight: UInt8[Array, "P N"],
    weight_scales: Float[Array, "G N"],
    config: Nvfp4MatmulConfig,
) -> Float[Array, "M N"]:
    """See :func:`kernels_pallas.nvfp4_matmul.nvfp4_matmul`; without ``alpha``, in float32."""
    (blocks, columns), rows = weight_scales.shape, x.shape[0]
    tile = config.block_columns or (128 if columns % 128 == 0 else 64)
    steps = -(-blocks // _DEPTH)
    splits = max(1, min(steps, _AT_ONCE // (columns // tile)))
    # Swizzled, so that threads that read the same columns of several blocks do not wait in line.
    swizzled = {"transforms": (plgpu.SwizzleTransform(tile),)}
    run = plgpu.kernel(
        _kernel,
        grid=(splits, columns // tile),
        grid_names=(_SPLIT, _TILE),
        num_threads=_COMPUTING + 1,
        thread_name=_THREAD,
        kernel_name="nvfp4_matmul",
        interpret=config.interpret or None,
        out_type=jax.ShapeDtypeStruct((splits, columns, MOST_ROWS), jnp.float32),
        scratch_types=(
            plgpu.SMEM((_SLOTS, _PAIRS, _DEPTH, tile), jnp.uint8, **swizzled),
            plgpu.SMEM((_SLOTS, _DEPTH, tile), jnp.uint8, **swizzled),
            hopper.tiled((_SLOTS, BLOCK, MOST_ROWS, _DEPTH), jnp.float16),
            plgpu.SMEM((tile, MOST_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=_PAIRS + 2, num_barriers=_SLOTS),
            plgpu.Barrier(num_arrivals=_COMPUTING, num_barriers=_SLOTS),
            plgpu.Barrier(),
        ),
    )
    sums = run(
        weight.reshape(blocks, _PAIRS, columns),
        lax.bitcast_convert_type(weight_scales, jnp.uint8),
        _tokens(x, x_scales, steps),
    )
    return jnp.sum(sums, axis=0).T[:rows] * 2.0**14


def _first(step: Array, blocks: int) -> Array:
    """The first block of a step."""
    return jnp.minimum(step * _DEPTH, blocks - _DEPTH)


def _tokens(
    x: UInt8[Array, "M P"], scales: Float[Array, "M G"], steps: int
) -> Float[Array, "steps position row block"]:
    """Blocks of each step, zero where an earlier one had them; and rows filled up with zeros."""
    blocks = scales.shape[1]
    values = dequantised(x.T, scales.T).astype(jnp.float16)
    values = jnp.pad(values, ((0, 0), (0, MOST_ROWS - x.shape[0])))
    values = values.reshape(blocks, BLOCK, MOST_ROWS)
    step = jnp.arange(steps)[:, None]
    number = _first(step, blocks) + jnp.arange(_DEPTH)[None]
    fresh = number >= step * _DEPTH
    found = jnp.where(fresh[:, :, None, None], values[number], 0)
    return found.transpose(0, 2, 3, 1)


class _Refs(NamedTuple):
    """Operands, result, shared memory and barriers, in the kernel's order."""

    codes: Any
    scales: Any
    tokens: Any
    out: Any
    code_tiles: Any
    scale_tiles: Any
    token_tiles: Any
    out_tile: Any
    ready: Any
    free: Any
    half_done: Any


def _kernel(*arguments: Any) -> None:
    refs = _Refs(*arguments)
    split, own = lax.axis_index(_SPLIT), lax.axis_index(_THREAD)
    # Of all steps this thread block has those from the first to before the last.
    splits, steps = refs.out.shape[0], refs.tokens.shape[0]
    first = lax.div(split * steps, jnp.int32(splits))
    count = lax.div((split + 1) * steps, jnp.int32(splits)) - first
    pl.when(own == _COMPUTING)(functools.partial(_copy, refs, first, count))
    pl.when(own < _COMPUTING)(functools.partial(_compute, refs, own, count))


def _copy(refs: _Refs, first: Array, count: Array) -> None:
    tile = refs.out_tile.shape[0]
    columns = pl.ds(lax.axis_index(_TILE) * tile, tile)

    def copy(step: Array, slot: Array) -> None:
        blocks = pl.ds(_first(first + step, refs.scales.shape[0]), _DEPTH)
        ready = refs.ready.at[slot]
        for pair in range(_PAIRS):
            plgpu.copy_gmem_to_smem(
                refs.codes.at[blocks, pair, columns], refs.code_tiles.at[slot, pair], ready
            )
        plgpu.copy_gmem_to_smem(refs.scales.at[blocks, columns], refs.scale_tiles.at[slot], ready)
        plgpu.copy_gmem_to_smem(refs.tokens.at[first + step], refs.token_tiles.at[slot], ready)

    hopper.copy_each(count, _SLOTS, (refs.free, copy))


def _compute(refs: _Refs, own: Array, count: Array) -> None:
    tile, pairs = refs.out_tile.shape[0], _PAIRS // _COMPUTING

    def visit(step: Array, total: Array) -> Array:
        slot = hopper.slot_of(step, _SLOTS)
        plgpu.barrier_wait(refs.ready.at[slot])
        scale = _float16(_bytes(refs.scale_tiles.at[slot]) << 7) * jnp.float16(2.0**8)

        def add(number: Array, total: Array) -> Array:
            pair = own * pairs + number
            both = _bytes(refs.code_tiles.at[slot, pair])
            low = (both & 0x7) << 9 | (both & 0x8) << 12
            high = (both & 0x70) << 5 | (both & 0x80) << 8

            def multiply(accumulator: Any) -> Array:
                accumulator[...] = total
                for parity, bits in enumerate((low, high)):
                    right = refs.token_tiles.at[slot, 2 * pair + parity]
                    plgpu.wgmma(accumulator, _float16(bits) * scale, right.transpose((1, 0)))
                return accumulator[...]

            return pl.run_scoped(multiply, plgpu.ACC((tile, MOST_ROWS), jnp.float32))

        total = lax.fori_loop(0, pairs, add, total)
        # Copies go by another way to memory than the loads of codes and scales; these end first.
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.free.at[slot])
        return total

    zeros = jnp.zeros((tile, MOST_ROWS), jnp.float32)
    total = lax.fori_loop(0, count, visit, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

    @pl.when(own == 1)
    def _() -> None:
        refs.out_tile[...] = total
        plgpu.barrier_arrive(refs.half_done)

    @pl.when(own == 0)
    def _() -> None:
        plgpu.barrier_wait(refs.half_done)
        refs.out_tile[...] = total + hopper.load(refs.out_tile, plgpu.Layout.WGMMA)
        plgpu.commit_smem()
        columns = pl.ds(lax.axis_index(_TILE) * tile, tile)
        plgpu.copy_smem_to_gmem(refs.out_tile, refs.out.at[lax.axis_index(_SPLIT), columns])
        plgpu.wait_smem_to_gmem(0)


def _bytes(of: Any) -> Array:
    """A tile in registers, columns of the weight as rows, each byte in 16 bits."""
    found = hopper.load(of.transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(found.astype(jnp.uint16), plgpu.Layout.WGMMA)


def _float16(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float16)

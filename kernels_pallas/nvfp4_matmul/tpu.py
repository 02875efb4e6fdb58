"""A few tokens times packed codes, in Pallas for the TPU's Mosaic compiler.

A grid step has some columns of the weight with the whole contraction, so each of its bytes is
copied once, whatever the number of tokens: 0.5 for a code and 1/16 for its share of a scale.

Contracted positions lie on sublanes. The 16 codes of a block are 8 bytes, which are the 8 sublanes
of a register: its scale is one row, spread over them. The two codes of a byte are never put in
order again; instead the tokens come as two matrices, of even and of odd positions. Codes times
scales are exact in bfloat16, so the matrix unit multiplies without rounding, for float32 results
too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt8

from kernels_pallas.common import dispatch
from kernels_pallas.nvfp4_matmul.codes import BLOCK
from kernels_pallas.nvfp4_matmul.ref import dequantised
from kernels_pallas.nvfp4_matmul.specs import (
    MOST_CONTRACTED,
    MOST_ROWS,
    Nvfp4MatmulConfig,
    piece,
)

# Rows of a tile of bfloat16.
_ROWS = 16


def supports(
    *,
    x: UInt8[Array, "M P"],
    weight_scales: Float[Array, "G N"],
    config: Nvfp4MatmulConfig,
    **others: object,
) -> str | None:
    """Why this form cannot run, or ``None``."""
    del others
    reason = dispatch.needs("tpu", config.interpret)
    if reason is not None:
        return reason
    contracted, chosen = 2 * x.shape[1], config.block_columns
    if x.shape[0] > MOST_ROWS:
        return f"{x.shape[0]} tokens are more than {MOST_ROWS}"
    if contracted > MOST_CONTRACTED or not piece(contracted):
        return f"a contraction of {contracted} is over {MOST_CONTRACTED} or no multiple of 128"
    if chosen is not None and (chosen <= 0 or chosen % 128):
        return f"block_columns={chosen} is not a multiple of 128"
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
    (halves, columns), rows = weight.shape, x.shape[0]
    size = piece(2 * halves)
    tile = config.tile(2 * halves, columns)
    even, odd = _tokens(x, x_scales, size)
    whole = pl.BlockSpec(even.shape, lambda j: (0, 0, 0))
    out = pl.pallas_call(
        functools.partial(_kernel, size=size),
        grid=(pl.cdiv(columns, tile),),
        in_specs=[
            whole,
            whole,
            pl.BlockSpec((halves, tile), lambda j: (0, j)),
            pl.BlockSpec((2 * halves // BLOCK, tile), lambda j: (0, j)),
        ],
        out_specs=pl.BlockSpec((_ROWS, tile), lambda j: (0, j)),
        out_shape=jax.ShapeDtypeStruct((_ROWS, columns), jnp.float32),
        scratch_shapes=[pltpu.VMEM((2 * halves // BLOCK, tile), jnp.float32)],
        name="nvfp4_matmul",
        interpret=config.interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )(even, odd, weight, lax.bitcast_convert_type(weight_scales, jnp.uint8))
    return out[:rows]


def _tokens(
    x: UInt8[Array, "M P"], scales: Float[Array, "M G"], size: int
) -> list[Float[Array, "pieces rows half"]]:
    """Even and odd positions by pieces of the contraction, filled up to a tile of rows."""
    values = dequantised(x.T, scales.T).astype(jnp.bfloat16)
    values = jnp.pad(values, ((0, 0), (0, _ROWS - x.shape[0])))
    pieces = values.reshape(-1, size // 2, 2, _ROWS)
    return [pieces[:, :, parity].swapaxes(1, 2) for parity in range(2)]


def _kernel(even, odd, codes, scales, out, wide, *, size: int) -> None:
    wide[...] = _e4m3(scales[...].astype(jnp.int32))
    half, blocks = size // 2, size // BLOCK

    def add(index: Any, total: Any) -> Any:
        here = pl.ds(_multiple(index, half), half)
        pairs = codes[here, :].astype(jnp.int32)
        scale = wide[pl.ds(_multiple(index, blocks), blocks), :]
        scale = jnp.broadcast_to(scale[:, None, :], (blocks, BLOCK // 2, scale.shape[1]))
        scale = scale.reshape(half, -1)
        for tokens, code in ((even, pairs & 15), (odd, lax.shift_right_logical(pairs, 4))):
            numbers = (_e2m1(code) * scale).astype(jnp.bfloat16)
            total += jnp.dot(tokens[index], numbers, preferred_element_type=jnp.float32)
        return total

    count = even.shape[0]
    zeros = jnp.zeros(out.shape, jnp.float32)
    out[...] = add(0, zeros) if count == 1 else lax.fori_loop(0, count, add, zeros)


def _multiple(index: Any, size: int) -> Any:
    return pl.multiple_of(index * size, size) if not isinstance(index, int) else index * size


def _e2m1(code: Any) -> Any:
    """Float32 of codes 0 to 15, by their bits; below 1 a float32 has another exponent."""
    size = code & 7
    above = lax.bitcast_convert_type((size << 22) + (126 << 23), jnp.float32)
    number = jnp.where(size < 2, 0.5 * size.astype(jnp.float32), above)
    return jnp.where(code < 8, number, -number)


def _e4m3(code: Any) -> Any:
    """Float32 of scales, which have no sign, by their bits."""
    above = lax.bitcast_convert_type((code << 20) + (120 << 23), jnp.float32)
    return jnp.where(code < 8, code.astype(jnp.float32) * 2.0**-9, above)

"""A few tokens times packed codes, in Pallas for the TPU's Mosaic compiler.

A grid step has some columns of the weight with the whole contraction, so each of its bytes is
copied once, whatever the number of tokens: 0.5 for a code and 1/16 for its share of a scale.

Contracted positions lie on sublanes. The 16 codes of a block are 8 bytes, which are the 8 sublanes
of a register, and there are 8 magnitudes: so a register of magnitudes times the block's scales is a
table that its own codes pick from. The two codes of a byte are never put in order again; instead
the tokens come as two matrices, of even and of odd positions. Codes times scales are exact in
bfloat16, so the matrix unit multiplies without rounding, for float32 results too.
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
_LANES = 128


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
    # The compiler of v5p aborts on the bits of a matrix that does not fill its last tile.
    filled = jnp.pad(weight_scales, ((0, 0), (0, -columns % 128)))
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
    )(even, odd, weight, lax.bitcast_convert_type(filled, jnp.uint8))
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
    # What the eight magnitudes stand for, one in each sublane.
    number = lax.broadcasted_iota(jnp.int32, (BLOCK // 2, _LANES), 0)
    magnitudes = _float(number, bias=126, mantissa=1)

    def add(index: Any, total: Any, lanes: Any) -> Any:
        pairs = codes[pl.ds(_multiple(index, half), half), lanes].astype(jnp.int32)
        scale = wide[pl.ds(_multiple(index, blocks), blocks), lanes]
        numbers = [], []
        for block in range(blocks):
            pair = pairs[BLOCK // 2 * block : BLOCK // 2 * (block + 1)]
            scaled = magnitudes * scale[block : block + 1]
            high = lax.shift_right_logical(pair, 4)
            numbers[0].append(_picked(scaled, pair & 7, (pair & 8) << 28))
            numbers[1].append(_picked(scaled, high & 7, (pair & 128) << 24))
        for left, right in zip((even[index], odd[index]), numbers, strict=True):
            right = jnp.concatenate(right, axis=0).astype(jnp.bfloat16)
            total += jnp.dot(left, right, preferred_element_type=jnp.float32)
        return total

    def columns(group: Any, carry: Any) -> Any:
        lanes, zeros = pl.ds(_multiple(group, _LANES), _LANES), jnp.zeros((_ROWS, _LANES))
        count = even.shape[0]
        step = functools.partial(add, lanes=lanes)
        out[:, lanes] = step(0, zeros) if count == 1 else lax.fori_loop(0, count, step, zeros)
        return carry

    lax.fori_loop(0, out.shape[1] // _LANES, columns, 0)


def _multiple(index: Any, size: int) -> Any:
    return index * size if isinstance(index, int) else pl.multiple_of(index * size, size)


def _picked(table: Any, index: Any, sign: Any) -> Any:
    """Entries of each lane's column of a register, with signs: a gather along sublanes."""
    found = lax.bitcast_convert_type(jnp.take_along_axis(table, index, axis=0), jnp.int32)
    return lax.bitcast_convert_type(found | sign, jnp.float32)


def _e4m3(code: Any) -> Any:
    """Float32 of scales, which have no sign."""
    return _float(code, bias=120, mantissa=3)


def _float(code: Any, *, bias: int, mantissa: int) -> Any:
    """Float32 of a small float without sign, by its bits; below the first exponent it is linear."""
    above = lax.bitcast_convert_type((code << (23 - mantissa)) + (bias << 23), jnp.float32)
    linear = code.astype(jnp.float32) * 2.0 ** (bias + 1 - 127 - mantissa)
    return jnp.where(code < 2**mantissa, linear, above)

"""Block sizes, and the shapes that tests and benchmarks share."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

_LANES = 128
# Bytes of codes that a TPU handles at a time.
_TILE_BYTES = 1 << 19
# Contracted positions whose codes are made numbers at a time; and as many as may be all.
_PIECE = 512
_WHOLE = 1024
# The longest contraction of which 128 columns fit.
MOST_CONTRACTED = 2 * 8 * _TILE_BYTES // _LANES
# Rows of a matrix-vector kernel.
MOST_ROWS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nvfp4MatmulConfig:
    """Block sizes.

    Attributes:
        block_columns: columns of the weight handled at a time, of ``"tpu"`` a multiple of 128, of
            ``"gpu"`` 64 or 128; ``None`` derives it, for ``"tpu"`` from the bytes that they take,
            for ``"gpu"`` as the larger that divides all.
        interpret: of ``"tpu"`` and ``"gpu"``: the ``interpret`` of Pallas; runs the kernel
            anywhere, slowly. ``"tpu"`` takes true, ``"gpu"`` parameters of the Mosaic-GPU one.
    """

    block_columns: int | None = None
    interpret: Any = False

    def tile(self, contracted: int, columns: int) -> int:
        """Columns of a TPU's tile, which has the whole contraction."""
        whole = -(-columns // _LANES) * _LANES
        fitting = _TILE_BYTES // (contracted // 2) // _LANES * _LANES
        return self.block_columns or min(whole, max(_LANES, min(fitting, 1024)))


def piece(contracted: int) -> int:
    """Contracted positions that a TPU handles at a time: all, or a multiple of 128; 0 if none."""
    if contracted <= _WHOLE:
        return contracted
    return next((size for size in range(_PIECE, 0, -_LANES) if contracted % size == 0), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one call.

    Attributes:
        rows: tokens.
        contracted: inputs of the projection.
        columns: outputs of the projection.
    """

    rows: int
    contracted: int
    columns: int


SHAPES = {
    "smollm2-135m-up": Shape(rows=1, contracted=576, columns=1536),
    "smollm2-135m-down": Shape(rows=8, contracted=1536, columns=576),
    "llama-3-8b-up": Shape(rows=1, contracted=4096, columns=14336),
    "llama-3-8b-down": Shape(rows=8, contracted=14336, columns=4096),
}


def arguments(named: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a call of that shape."""

    def side(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.uint8)

    def scales(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)

    rows, contracted, columns = named.rows, named.contracted, named.columns
    return {
        "x": side(rows, contracted // 2),
        "x_scales": scales(rows, contracted // 16),
        "weight": side(contracted // 2, columns),
        "weight_scales": scales(contracted // 16, columns),
        "alpha": jax.ShapeDtypeStruct((), jnp.float32),
    }


def program(
    *,
    shape: str,
    dtype: str,
    backward: bool,
    impl: Literal["tpu", "gpu"] = "tpu",
    block_columns: int | None = None,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A call of a named shape, for ``schedule`` and ``resources``.

    Raises:
        ValueError: a backward pass is asked for; the kernel has none.
    """
    # Above this module: the operation itself takes the config from here.
    import kernels_pallas.nvfp4_matmul as op

    if backward:
        raise ValueError("nvfp4_matmul has no backward kernel; leave out --backward")
    config = Nvfp4MatmulConfig(block_columns=block_columns)

    def multiply(arrays: Any) -> Any:
        return op.nvfp4_matmul(**arrays, dtype=dtype, impl=impl, config=config)

    return multiply, (arguments(SHAPES[shape]),)

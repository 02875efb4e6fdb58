"""Block sizes, and the shapes that tests and benchmarks share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Elements of a block of rows: the widest kernel keeps about 32 bytes of VMEM for each.
_BLOCK_ELEMENTS = 2**18
# Rows of a block come in tiles of 8 (float32) or 16 (bfloat16).
_ROWS = 16
MAX_WIDTH = _BLOCK_ELEMENTS // _ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRoutingConfig:
    """Block sizes of the TPU's gather and scatter.

    Attributes:
        block_slots: slots of the index that are handled at a time, a multiple of 16 (or all);
            ``None`` derives it from the width.
        block_tokens: tokens of the gather's gradient written at a time, likewise.
        interpret: ``True`` or ``pltpu.InterpretParams`` to run the kernels on a CPU.
    """

    block_slots: int | None = None
    block_tokens: int | None = None
    interpret: Any = False

    def slots(self, count: int, width: int) -> int:
        """Slots of a block, for ``count`` slots of ``width``."""
        return _block(self.block_slots, count, width)

    def tokens(self, count: int, width: int) -> int:
        """Tokens of a block, for ``count`` tokens of ``width``."""
        return _block(self.block_tokens, count, width)


def _block(chosen: int | None, count: int, width: int) -> int:
    fitting = min(_BLOCK_ELEMENTS // width // _ROWS * _ROWS, 256)
    return min(count, chosen or max(fitting, _ROWS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedMatmulConfig:
    """Tiles of the TPU's grouped matrix product.

    Attributes:
        tiling: rows, contracted width and output width of a tile; ``None`` derives it from the
            shapes.
        interpret: ``True`` to run the kernel on a CPU.
    """

    tiling: tuple[int, int, int] | None = None
    interpret: Any = False

    def tiles(self, rows: int, contracted: int, width: int) -> tuple[int, int, int]:
        """The tiling for ``[rows, contracted] · [contracted, width]``."""
        if self.tiling is not None:
            return self.tiling
        tall = 256 if rows >= 2048 else 128
        return tall, _tile(contracted), _tile(width)


def _tile(size: int) -> int:
    """All of a narrow one, else the widest of 512, 256, 128 that wastes nothing, else 128."""
    return size if size <= 640 else next((tile for tile in (512, 256) if size % tile == 0), 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one call.

    Attributes:
        batch: rows.
        length: tokens of a row.
        width: model width.
        slots: routed tokens of a row.
    """

    batch: int
    length: int
    width: int
    slots: int


SHAPES = {
    "recursion-2-of-3": Shape(batch=8, length=2048, width=576, slots=1365),
    "recursion-3-of-3": Shape(batch=8, length=2048, width=576, slots=682),
    "wide-2-of-3": Shape(batch=8, length=2048, width=2048, slots=1365),
    "wide-1-of-3": Shape(batch=8, length=2048, width=2048, slots=682),
    "laptop": Shape(batch=4, length=512, width=384, slots=341),
}


def program(
    *, shape: str, dtype: str, backward: bool, block_slots: int | None = None
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Gather and scatter-add of a named shape, for ``kernels_pallas.common.schedule``."""
    # Above this module: the operations themselves take the config from here.
    import kernels_pallas.token_routing as op

    named = SHAPES[shape]
    config = TokenRoutingConfig(block_slots=block_slots)
    arrays = (
        jax.ShapeDtypeStruct((named.batch, named.length, named.width), dtype),
        jax.ShapeDtypeStruct((named.batch, named.slots), jnp.float32),
        jax.ShapeDtypeStruct((named.batch, named.slots), jnp.int32),
        jax.ShapeDtypeStruct((named.batch,), jnp.int32),
    )

    def route(x: Any, gate: Any, index: Any, count: Any) -> Any:
        rows = op.gather_tokens(x=x, index=index, count=count, impl="tpu", config=config)
        return op.scatter_add_tokens(
            residual=2 * x,
            y=jnp.tanh(rows),
            gate=gate,
            index=index,
            count=count,
            impl="tpu",
            config=config,
        )

    def loss(*arguments: Any) -> Any:
        return jnp.sum(jnp.square(route(*arguments).astype(jnp.float32)))

    return (jax.grad(loss, argnums=(0, 1)) if backward else route), arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedShape:
    """Sizes of one grouped matrix product.

    Attributes:
        rows: tokens, all experts together.
        width: model width.
        hidden: width of an expert.
        experts: number of experts.
    """

    rows: int
    width: int
    hidden: int
    experts: int


GROUPED_SHAPES = {
    "experts-8": GroupedShape(rows=4096, width=576, hidden=1536, experts=8),
    "experts-64": GroupedShape(rows=16384, width=2048, hidden=1024, experts=64),
    "laptop": GroupedShape(rows=2048, width=384, hidden=512, experts=8),
}

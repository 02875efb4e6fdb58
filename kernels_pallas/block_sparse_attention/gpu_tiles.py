"""What the kernels for Hopper are put together from.

A thread block computes one *outer* tile. It has a warpgroup for each 64 of its rows, and one more
that copies (``common.hopper``). Which *inner* tiles are visited is read from a list
(``pairs.ranges``): first a loop over those that need no mask, then one over the others, so that
neither has a branch.

Scores are in base 2; results and statistics stay in registers. Outer rows are rows of the matrices
of scores, also where they are keys, so that probabilities go from one product to the next in
registers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention.masks import MaskRule
from kernels_pallas.block_sparse_attention.specs import NOTHING
from kernels_pallas.common import hopper

# Rows of a warpgroup: those of one tensor-core instruction.
ROWS = 64
# Masked scores; below NOTHING, so that a query that sees nothing has weights of zero, not of one.
NEVER = 2 * NOTHING
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)
# A multiprocessor has registers for 504 in each of 128 threads: two warpgroups compute, one copies.
_COMPUTING, _COPYING = 240, 24
_THREAD = "warpgroup"
_GRID = ("head", "tile", "batch")


class Tiles(NamedTuple):
    """Sizes of one kernel.

    Attributes:
        outer: rows that stay, a multiple of ``ROWS``.
        inner: rows that are visited at a time.
        slots: inner tiles in shared memory at a time.
    """

    outer: int
    inner: int
    slots: int


class Static(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        rule: who sees whom.
        scale: factor of the scores.
        softcap: bound of the absolute scores.
        tiles: sizes.
        group: query heads of a key head.
        interpret: the ``interpret`` of the kernel.
    """

    rule: MaskRule
    scale: float
    softcap: float | None
    tiles: Tiles
    group: int
    interpret: Any


class Sides(NamedTuple):
    """Operands in whole tiles; the first two are those of ``pairs.ranges``."""

    inner: Int[Array, "B P"]
    bounds: Int[Array, "B N 3"]
    q_tokens: Int[Array, "B 2 T"]
    kv_tokens: Int[Array, "B 2 S"]
    q: Float[Array, "B T H E"]
    k: Float[Array, "B S K E"]
    v: Float[Array, "B S K E"]


def kernel(
    body: Callable[..., None],
    static: Static,
    *,
    name: str,
    grid: tuple[int, int, int],
    computing: int,
    **types: Any,
) -> Callable[..., Any]:
    """The kernel, with ``computing`` warpgroups and one that copies; grids as in ``_GRID``."""
    return plgpu.kernel(
        functools.partial(body, static=static),
        grid=grid,
        grid_names=_GRID,
        num_threads=computing + 1,
        thread_name=_THREAD,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=static.interpret or None,
        **types,
    )


class Place(NamedTuple):
    """What a warpgroup is there for: its result, and the part of the list that it visits.

    Attributes:
        batch: row of the batch.
        tile: outer tile.
        head: head, of keys where those are outer.
        group: warpgroup of the thread block; the last one copies.
        start: first entry of the list.
        unmasked: steps that need no mask; a step is an entry and, where keys are outer, a head.
        steps: all steps.
        repeat: steps of an entry.
    """

    batch: Array
    tile: Array
    head: Array
    group: Array
    start: Array
    unmasked: Array
    steps: Array
    repeat: int

    @classmethod
    def here(cls, bounds: Any, *, repeat: int, last_first: bool) -> "Place":
        """From ``Sides.bounds``; ``last_first`` where later tiles tend to have more to visit."""
        head, tile, batch = (lax.axis_index(name) for name in _GRID)
        tile = bounds.shape[1] - 1 - tile if last_first else tile
        # Long ones start first, so that short ones fill the multiprocessors up at the end.
        start, middle, stop = (bounds[batch, tile, edge] for edge in range(3))
        own = lax.axis_index(_THREAD)
        unmasked, steps = (middle - start) * repeat, (stop - start) * repeat
        return cls(batch, tile, head, own, start, unmasked, steps, repeat)

    def inner_rows(self, inner: Any, step: Array, size: int) -> Any:
        """Rows of the inner tile of a step."""
        entry = self.start + (step if self.repeat == 1 else _quotient(step, self.repeat))
        return pl.ds(inner[self.batch, entry] * size, size)

    def inner_head(self, step: Array) -> Array:
        """Query head of a step, where keys are outer."""
        return self.head * self.repeat + lax.rem(step, jnp.int32(self.repeat))

    def key_head(self, group: int) -> Array:
        """Key head, where queries are outer."""
        return _quotient(self.head, group)

    def visible(
        self, static: Static, inner: Any, inner_tokens: Any, step: Array, own: tuple[Array, Array],
        shape: tuple[int, ...], *, rows_are_queries: bool,
    ) -> Array:  # fmt: skip
        """The rule for every pair of an outer and an inner row, ``shape``.

        Args:
            static: of the kernel.
            inner: ``Sides.inner``.
            inner_tokens: of all inner rows.
            step: says which inner tile.
            own: positions and segments of the outer rows.
            shape: of the result.
            rows_are_queries: the outer rows are queries, not keys.
        """
        columns = self.inner_rows(inner, step, static.tiles.inner)
        others = tokens(inner_tokens, self.batch, columns, BY_COLUMN)
        outer = [along_rows(x, shape) for x in own]
        passing = [along_columns(x, shape) for x in others]
        queries, keys = (outer, passing) if rows_are_queries else (passing, outer)
        return static.rule(queries[0], keys[0], queries[1], keys[1])

    def for_each(self, visit: Callable[..., Any], carry: Any) -> Any:
        """``visit(step, carry, masked=...)`` for every step, unmasked ones first."""
        nothing = jnp.int32(0)
        visit_unmasked = functools.partial(visit, masked=False)
        carry = lax.fori_loop(nothing, self.unmasked, visit_unmasked, carry)
        visit_masked = functools.partial(visit, masked=True)
        return lax.fori_loop(self.unmasked, self.steps, visit_masked, carry)


def anew(index: Array) -> Array:
    """``index``, such that what follows from it is computed again in each step of a loop.

    Otherwise the compiler keeps a descriptor for every 16 columns of a tile that stays, and wide
    ones spill registers for it.
    """
    return lax.optimization_barrier(index)


def set_registers(computing: int, *, copies: bool) -> None:
    """Moves registers from the copying to the computing warpgroups, where there are several."""
    if computing == 1:  # each of two warpgroups has as many as a thread can name
        return
    if copies:
        plgpu.set_max_registers(_COPYING, action="decrease")
    else:
        plgpu.set_max_registers(_COMPUTING, action="increase")


def filled(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    """A constant in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along_rows(x: Array, shape: tuple[int, ...]) -> Array:
    """One value for each row."""
    return lax.broadcast_in_dim(x, shape, [0])


def along_columns(x: Array, shape: tuple[int, ...]) -> Array:
    """One value for each column."""
    return lax.broadcast_in_dim(x, shape, [1])


def products_nt(*operands: tuple[list[Any], list[Any]]) -> tuple[Array, ...]:
    """``Σ_i a[i] b[i]ᵀ`` for each pair of lists, started together."""
    shapes = [(a[0].shape[0], b[0].shape[0]) for a, b in operands]

    def compute(*sums: Any) -> tuple[Array, ...]:
        for total, (a, b) in zip(sums, operands, strict=True):
            for left, right in zip(a, b, strict=True):
                plgpu.wgmma(total, left, right.transpose((1, 0)))
        return tuple(total[...] for total in sums)

    return pl.run_scoped(compute, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def plus_product(total: Array, a: Array, b: Any) -> Array:
    """``total + a b``, with ``a`` in registers."""

    def compute(accumulator: Any) -> Array:
        accumulator[...] = total
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    rows, columns = total.shape
    return pl.run_scoped(compute, plgpu.ACC((rows, columns), jnp.float32))


def tokens(of: Any, batch: Array, rows: Any, layout: Any) -> tuple[Array, Array]:
    """Positions and segments, in registers."""
    positions, segments = (hopper.load(of.at[batch, i, rows], layout) for i in (0, 1))
    return positions, segments


def scores(static: Static, products: Array) -> Array:
    """In base 2."""
    if static.softcap is None:
        return products * (static.scale * math.log2(math.e))
    # tanh(x) = 1 - 2 / (exp(2 x) + 1); the hardware's own tanh is right to 11 bits only.
    power = jnp.exp2(products * (2 * math.log2(math.e) * static.scale / static.softcap))
    return (1.0 - 2.0 / (power + 1.0)) * (static.softcap * math.log2(math.e))


def slopes(static: Static, weights: Array, in_base_2: Array) -> Array:
    """Weights, times the derivative of their scores by their products, up to ``scale``."""
    if static.softcap is None:
        return weights
    capped = in_base_2 * (math.log(2.0) / static.softcap)
    return weights * (1.0 - capped * capped)


def _quotient(x: Array, by: int) -> Array:
    return lax.div(x, jnp.int32(by))

"""What the TPU kernels compute on a tile of scores; statistics are in base 2."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels_pallas.block_sparse_attention import pairs
from kernels_pallas.block_sparse_attention.masks import RangeRule
from kernels_pallas.block_sparse_attention.specs import NOTHING
from kernels_pallas.block_sparse_attention.tpu_operands import NO_SEGMENT, Static


def span(block: Array, size: int) -> Any:
    """The tokens of ``block``."""
    return pl.ds(pl.multiple_of(block * size, size), size)


# Masked scores; below NOTHING, so that a query that sees nothing has weights of zero, not of one.
_NEVER = 2 * NOTHING


class Masks(NamedTuple):
    """What a pair of blocks must be asked for."""

    positions: bool
    segments: bool


def for_live(static: Static, entry: Array, accumulate: Callable[[Masks], None]) -> None:
    """Computes a pair with no more masks than it needs."""
    if not isinstance(static.rule, RangeRule):
        pl.when(entry & pairs.LIVE != 0)(functools.partial(accumulate, Masks(True, True)))
        return
    kinds = {
        pairs.LIVE: Masks(True, True),
        pairs.LIVE | pairs.ALIKE: Masks(True, False),
        pairs.LIVE | pairs.ALIKE | pairs.WHOLE: Masks(False, False),
    }
    kind = entry & (pairs.LIVE | pairs.ALIKE | pairs.WHOLE)
    for flags, masks in kinds.items():
        pl.when(kind == flags)(functools.partial(accumulate, masks))


def _precision(dtype: Any) -> lax.Precision | None:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def product_nt(a: Array, b: Array) -> Array:
    """``a bᵀ``."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1,)), ((), ())),
        precision=_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def product_nn(a: Array, b: Array) -> Array:
    """``a b``."""
    return lax.dot_general(
        a,
        b,
        (((1,), (0,)), ((), ())),
        precision=_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def product_tn(a: Array, b: Array) -> Array:
    """``aᵀ b``."""
    return lax.dot_general(
        a,
        b,
        (((0,), (0,)), ((), ())),
        precision=_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def scores(static: Static, products: Array) -> Array:
    """In base 2."""
    if static.softcap is None:
        return products * (static.scale * math.log2(math.e))
    capped = jnp.tanh(products * (static.scale / static.softcap))
    return capped * (static.softcap * math.log2(math.e))


def by_products(static: Static, by_scores: Array, scores: Array) -> Array:
    """Gradient by the products, up to ``scale``, from that by the scores, which are in base 2."""
    if static.softcap is None:
        return by_scores
    return by_scores * (1.0 - jnp.square(scores * (math.log(2.0) / static.softcap)))


class Side(NamedTuple):
    """Tokens of one side of a pair: rows ``[1, n]``, or columns ``[m, lanes]`` of equal lanes."""

    positions: Callable[[], Array]
    segments: Callable[[], Array]

    @classmethod
    def of_rows(cls, tokens: Any, here: Any) -> "Side":
        """Of ``[2, T]``."""
        return cls(lambda: tokens[:1, here], lambda: tokens[1:, here])

    @classmethod
    def of_columns(cls, positions: Any, tokens: Any, here: Any) -> "Side":
        """Of ``[2, T]``; positions are turned already, segments are where they are used."""
        return cls(lambda: positions[...], lambda: column(tokens[1:, here], positions.shape[1]))


def shown(static: Static, masks: Masks, x: Array, queries: Side, keys: Side) -> Array:
    """The scores ``x``, but ``_NEVER`` where a query does not see a key."""
    if not masks.positions:
        return x
    q_positions, kv_positions = (spread(side.positions(), x.shape) for side in (queries, keys))
    rule = static.rule
    if not isinstance(rule, RangeRule):
        q_segments, kv_segments = (spread(side.segments(), x.shape) for side in (queries, keys))
        real = jnp.where(kv_segments == NO_SEGMENT, 0, kv_segments)
        return jnp.where(rule(q_positions, kv_positions, q_segments, real), x, _NEVER)
    if masks.segments:
        # Two selections, as masks that wait to be joined overflow the mask registers.
        q_segments, kv_segments = (spread(side.segments(), x.shape) for side in (queries, keys))
        x = jnp.where(q_segments == kv_segments, x, _NEVER)
    return jnp.where(rule.near(q_positions, kv_positions), x, _NEVER)


def column(row: Array, lanes: int) -> Array:
    """A row ``[1, n]`` as a column ``[n, lanes]``, equal along lanes."""
    # Turning copies of a row costs less than turning it alone and copying along lanes.
    return jnp.broadcast_to(row, (lanes, row.shape[1])).T


def row(x: Array) -> Array:
    """A column ``[n, lanes]``, equal along lanes, as a row ``[1, n]``."""
    lanes = x.shape[1]
    diagonal = (lax.broadcasted_iota(jnp.int32, (lanes, lanes), i) for i in (0, 1))
    diagonal = jnp.equal(*diagonal)
    squares = [x[start : start + lanes] for start in range(0, x.shape[0], lanes)]
    # By selection, not by a transpose, which costs many times as much.
    return jnp.concatenate(
        [
            jnp.sum(jnp.where(diagonal[: part.shape[0]], part, 0.0), axis=0, keepdims=True)[
                :, : part.shape[0]
            ]
            for part in squares
        ],
        axis=1,
    )


def spread(side: Array, shape: tuple[int, ...]) -> Array:
    """A row, or a column, as a matrix."""
    if side.shape[0] == 1:
        return jnp.broadcast_to(side, shape)
    return widen(side, shape[1])


def widen(x: Array, width: int) -> Array:
    """``[n, lanes]``, equal along lanes, as ``[n, width]``."""
    if width <= x.shape[1]:
        return x[:, :width]
    if width % x.shape[1]:
        return jnp.broadcast_to(x[:, :1], (x.shape[0], width))
    return jnp.tile(x, (1, width // x.shape[1]))


def sum_of_lanes(x: Array, lanes: int) -> Array:
    """Sums columns that are ``lanes`` apart: whole registers, nothing across lanes."""
    parts = [x[:, start : start + lanes] for start in range(0, x.shape[1], lanes)]
    return functools.reduce(jnp.add, parts)

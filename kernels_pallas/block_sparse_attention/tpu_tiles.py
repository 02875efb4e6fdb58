"""What the TPU kernels compute on a tile of scores; statistics are in base 2."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels_pallas.block_sparse_attention import pairs
from kernels_pallas.block_sparse_attention.masks import RangeRule
from kernels_pallas.block_sparse_attention.tpu_operands import NO_SEGMENT, Static


def span(block: Array, size: int) -> pl.Slice:
    """The tokens of ``block``."""
    return pl.ds(pl.multiple_of(block * size, size), size)


def for_live(static: Static, entry: Array, accumulate: Any) -> None:
    """Computes a pair, unmasked if nothing of it is hidden."""
    if not isinstance(static.rule, RangeRule):
        pl.when(entry & pairs.LIVE != 0)(functools.partial(accumulate, masked=True))
        return
    kind = entry & (pairs.LIVE | pairs.WHOLE)
    pl.when(kind == pairs.LIVE)(functools.partial(accumulate, masked=True))
    pl.when(kind == pairs.LIVE | pairs.WHOLE)(functools.partial(accumulate, masked=False))


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


def visible(static: Static, q_tokens: Any, kv_tokens: Any) -> Array:
    """One side is a row ``[2, n]``, the other columns ``[2, m, lanes]``; gives ``[m, n]``."""
    rows = kv_tokens if len(q_tokens.shape) == 3 else q_tokens
    columns = q_tokens if len(q_tokens.shape) == 3 else kv_tokens
    shape = columns.shape[1], rows.shape[1]

    def whole(tokens: Any, which: int) -> Array:
        if len(tokens.shape) == 3:
            return widen(tokens[which], shape[1])
        return jnp.broadcast_to(tokens[which : which + 1], shape)

    positions, segments = ((whole(q_tokens, i), whole(kv_tokens, i)) for i in (0, 1))
    if isinstance(static.rule, RangeRule):
        # One comparison of segments, where the rule itself would ask for padding as well.
        return static.rule.near(*positions) & (segments[0] == segments[1])
    real = jnp.where(segments[1] == NO_SEGMENT, 0, segments[1])
    return static.rule(*positions, segments[0], real)


def columns(rows: Any, shape: tuple[int, ...]) -> Array:
    """Rows ``[c, n]`` as columns ``[c, n, lanes]``, equal along lanes."""
    # Turning copies of a row costs less than turning it alone and copying along lanes.
    turned = (jnp.broadcast_to(rows[i : i + 1], shape[:0:-1]).T for i in range(shape[0]))
    return jnp.stack(tuple(turned))


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

"""A loop over blocks of slots, contiguous or gathered, that passes over what nobody sees.

One program serves every length: which blocks are passed over is decided as it runs. A block is
gathered only where the loop gets to it, while it fits a cache. Keys and values of slots that
nobody sees are cleared, in blocks that have such slots.

Axes: ``b`` rows, ``k`` key/value heads, ``r`` queries and query heads of one of them, ``s`` slots,
``e`` width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_sparse_attention import NOTHING
from kernels_pallas.block_sparse_attention import blocks as block_lists
from kernels_pallas.decode_attention.specs import DecodeAttentionConfig

# Masked scores; below NOTHING, so that a query that sees nothing has weights of zero, not of one.
_NEVER = 2 * NOTHING


class _Blocks(NamedTuple):
    """How to get at block ``i`` of ``count``: of a pool, and of what is seen."""

    count: int
    of_pool: Callable[[Array, Array], Float[Array, "B K C E"]]
    of_seen: Callable[[Array], Bool[Array, "B L T C"]]


class _Running(NamedTuple):
    """Of an online softmax."""

    highest: Float[Array, "B K R"]
    total: Float[Array, "B K R"]
    out: Float[Array, "B K R E"]


def decode_attention(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    v: Float[Array, "P K Y E"],
    shown: Bool[Array, "B T S"],
    pages: Int[Array, "B N"] | None,
    selected: Int[Array, "B L M"] | None,
    unit: int,
    scale: float,
    softcap: float | None,
    config: DecodeAttentionConfig,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """See :func:`kernels_pallas.decode_attention.partial_decode_attention`."""
    queries = _queries(q, k.shape[1])
    blocks = _blocks(k, shown, pages, selected, unit, config)

    def add(index, seen, running: _Running, *, masked: bool) -> _Running:
        keys, values = (blocks.of_pool(pool, index) for pool in (k, v))
        if masked:
            keys, values = (_cleared(x, seen) for x in (keys, values))
        scores = _scores(queries, keys, seen, scale, softcap)
        higher = jnp.maximum(running.highest, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - higher[..., None])
        kept = jnp.exp(running.highest - higher)
        block = _product("bkrs,bkse->bkre", weights.astype(values.dtype), values)
        return _Running(
            higher,
            running.total * kept + jnp.sum(weights, axis=-1),
            running.out * kept[..., None] + block,
        )

    nothing = jnp.zeros(queries.shape, jnp.float32)
    total = nothing[..., 0]
    running = _Running(jnp.full_like(total, NOTHING), total, nothing)
    kinds = (
        lambda index, seen, running: running,
        functools.partial(add, masked=True),
        functools.partial(add, masked=False),
    )

    # Recomputed in a backward pass, which would keep copies of all blocks otherwise.
    @jax.checkpoint
    def step(running, index):
        seen = blocks.of_seen(index)
        return lax.switch(_kind(seen), kinds, index, seen, running), None

    running, _ = lax.scan(step, running, jnp.arange(blocks.count))
    total = jnp.where(running.total > 0, running.total, 1.0)
    out = _whole(running.out / total[..., None], q)
    log_sum_exp = _whole((running.highest + jnp.log(total))[..., None], q[..., :1])
    return out.astype(q.dtype), log_sum_exp[..., 0]


def token_scores(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    shown: Bool[Array, "B T S"],
    pages: Int[Array, "B N"] | None,
    scale: float,
    softcap: float | None,
    config: DecodeAttentionConfig,
) -> Float[Array, "B K S"]:
    """See :func:`kernels_pallas.decode_attention.token_scores`; votes by key head.

    The scores are kept: reading the keys again would take longer.
    """
    queries = _queries(q, k.shape[1])
    blocks = _blocks(k, shown, pages, None, 1, config)
    slots = shown.shape[2]

    def of_block(index, seen, *, masked: bool):
        keys = blocks.of_pool(k, index)
        keys = _cleared(keys, seen) if masked else keys
        return _scores(queries, keys, seen, scale, softcap)

    first = jax.eval_shape(blocks.of_seen, jnp.int32(0))
    like = (*queries.shape[:3], first.shape[3])
    kinds = (
        lambda index, seen: jnp.full(like, _NEVER),
        functools.partial(of_block, masked=True),
        functools.partial(of_block, masked=False),
    )

    @jax.checkpoint
    def step(carry, index):
        seen = blocks.of_seen(index)
        return carry, lax.switch(_kind(seen), kinds, index, seen)

    _, scores = lax.scan(step, None, jnp.arange(blocks.count))
    highest = jnp.max(jnp.max(scores, axis=-1), axis=0)
    highest = lax.stop_gradient(jnp.maximum(highest, NOTHING))[None, ..., None]
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=(0, -1), keepdims=True)
    votes = jnp.sum(weights / jnp.where(total > 0, total, 1.0), axis=3)
    *first, last = votes
    # The last block of a row in one piece reaches back where it would be ragged.
    rest = slots - len(first) * votes.shape[-1]
    last = last[..., max(0, votes.shape[-1] - rest) :] if pages is None else last[..., :rest]
    votes = jnp.concatenate([*first, last], axis=-1)
    return jnp.where(jnp.any(shown, axis=1)[:, None], votes, NOTHING)


def _blocks(
    k: Float[Array, "P K Y E"],
    shown: Bool[Array, "B T S"],
    pages: Int[Array, "B N"] | None,
    selected: Int[Array, "B L M"] | None,
    unit: int,
    config: DecodeAttentionConfig,
) -> _Blocks:
    page, slots = k.shape[2], shown.shape[2]
    size = config.of(slots)
    if selected is None and pages is None:
        return _contiguous(shown, size)
    if selected is None:
        # Pages of more than a block are read in equal parts.
        parts = -(-page // size)
        unit = page // next(n for n in range(parts, page + 1) if page % n == 0)
        every = jnp.arange(slots // unit, dtype=jnp.int32)[None, None]
        units = jnp.broadcast_to(every, (shown.shape[0], 1, slots // unit))
        return _gathered(k, shown, pages, units, unit, size)
    units = _distinct(selected, block_lists.count(slots, unit))
    if page % unit:
        # Units that do not fill pages are taken slot by slot.
        parts = units[..., None] * unit + jnp.arange(unit)[None, None, None]
        parts = jnp.where((units[..., None] >= 0) & (parts < slots), parts, -1)
        units, unit = parts.reshape(*units.shape[:2], -1), 1
    return _gathered(k, shown, pages, units, unit, size)


def _distinct(selected: Int[Array, "B L M"], count: int) -> Int[Array, "B L M"]:
    """The lists as they are; what is repeated or no unit becomes -1. Faster here than to sort."""
    row, which = (lax.broadcasted_iota(jnp.int32, (*selected.shape[:2], 1), i) for i in (0, 1))
    number = lax.broadcasted_iota(jnp.int32, selected.shape, 2)
    at = jnp.where((selected < 0) | (selected >= count), count, selected)
    last = jnp.zeros((*selected.shape[:2], count + 1), jnp.int32).at[row, which, at].max(number)
    kept = (jnp.take_along_axis(last, at, axis=2) == number) & (at < count)
    return jnp.where(kept, selected, -1)


def _contiguous(shown: Bool[Array, "B T S"], size: int) -> _Blocks:
    slots = shown.shape[2]

    def first(index):
        return jnp.minimum(index * size, slots - size)

    def of_pool(pool, index):
        return lax.dynamic_slice_in_dim(pool, first(index), size, 2)

    def of_seen(index):
        seen = lax.dynamic_slice_in_dim(shown, first(index), size, 2)[:, None]
        # The last block reaches back to where it is not ragged.
        fresh = first(index) + jnp.arange(size) >= index * size
        return seen & fresh[None, None, None]

    return _Blocks(block_lists.count(slots, size), of_pool, of_seen)


def _gathered(
    k: Float[Array, "P K Y E"],
    shown: Bool[Array, "B T S"],
    pages: Int[Array, "B N"] | None,
    units: Int[Array, "B L M"],
    unit: int,
    size: int,
) -> _Blocks:
    """Units that lie inside pages, -1 for none."""
    (_, heads, page, _), (batch, queries, slots) = k.shape, shown.shape
    several = min(max(1, size // unit), units.shape[2])
    missing = -units.shape[2] % several
    units = jnp.pad(units, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
    found = jnp.maximum(units, 0)
    per_page = page // unit
    if pages is None:
        pages = jnp.arange(batch, dtype=jnp.int32)[:, None]
    at = jnp.take_along_axis(jnp.maximum(pages, 0)[:, None], found // per_page, axis=2)
    head = jnp.arange(heads, dtype=jnp.int32)[None, :, None]
    places = (at * heads + head) * per_page + found % per_page
    shown = jnp.moveaxis(shown.reshape(batch, queries, slots // unit, unit), 2, 1)

    def of_pool(pool, index):
        one = lax.dynamic_slice_in_dim(places, index * several, several, 2)
        rows = pool.reshape(-1, unit, pool.shape[3])
        rows = jnp.take(rows, one.reshape(-1), axis=0, mode="clip")
        return rows.reshape(batch, heads, several * unit, pool.shape[3])

    def of_seen(index):
        one = lax.dynamic_slice_in_dim(units, index * several, several, 2)
        rows = lax.broadcasted_iota(jnp.int32, (batch, 1, 1), 0)
        seen = shown[rows, jnp.maximum(one, 0)] & (one >= 0)[..., None, None]
        return jnp.moveaxis(seen, 3, 2).reshape(batch, one.shape[1], queries, several * unit)

    return _Blocks(units.shape[2] // several, of_pool, of_seen)


def _kind(seen: Bool[Array, "B L T C"]) -> Int[Array, ""]:
    """0 if nobody sees anything, 2 if everybody sees everything."""
    return jnp.any(seen).astype(jnp.int32) + jnp.all(seen).astype(jnp.int32)


def _cleared(
    block: Float[Array, "B K C E"], seen: Bool[Array, "B L T C"]
) -> Float[Array, "B K C E"]:
    return jnp.where(jnp.any(seen, axis=2)[..., None], block, 0)


def _queries(q: Float[Array, "B T H E"], kv_heads: int) -> Float[Array, "B K R E"]:
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return jnp.moveaxis(grouped, 1, 2).reshape(batch, kv_heads, -1, width)


def _whole(x: Float[Array, "B K R E"], q: Float[Array, "B T H E"]) -> Float[Array, "B T H E"]:
    """Undoes ``_queries``."""
    batch, length, heads, width = q.shape
    x = x.reshape(batch, x.shape[1], length, heads // x.shape[1], width)
    return jnp.moveaxis(x, 2, 1).reshape(q.shape)


def _scores(
    queries: Float[Array, "B K R E"],
    keys: Float[Array, "B K C E"],
    seen: Bool[Array, "B L T C"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B K R C"]:
    scores = _product("bkre,bkse->bkrs", queries, keys) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = jnp.repeat(seen, queries.shape[2] // seen.shape[2], axis=2)
    return jnp.where(seen, scores, _NEVER)


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(
        axes,
        a,
        b,
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if b.dtype == jnp.float32 else None,
    )

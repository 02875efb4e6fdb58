"""Pairs of blocks as a flat list for scalar prefetch, one grid step each, none for skipped ones.

An entry packs the *outer* block (the one whose result is being accumulated; its entries are
adjacent), the *inner* block (the one to load) and flags. Each outer block has an entry, if only
one that computes nothing, so that each result is written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from kernels_pallas.block_sparse_attention.blocks import Tokens
from kernels_pallas.block_sparse_attention.masks import MaskRule, RangeRule

# Flags: the first and the last entry of an outer block; something to compute; all of one segment;
# nothing to mask; the first entry of an outer block with something to mask.
FIRST, LAST, LIVE, ALIKE, WHOLE, TURN = 1, 2, 4, 8, 16, 32
_INNER, _OUTER = 6, 18
MOST_BLOCKS = 1 << 12


class Pairs(NamedTuple):
    """Blocks of queries and of keys, entry by entry; rows share a list if the first axis is 1."""

    q: Int[Array, "R P"]
    k: Int[Array, "R P"]
    live: Bool[Array, "R P"]


class Listed(NamedTuple):
    """Entries of every batch row, one after the other, and how many of a row's are steps."""

    entries: Int[Array, " BP"]
    steps: int | Int[Array, ""]


def outer(entry: Int[Array, "..."]) -> Int[Array, "..."]:
    """The block whose result is accumulated."""
    return lax.shift_right_logical(entry, _OUTER)


def inner(entry: Int[Array, "..."]) -> Int[Array, "..."]:
    """The block to load."""
    return lax.shift_right_logical(entry, _INNER) & (MOST_BLOCKS - 1)


def static_rows(visible: Bool[np.ndarray, "Q K"]) -> Pairs:
    """A static map by its rows."""
    shown = visible.copy()
    shown[~visible.any(axis=1), 0] = True
    q, k = np.nonzero(shown)
    return Pairs(*(jnp.asarray(x)[None] for x in (q, k, visible[q, k])))


def static_columns(visible: Bool[np.ndarray, "Q K"]) -> Pairs:
    """A static map by its columns."""
    rows = static_rows(visible.T)
    return Pairs(rows.k, rows.q, rows.live)


def listed_rows(blocks: Int[Array, "B Q N"]) -> Pairs:
    """Lists without repetition (``blocks.distinct``) by their rows."""
    batch, rows, slots = blocks.shape
    q = jnp.broadcast_to(jnp.arange(rows)[None, :, None], blocks.shape)
    q, k = (x.reshape(batch, rows * slots) for x in (q, blocks))
    return Pairs(q, jnp.maximum(k, 0), k >= 0)


def listed_columns(blocks: Int[Array, "B Q N"], num_k: int) -> Pairs:
    """Lists without repetition by their columns: one entry for each slot and each block."""
    rows = listed_rows(blocks)
    batch = blocks.shape[0]
    every = jnp.broadcast_to(jnp.arange(num_k)[None], (batch, num_k))
    # Empty slots go last, as entries of the last block that compute nothing.
    k = jnp.concatenate([jnp.where(rows.live, rows.k, num_k), every], axis=1)
    q = jnp.concatenate([rows.q, jnp.zeros_like(every)], axis=1)
    live = jnp.concatenate([rows.live, jnp.zeros_like(every, bool)], axis=1)
    order = jnp.argsort(k, axis=1, stable=True)
    q, k, live = (jnp.take_along_axis(x, order, axis=1) for x in (q, k, live))
    return Pairs(q, jnp.minimum(k, num_k - 1), live)


def packed(
    pairs: Pairs,
    rule: MaskRule,
    tokens: Tokens,
    block_q: int,
    block_k: int,
    *,
    by_rows: bool,
    shortened: bool = False,
) -> Listed:
    """The entries of every batch row.

    Pairs whose segments cannot meet compute nothing and repeat the block before them, so that
    nothing is loaded for them.

    Args:
        pairs: sorted by the outer block.
        rule: tells which pairs need no mask.
        tokens: padded to whole blocks with segment 0.
        block_q: queries in a block.
        block_k: keys in a block.
        by_rows: the outer blocks are those of queries, not of keys.
        shortened: drops pairs that compute nothing, which makes the number of steps dynamic.
    """
    live, alike, seen = _kinds(pairs, rule, tokens, block_q, block_k)
    flags = LIVE * live + ALIKE * alike + WHOLE * seen
    own, other = (pairs.q, pairs.k) if by_rows else (pairs.k, pairs.q)
    own, other = (jnp.broadcast_to(x, live.shape).astype(jnp.int32) for x in (own, other))
    place = jnp.arange(live.shape[1])[None]
    if shortened:
        own, other, flags, kept = _shortened(own, other, flags)
        steps, end = jnp.max(kept), kept[:, None] - 1
    else:
        steps, end = live.shape[1], jnp.full((live.shape[0], 1), live.shape[1] - 1)
    change = jnp.diff(own, axis=1) != 0
    no = jnp.zeros_like(live[:, :1])
    first = jnp.concatenate([~no, change], axis=1)
    last = jnp.concatenate([change, no], axis=1) | (place == end)
    live = flags & LIVE != 0
    flags += FIRST * first + LAST * last
    flags += TURN * _first_of_each(live & (flags & WHOLE == 0), first)
    entries = (own << _OUTER) | (_repeat_the_last_live(other, live) << _INNER) | flags
    return Listed(entries.reshape(-1), steps)


def _shortened(
    own: Int[Array, "B P"], other: Int[Array, "B P"], flags: Int[Array, "B P"]
) -> tuple[Int[Array, "B P"], Int[Array, "B P"], Int[Array, "B P"], Int[Array, " B"]]:
    """The live pairs first, and one of each outer block that has none; how many those are.

    Behind them are pairs of the last block that compute nothing.
    """
    batch, length = own.shape
    live = flags & LIVE != 0
    starts = jnp.concatenate([jnp.ones_like(live[:, :1]), jnp.diff(own, axis=1) != 0], axis=1)
    rows = jnp.arange(batch)[:, None]
    busy = jnp.zeros((batch, length), bool).at[rows, own].max(live, mode="drop")
    keep = live | (starts & ~jnp.take_along_axis(busy, own, axis=1))
    place = jnp.where(keep, jnp.cumsum(keep, axis=1) - 1, length)
    # No outer block has a higher number than there are pairs, as each has one.
    empty = jnp.broadcast_to(own[:, -1:], own.shape), jnp.zeros_like(other), jnp.zeros_like(flags)
    own, other, flags = (
        x.at[rows, place].set(y, mode="drop")
        for x, y in zip(empty, (own, other, flags), strict=True)
    )
    return own, other, flags, jnp.sum(keep, axis=1)


def ranges(
    pairs: Pairs, rule: MaskRule, tokens: Tokens, block_q: int, block_k: int, *, by_rows: bool
) -> tuple[Int[Array, "B P"], Int[Array, "B N 3"]]:
    """The live pairs of every outer block as a range of a list, those without a mask first.

    Args:
        pairs: sorted by the outer block, each of which has at least one.
        rule: tells which pairs need no mask.
        tokens: padded to whole blocks with segment 0.
        block_q: queries in a block.
        block_k: keys in a block.
        by_rows: the outer blocks are those of queries, not of keys.

    Returns:
        Inner blocks, and where those of each outer block start, start to need a mask, and stop.
    """
    live, _, whole = _kinds(pairs, rule, tokens, block_q, block_k)
    own, other = (pairs.q, pairs.k) if by_rows else (pairs.k, pairs.q)
    own, other = (jnp.broadcast_to(x, live.shape).astype(jnp.int32) for x in (own, other))
    positions, block = (tokens.q_positions, block_q) if by_rows else (tokens.kv_positions, block_k)
    # 3 n + 0, 1, 2 for a pair of outer block n that needs no mask, needs one, and is dead.
    kind = 3 * own + jnp.where(whole, 0, jnp.where(live, 1, 2))
    order = jnp.argsort(kind, axis=1, stable=True)
    edges = jnp.arange(positions.shape[1] // block * 3)
    bounds = jax.vmap(jnp.searchsorted, (0, None))(jnp.sort(kind, axis=1), edges)
    bounds = bounds.reshape(live.shape[0], -1, 3).astype(jnp.int32)
    return jnp.take_along_axis(other, order, axis=1), bounds


def _kinds(
    pairs: Pairs, rule: MaskRule, tokens: Tokens, block_q: int, block_k: int
) -> tuple[Bool[Array, "B P"], Bool[Array, "B P"], Bool[Array, "B P"]]:
    """Which pairs have something to compute, which of them one segment, and which no mask."""
    queries = _Ranges.of(tokens.q_positions, tokens.q_segments, block_q).at(pairs.q)
    keys = _Ranges.of(tokens.kv_positions, tokens.kv_segments, block_k).at(pairs.k)
    live = (queries.low <= keys.high) & (keys.low <= queries.high) & pairs.live
    alike = live & queries.uniform & keys.uniform
    if not isinstance(rule, RangeRule):
        return live, alike, jnp.zeros_like(live)
    visible = rule.all_visible(queries.first, queries.last, keys.first, keys.last)
    return live, alike, alike & visible


class _Ranges(NamedTuple):
    """Of blocks: range of positions, range of segments that are not padding, whether just one."""

    first: Int[Array, "B N"]
    last: Int[Array, "B N"]
    low: Int[Array, "B N"]
    high: Int[Array, "B N"]
    uniform: Bool[Array, "B N"]

    @classmethod
    def of(cls, positions: Int[Array, "B T"], segments: Int[Array, "B T"], block: int) -> "_Ranges":
        batch = positions.shape[0]
        positions, segments = (x.reshape(batch, -1, block) for x in (positions, segments))
        limits = jnp.iinfo(segments.dtype)
        low = jnp.min(jnp.where(segments == 0, limits.max, segments), axis=2)
        high = jnp.max(jnp.where(segments == 0, limits.min, segments), axis=2)
        uniform = (low == high) & jnp.all(segments != 0, axis=2)
        return cls(jnp.min(positions, axis=2), jnp.max(positions, axis=2), low, high, uniform)

    def at(self, index: Int[Array, "R P"]) -> "_Ranges":
        index = jnp.broadcast_to(index, (self.low.shape[0], index.shape[1]))
        return _Ranges(*(jnp.take_along_axis(x, index, axis=1) for x in self))


def _first_of_each(asked: Bool[Array, "B P"], starts: Bool[Array, "B P"]) -> Bool[Array, "B P"]:
    """The first that is ``asked`` from each start on."""
    place = jnp.arange(asked.shape[1])[None]
    latest = lax.cummax(jnp.where(asked, place, -1), axis=1)
    before = jnp.concatenate([jnp.full_like(latest[:, :1], -1), latest[:, :-1]], axis=1)
    return asked & (before < lax.cummax(jnp.where(starts, place, 0), axis=1))


def _repeat_the_last_live(x: Int[Array, "B P"], live: Bool[Array, "B P"]) -> Int[Array, "B P"]:
    """``x`` where live, elsewhere that of the live entry before, or of the first one."""
    before = lax.cummax(jnp.where(live, jnp.arange(x.shape[1])[None], -1), axis=1)
    first = jnp.argmax(live, axis=1)[:, None]
    return jnp.take_along_axis(x, jnp.where(before < 0, first, before), axis=1)

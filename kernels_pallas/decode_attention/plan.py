"""What the TPU copies from HBM: lists of units of slots, and which query sees each slot of them.

Everything about masks is decided here, outside the kernels, as it takes a few bytes of each slot.
A unit of which nothing is seen is not listed, whatever the reason: a length, a page that is not
there, a window, a segment, a selection.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

# Queries of a row, a bit of a word each.
MOST_QUERIES = 31


class Plan(NamedTuple):
    """Lists of units, in blocks of equally many, and which blocks to handle.

    A row may be dealt out to several parts, block by block. The last block of a list is empty, for
    parts without any.

    Attributes:
        count: blocks that each part handles, at least 1.
        order: their numbers, the first ``count`` of each part.
        units: where units are, counted in units from the start of the pool; -1 for none.
        whole: whether some query sees each slot of a block.
        bits: which queries see a slot: bit ``t`` is query ``t``.
    """

    count: Int[Array, "BX L"]
    order: Int[Array, "BX L I"]
    units: Int[Array, "B L M"]
    whole: Int[Array, "B L N"]
    bits: Int[Array, "B L N 1 C"]


def copied(page: int, unit: int | None, block: int, itemsize: int) -> int:
    """Slots that one copy brings.

    Args:
        page: slots that lie in one piece.
        unit: slots of a selected unit; ``None`` without a selection.
        block: slots handled at a time.
        itemsize: bytes of an element; what is smaller than a word is copied with its neighbour.
    """
    if unit == 1:
        return 4 // itemsize
    limit = min(unit or page, block)
    return next(size for size in range(limit, 0, -1) if (unit or page) % size == 0)


def of_slots(
    shown: Bool[Array, "B T S"],
    pages: Int[Array, "B N"] | None,
    *,
    page: int,
    unit: int,
    block: int,
    split: int,
) -> Plan:
    """All slots: block ``i`` of a list is those from ``i · block`` on.

    Args:
        shown: what each query sees.
        pages: page table.
        page: slots of a page.
        unit: slots that one copy brings.
        block: slots of a block, whole units.
        split: parts of a row.
    """
    table = _table(shown, pages, page, unit)[:, None]
    return _plan(table[..., 0], table[..., 1:], block // unit, split)


def of_selected(
    shown: Bool[Array, "B T S"],
    pages: Int[Array, "B N"] | None,
    selected: Int[Array, "B L M"],
    *,
    page: int,
    chosen: int,
    unit: int,
    block: int,
    split: int,
) -> Plan:
    """Units of ``chosen`` slots, each once; the other arguments are those of :func:`of_slots`."""
    slots = shown.shape[2]
    nowhere = jnp.int32(slots)
    ids = jnp.where((selected < 0) | (selected >= slots // chosen), nowhere, selected)
    if chosen > unit:
        parts = jnp.arange(chosen // unit, dtype=jnp.int32)[None, None, None]
        parts = ids[..., None] * (chosen // unit) + parts
        ids = jnp.where(ids[..., None] == nowhere, nowhere, parts)
        ids = ids.reshape(*ids.shape[:2], -1)
    ids = jnp.sort(ids, axis=2)
    together = max(1, unit // chosen)  # 2 tokens that share words
    group = ids // together
    edge = jnp.ones_like(ids[..., :1], bool)
    change = group[..., 1:] != group[..., :-1]
    leads = jnp.concatenate([edge, change], axis=2) & (ids < nowhere)
    # One look-up for all that is to know of a unit.
    table = _table(shown, pages, page, unit)[:, None]
    found = jnp.take_along_axis(table, jnp.where(leads, group, 0)[..., None], axis=2)
    nothing = jnp.where(jnp.arange(unit + 1) == 0, -1, 0)[None, None, None]
    found = jnp.where(leads[..., None], found, nothing)
    units, bits = found[..., 0], found[..., 1:]
    if together > 1:
        trails = jnp.concatenate([change, edge], axis=2)
        last = lax.cummin(jnp.where(trails, ids, nowhere), axis=2, reverse=True)
        present = jnp.stack([ids % together == 0, last % together == 1], axis=3)
        bits = jnp.where(present, bits, 0)
        units = jnp.where(jnp.any(bits != 0, axis=3), units, -1)
    return _plan(units, bits, block // unit, split)


def _table(
    shown: Bool[Array, "B T S"], pages: Int[Array, "B N"] | None, page: int, unit: int
) -> Int[Array, "B M W"]:
    """Of each unit of a row, the place (-1 if nothing of it is seen) and its slots' bits."""
    batch, queries, slots = shown.shape
    query = jnp.arange(queries, dtype=jnp.int32)[None, :, None]
    bits = jnp.sum(jnp.where(shown, jnp.int32(1) << query, 0), axis=1, dtype=jnp.int32)
    bits = bits.reshape(batch, slots // unit, unit)
    if pages is None:
        pages = jnp.arange(batch, dtype=jnp.int32)[:, None]
    inside = jnp.arange(page // unit, dtype=jnp.int32)[None, None]
    places = (pages[:, :, None] * (page // unit) + inside).reshape(batch, -1)
    places = jnp.where(jnp.any(bits != 0, axis=2), places, -1)
    return jnp.concatenate([places[..., None], bits], axis=2)


def _plan(
    units: Int[Array, "B L M"], bits: Int[Array, "B L M U"], per_block: int, split: int
) -> Plan:
    batch, lists, count, unit = bits.shape
    missing = -count % per_block + per_block
    units = jnp.pad(units, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
    bits = jnp.pad(bits, ((0, 0), (0, 0), (0, missing), (0, 0)))
    bits = bits.reshape(batch, lists, -1, 1, per_block * unit)
    blocks = bits.shape[2]
    number = jnp.arange(blocks, dtype=jnp.int32)[None, None]
    # Those with something to see first, in their order; then the empty one.
    order = jnp.sort(jnp.where(jnp.any(bits != 0, axis=(3, 4)), number, blocks - 1), axis=2)
    used = jnp.sum(order < blocks - 1, axis=2, dtype=jnp.int32)
    order = jnp.pad(order, ((0, 0), (0, 0), (0, -blocks % split)), constant_values=blocks - 1)
    order = order.reshape(batch, lists, -1, split).transpose(0, 3, 1, 2)
    part = jnp.arange(split, dtype=jnp.int32)[None, :, None]
    used = jnp.maximum((used[:, None] - part + split - 1) // split, 1)
    return Plan(
        used.reshape(batch * split, lists),
        order.reshape(batch * split, lists, -1),
        units,
        jnp.all(bits != 0, axis=(3, 4)).astype(jnp.int32),
        bits,
    )

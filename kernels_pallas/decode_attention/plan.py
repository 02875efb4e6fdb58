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
    """Lists of units, in blocks of equally many; rows are split before, so ``B`` counts parts.

    Attributes:
        blocks: blocks of each list that the kernel handles, at least 1.
        units: where units are, counted in units from the start of the pool's pages; -1 for none.
        whole: whether some query sees each slot of a block.
        bits: which queries see a slot: bit ``t`` is query ``t``.
    """

    blocks: Int[Array, "B L"]
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
    in_order: bool = False,
) -> Plan:
    """All slots.

    Args:
        shown: what each query sees.
        pages: page table.
        page: slots of a page.
        unit: slots that one copy brings.
        block: slots of a block, whole units.
        split: parts of a row.
        in_order: block ``i`` holds the slots from ``i · block`` on, with holes where nothing is
            seen; otherwise what is listed comes first.
    """
    batch, _, slots = shown.shape
    bits = _bits(shown).reshape(batch, 1, slots // unit, unit)
    number = jnp.arange(slots // unit, dtype=jnp.int32)[None, None]
    units = jnp.where(jnp.any(bits != 0, axis=3), number, -1)
    if not in_order:
        order = jnp.argsort(units < 0, axis=2, stable=True)
        units = jnp.take_along_axis(units, order, axis=2)
        bits = jnp.take_along_axis(bits, order[..., None], axis=2)
    return _plan(units, bits, pages, page // unit, block // unit, split)


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
    """Units of ``chosen`` slots, each once; the arguments are those of :func:`of_slots`."""
    slots = shown.shape[2]
    nowhere = jnp.int32(slots)
    ids = jnp.where((selected < 0) | (selected >= slots // chosen), nowhere, selected)
    if chosen > unit:
        parts = jnp.arange(chosen // unit, dtype=jnp.int32)[None, None, None]
        ids = jnp.where(
            ids[..., None] == nowhere, nowhere, ids[..., None] * (chosen // unit) + parts
        )
        ids = ids.reshape(*ids.shape[:2], -1)
    ids = jnp.sort(ids, axis=2)
    together = max(1, unit // chosen)  # 2 tokens that share words
    group = ids // together
    edge = jnp.ones_like(ids[..., :1], bool)
    change = group[..., 1:] != group[..., :-1]
    leads = jnp.concatenate([edge, change], axis=2) & (ids < nowhere)
    units = jnp.where(leads, group, -1)
    table = _bits(shown).reshape(shown.shape[0], 1, slots // unit, unit)
    bits = jnp.take_along_axis(table, jnp.maximum(units, 0)[..., None], axis=2)
    if together > 1:
        trails = jnp.concatenate([change, edge], axis=2)
        last = lax.cummin(jnp.where(trails, ids, nowhere), axis=2, reverse=True)
        present = jnp.stack([ids % together == 0, last % together == 1], axis=3)
        bits = jnp.where(present, bits, 0)
    bits = jnp.where(leads[..., None], bits, 0)
    units = jnp.where(jnp.any(bits != 0, axis=3), units, -1)
    return _plan(units, bits, pages, page // unit, block // unit, split)


def _bits(shown: Bool[Array, "B T S"]) -> Int[Array, "B S"]:
    query = jnp.arange(shown.shape[1], dtype=jnp.int32)[None, :, None]
    return jnp.sum(jnp.where(shown, jnp.int32(1) << query, 0), axis=1, dtype=jnp.int32)


def _plan(
    units: Int[Array, "B L M"],
    bits: Int[Array, "B L M U"],
    pages: Int[Array, "B N"] | None,
    per_page: int,
    per_block: int,
    split: int,
) -> Plan:
    """Units of a row, -1 for none, with their bits; dealt out to ``split`` parts in turn."""
    batch, lists, count, unit = bits.shape
    missing = -count % (per_block * split)
    units = jnp.pad(units, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
    bits = jnp.pad(bits, ((0, 0), (0, 0), (0, missing), (0, 0)))
    units = units.reshape(batch, lists, -1, split).transpose(0, 3, 1, 2)
    bits = bits.reshape(batch, lists, -1, split, unit).transpose(0, 3, 1, 2, 4)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    table = rows if pages is None else jnp.maximum(pages, 0)
    found = jnp.maximum(units, 0).reshape(batch, -1)
    place = jnp.take_along_axis(table, found // per_page, axis=1) * per_page + found % per_page
    units = jnp.where(units < 0, -1, place.reshape(units.shape))
    units = units.reshape(batch * split, lists, -1)
    listed = jnp.arange(1, units.shape[2] + 1, dtype=jnp.int32)[None, None]
    used = jnp.max(jnp.where(units < 0, 1, listed), axis=2)
    bits = bits.reshape(batch * split, lists, -1, 1, per_block * unit)
    whole = jnp.all(bits != 0, axis=(3, 4)).astype(jnp.int32)
    return Plan((used + per_block - 1) // per_block, units, whole, bits)

"""What the TPU copies from HBM: lists of units of slots, and which query sees each slot of them.

Everything about masks is decided here, outside the kernels, as it takes a few bytes of each slot.
A unit of which nothing is seen is not listed, whatever the reason: a length, a page that is not
there, a window, a segment, a selection.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Queries of a row, a bit of a word each.
MOST_QUERIES = 31
# Slots that HBM holds together.
_TILE = 8
# Entries of a table in which one product finds.
_DIRECT = 2048


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
        page: slots that lie in one piece, a multiple of 8.
        unit: slots of a selected unit, 1 or a multiple of 8; ``None`` without a selection.
        block: slots handled at a time.
        itemsize: bytes of an element; what is smaller than a word is copied with its neighbour.
    """
    if unit == 1:
        return 4 // itemsize
    whole = unit or page
    largest = max(_TILE, min(whole, block) // _TILE * _TILE)
    return next(size for size in range(largest, 0, -_TILE) if whole % size == 0)


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
    bits = _bits(shown, unit)
    if pages is None:
        pages = jnp.arange(shown.shape[0], dtype=jnp.int32)[:, None]
    inside = jnp.arange(page // unit, dtype=jnp.int32)[None, None]
    places = (pages[:, :, None] * (page // unit) + inside).reshape(shown.shape[0], -1)
    places = jnp.where(jnp.any(bits != 0, axis=2), places, -1)
    return _plan(places[:, None], bits[:, None], block // unit, split)


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
    group = jnp.where(leads, group, 0)
    table = _bits(shown, unit)
    bits = _look_up(table, group, shown.shape[1])
    bits = jnp.where(leads[..., None], bits, 0)
    if together > 1:
        trails = jnp.concatenate([change, edge], axis=2)
        last = lax.cummin(jnp.where(trails, ids, nowhere), axis=2, reverse=True)
        present = jnp.stack([ids % together == 0, last % together == 1], axis=3)
        bits = jnp.where(present, bits, 0)
    per_page = page // unit
    if pages is None:
        places = jnp.arange(shown.shape[0], dtype=jnp.int32)[:, None, None] * per_page + group
    else:
        own = _look_up(jnp.maximum(pages, 0)[..., None], group // per_page, 31)[..., 0]
        places = own * per_page + group % per_page
    units = jnp.where(jnp.any(bits != 0, axis=3), places, -1)
    return _plan(units, bits, block // unit, split)


def _bits(shown: Bool[Array, "B T S"], unit: int) -> Int[Array, "B M U"]:
    """Which queries see each slot, by units."""
    batch, queries, slots = shown.shape
    query = jnp.arange(queries, dtype=jnp.int32)[None, :, None]
    bits = jnp.sum(jnp.where(shown, jnp.int32(1) << query, 0), axis=1, dtype=jnp.int32)
    return bits.reshape(batch, slots // unit, unit)


def _look_up(
    table: Int[Array, "B M U"], at: Int[Array, "B L I"], bits: int
) -> Int[Array, "B L I U"]:
    """``table[b, at[b, l, i]]``, of numbers below ``2 ** bits``, as products of matrices.

    XLA hands a gather to the SparseCore of the chips that have one, and programs in which that
    runs beside a kernel do not compile with libtpu 0.0.52. Eight bits at a time are exact in
    bfloat16. Of a long table the row of 128 is found first, then the place in it.
    """
    batch, length, width = table.shape
    row = 1 if length <= _DIRECT else 128
    rows = -(-length // row)
    table = jnp.pad(table, ((0, 0), (0, rows * row - length), (0, 0)))
    parts = jnp.stack([(table >> shift) & 255 for shift in range(0, bits, 8)], axis=-1)
    found = jnp.einsum(
        "blir,brx->blix",
        _one_hot(at // row, rows),
        parts.reshape(batch, rows, -1).astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    found = found.reshape(*at.shape, row, -1)
    if row > 1:
        found = jnp.where(_one_hot(at % row, row)[..., None] > 0, found, 0)
    found = jnp.sum(found, axis=3).astype(jnp.int32).reshape(*at.shape, width, -1)
    shifts = 8 * jnp.arange(found.shape[-1], dtype=jnp.int32)[None, None, None, None]
    return jnp.sum(found << shifts, axis=-1, dtype=jnp.int32)


def _one_hot(at: Int[Array, "B L I"], count: int) -> Float[Array, "B L I N"]:
    place = jnp.arange(count, dtype=at.dtype)[None, None, None]
    return (at[..., None] == place).astype(jnp.bfloat16)


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

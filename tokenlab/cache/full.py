"""The cache that forgets nothing."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax.numpy as jnp

from tokenlab.cache.base import CachePolicy, CacheView, Entries, Heads, Reading, Room
from tokenlab.core.arrays import Array, Float, Int


class Slots(flax.struct.PyTreeNode):
    """Entries of each row in numbered slots; heads first, the order in which they are read.

    Attributes:
        k: keys.
        v: values.
        positions: position of the entry in each slot, -1 where there is none.
        rows: where these rows are among those of ``k`` and ``v``; None is all, in order.
    """

    k: Float[Array, "P K S E"]
    v: Float[Array, "P K S E"]
    positions: Int[Array, "B S"]
    rows: Int[Array, " B"] | None = None

    @classmethod
    def empty(cls, room: Room, heads: Heads, count: int) -> Slots:
        """``count`` empty slots in every row."""
        shape = (room.batch, heads.num_kv_heads, count, heads.width)
        return cls(
            k=jnp.zeros(shape, room.dtype),
            v=jnp.zeros(shape, room.dtype),
            positions=jnp.full((room.batch, count), -1, jnp.int32),
        )

    def write(self, new: Entries, slots: Int[Array, "B T"]) -> Slots:
        """Entries into ``slots``; padding, and slots that are not there, are left out."""
        count = self.positions.shape[1]
        inside = (new.segments > 0) & (slots >= 0) & (slots < count)
        slots = jnp.where(inside, slots, count)
        rows = jnp.arange(len(slots))[:, None]
        return self.replace(
            k=written(self.k, new.k, slots, self.rows),
            v=written(self.v, new.v, slots, self.rows),
            positions=self.positions.at[rows, slots].set(new.positions, mode="drop"),
        )

    def lanes(self, rows: Int[Array, " N"]) -> Slots:
        """Some rows, their keys and values left where they are."""
        return self.replace(positions=self.positions[rows], rows=rows)

    def rejoined(self, lanes: Slots) -> Slots:
        """All rows again, after something was written to ``lanes`` of them."""
        positions = self.positions.at[lanes.rows].set(lanes.positions)
        return lanes.replace(positions=positions, rows=None)

    def before(self, lengths: Int[Array, " B"]) -> Slots:
        """Without the entries at positions from ``lengths`` on."""
        kept = self.positions < lengths[:, None]
        return self.replace(positions=jnp.where(kept, self.positions, -1))

    def count(self) -> Float[Array, " B"]:
        """Entries of each row."""
        return jnp.sum(self.positions >= 0, axis=1).astype(jnp.float32)

    def view(self, q: Float[Array, "B T H E"]) -> CacheView:
        """All entries."""
        filled = (self.positions >= 0).astype(jnp.int32)
        pages = None if self.rows is None else self.rows[:, None]
        return CacheView(q, self.k, self.v, self.positions, filled, pages=pages)


def written(
    pool: Float[Array, "P K S E"],
    new: Float[Array, "B T K E"],
    slots: Int[Array, "B T"],
    rows: Int[Array, " B"] | None = None,
) -> Float[Array, "P K S E"]:
    """``pool[rows[b], :, slots[b, t]] = new[b, t]``; slots from S on are left out."""
    at, entries = as_rows(pool.shape, new, slots, rows)
    return with_rows(pool, at, entries.astype(pool.dtype))


def as_rows(
    shape: tuple[int, ...],
    new: Float[Array, "B T K E"],
    slots: Int[Array, "B T"],
    rows: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, " N"], Float[Array, "N E"]]:
    """Entries as rows of the matrix that a pool of that shape is, and which rows those are."""
    batch, heads, count, width = shape
    rows = jnp.arange(batch) if rows is None else rows
    first = count * (heads * rows[:, None, None] + jnp.arange(heads)[None, :, None])
    at = jnp.where(slots[:, None] < count, first + slots[:, None], batch * heads * count)
    return at.reshape(-1), new.swapaxes(1, 2).reshape(-1, width)


def with_rows(
    pool: Float[Array, "B K S E"], at: Int[Array, " N"], rows: Float[Array, "N E"]
) -> Float[Array, "B K S E"]:
    """The pool with some rows of its matrix set, which XLA does in place."""
    flat = pool.reshape(-1, pool.shape[-1]).at[at].set(rows, mode="drop")
    return flat.reshape(pool.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullCache(CachePolicy):
    """Keeps every key and value; slot i of a row holds its position i.

    Rows fill independently, so prompts of different length need no left padding. Entries beyond
    the room are dropped; decoders refuse such a request before they start.
    """

    def init(self, room: Room, heads: Heads) -> Slots:
        """A slot for every position."""
        return Slots.empty(room, heads, room.capacity)

    def read(self, state: Slots, new: Entries, *, heads: Heads) -> Reading:
        """Every entry, for every query."""
        return Reading((state.view(new.q),), None, state)

    def append(self, state: Slots, new: Entries, *, heads: Heads) -> Slots:
        """Writes entries at their positions."""
        return state.write(new, new.positions)

    def truncate(self, state: Slots, lengths: Int[Array, " B"]) -> Slots:
        """Exact: everything before ``lengths`` is there."""
        return state.before(lengths)

    def held(self, state: Slots) -> Float[Array, " B"]:
        """The entries of a row."""
        return state.count()

    def lanes(self, state: Slots, rows: Int[Array, " N"]) -> Slots:
        """Copies no keys."""
        return state.lanes(rows)

    def rejoined(self, state: Slots, rows: Int[Array, " N"], lanes: Slots) -> Slots:
        """Copies no keys."""
        return state.rejoined(lanes)

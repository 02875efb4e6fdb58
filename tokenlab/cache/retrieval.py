"""What caches have in common that keep all tokens and read some of them."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.compute_on import compute_on

from tokenlab.cache.base import CachePolicy, CacheView, Entries, Heads, Room
from tokenlab.cache.choosing import compacted
from tokenlab.cache.full import Slots, as_rows, with_rows
from tokenlab.core.arrays import Array, Bool, Float, Int

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


class Store(flax.struct.PyTreeNode):
    """Every token of every row, slot i for position i, in the device's memory or the host's.

    Attributes:
        keys: keys.
        values: values.
        positions: position of the entry in each slot, -1 where there is none.
        keys_away: whether keys are in host memory.
        values_away: whether values are.
    """

    keys: Float[Array, "B K S E"]
    values: Float[Array, "B K S E"]
    positions: Int[Array, "B S"]
    keys_away: bool = flax.struct.field(pytree_node=False)
    values_away: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def empty(cls, room: Room, heads: Heads, *, keys_away: bool, values_away: bool) -> Store:
        """A slot for every position."""
        slots = Slots.empty(room, heads, room.capacity)
        k, v = (
            jax.device_put(x, _HOST) if away else x
            for x, away in ((slots.k, keys_away), (slots.v, values_away))
        )
        return cls(k, v, slots.positions, keys_away, values_away)

    @property
    def filled(self) -> Bool[Array, "B S"]:
        """Slots with an entry."""
        return self.positions >= 0

    @property
    def lengths(self) -> Int[Array, " B"]:
        """One more than the last position of each row."""
        return jnp.max(self.positions, axis=1) + 1

    def keys_here(self) -> Float[Array, "B K S E"]:
        """All keys, on the device."""
        return jax.device_put(self.keys, _DEVICE)

    def write(self, new: Entries) -> Store:
        """With the entries at their positions."""
        count = self.positions.shape[1]
        slots = jnp.where((new.segments > 0) & (new.positions < count), new.positions, count)
        rows = jnp.arange(len(slots))[:, None]

        def with_new(pool: Array, entries: Array, away: bool) -> Array:
            at, entries = as_rows(pool.shape, entries.astype(pool.dtype), slots)
            return _where_it_is(with_rows, away, pool, at, entries)

        return self.replace(
            keys=with_new(self.keys, new.k, self.keys_away),
            values=with_new(self.values, new.v, self.values_away),
            positions=self.positions.at[rows, slots].set(new.positions, mode="drop"),
        )

    def before(self, lengths: Int[Array, " B"]) -> Store:
        """Without the entries at positions from ``lengths`` on."""
        kept = self.positions < lengths[:, None]
        return self.replace(positions=jnp.where(kept, self.positions, -1))

    def take(self, rows: Int[Array, " N"]) -> Store:
        """Some rows."""

        def taken(x: Array, rows: Array) -> Array:
            return jnp.take(x, rows, axis=0, mode="clip")

        return self.replace(
            keys=_where_it_is(taken, self.keys_away, self.keys, rows),
            values=_where_it_is(taken, self.values_away, self.values, rows),
            positions=taken(self.positions, rows),
        )

    def put(self, rows: Int[Array, " N"], other: Store) -> Store:
        """With the rows of another in the place of ``rows``."""

        def put(x: Array, rows: Array, new: Array) -> Array:
            return x.at[rows].set(new, mode="drop")

        return self.replace(
            keys=_where_it_is(put, self.keys_away, self.keys, rows, other.keys),
            values=_where_it_is(put, self.values_away, self.values, rows, other.values),
            positions=put(self.positions, rows, other.positions),
        )

    def gather(
        self, places: Int[Array, "B L M"]
    ) -> tuple[Float[Array, "B K M E"], Float[Array, "B K M E"]]:
        """Keys and values in slots ``places`` (of all heads alike where L is 1), on the device."""
        batch, heads, slots, width = self.keys.shape
        first = slots * jnp.arange(batch * heads).reshape(batch, heads, 1)
        at = first + jnp.maximum(places, 0)

        def gathered(x: Array, at: Array) -> Array:
            return jnp.take(x.reshape(-1, width), at, axis=0, mode="clip")

        k = _where_it_is(gathered, self.keys_away, self.keys, at.reshape(-1))
        v = _where_it_is(gathered, self.values_away, self.values, at.reshape(-1))
        k, v = (x.reshape(*at.shape, width) for x in jax.device_put((k, v), _DEVICE))
        return k, v

    def view(
        self, q: Float[Array, "B T H E"], chosen: Bool[Array, "B L S"], *, most: int
    ) -> CacheView:
        """The chosen slots, at most ``most`` of a head: named where they lie, or gathered."""
        places = compacted(chosen, min(most, chosen.shape[2]))
        if not (self.keys_away or self.values_away):
            filled = self.filled.astype(jnp.int32)
            return CacheView(q, self.keys, self.values, self.positions, filled, selected=places)
        k, v = self.gather(places)
        there = jnp.maximum(places, 0)
        positions = jnp.take_along_axis(self.positions[:, None], there, axis=2)
        segments = (places >= 0).astype(jnp.int32)
        if places.shape[1] == 1:
            return CacheView(q, k, v, positions[:, 0], segments[:, 0])
        return CacheView(q, k, v, positions, segments)


def _where_it_is(function: Any, away: bool, *arrays: Array) -> Any:
    """``function(*arrays)``; in host memory, and left there, where the first array is."""
    if not away:
        return function(*arrays)
    arrays = tuple(jax.device_put(array, _HOST) for array in arrays)
    return compute_on("device_host")(jax.jit(function))(*arrays)


class Reads(flax.struct.PyTreeNode):
    """What was read of each row so far.

    Attributes:
        chosen: candidates that the last pass read, of each key head or of all alike.
        passes: passes in which the row had tokens and something to choose from.
        selections: those of them in which it was chosen anew.
        moved: tokens chosen that had not been chosen in the pass before, a mean over heads.
    """

    chosen: Bool[Array, "B L S"]
    passes: Float[Array, " B"]
    selections: Float[Array, " B"]
    moved: Float[Array, " B"]

    @classmethod
    def none(cls, room: Room, lists: int) -> Reads:
        """Nothing yet."""
        zero = jnp.zeros(room.batch, jnp.float32)
        return cls(jnp.zeros((room.batch, lists, room.capacity), bool), zero, zero, zero)

    def then(
        self,
        chosen: Bool[Array, "B L S"],
        *,
        there: Bool[Array, " B"],
        anew: Bool[Array, " B"],
    ) -> Reads:
        """After a pass; rows that are not ``anew`` read what they read before.

        Args:
            chosen: what rows that choose anew read.
            there: rows that read at all.
            anew: those of them that choose anew.
        """
        after = jnp.where(anew[:, None, None], chosen, self.chosen)
        fresh = jnp.mean(jnp.sum(after & ~self.chosen, axis=2, dtype=jnp.float32), axis=1)
        return Reads(
            chosen=after,
            passes=self.passes + there,
            selections=self.selections + anew,
            moved=self.moved + fresh,
        )

    def before(self, lengths: Int[Array, " B"]) -> Reads:
        """Without slots from ``lengths`` on."""
        kept = jnp.arange(self.chosen.shape[2])[None] < lengths[:, None]
        return self.replace(chosen=self.chosen & kept[:, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(CachePolicy):
    """Caches that keep all tokens and read some of them.

    A state has a ``store`` and ``reads``; other leaves are on the device, rows first.

    Attributes:
        offload: whether keys and values lie in host memory, where only what is read leaves it.
    """

    offload: bool = False

    def held(self, state: Any) -> Float[Array, " B"]:
        """All tokens of the row."""
        return jnp.sum(state.store.filled, axis=1, dtype=jnp.float32)

    def fork(self, state: Any, rows: Int[Array, " N"]) -> Any:
        """The store where it lies, the rest on the device."""
        rest = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), state.replace(store=None))
        return rest.replace(store=state.store.take(rows))

    def insert(self, state: Any, rows: Int[Array, " N"], other: Any) -> Any:
        """Likewise."""
        rest = jax.tree.map(
            lambda x, new: x.at[rows].set(new),
            state.replace(store=None),
            other.replace(store=None),
        )
        return rest.replace(store=state.store.put(rows, other.store))

    def counters(self, state: Any) -> dict[str, Float[Array, " B"]]:
        """Passes, selections, tokens that a selection added to the one before, and their bytes."""
        reads, keys = state.reads, state.store.keys
        size = 2 * keys.shape[1] * keys.shape[3] * keys.dtype.itemsize
        return {
            "cache_passes": reads.passes,
            "cache_selections": reads.selections,
            "cache_tokens_moved": reads.moved,
            "cache_bytes_moved": reads.moved * size,
        }

    @abc.abstractmethod
    def truncate(self, state: Any, lengths: Int[Array, " B"]) -> Any:
        """Exact: everything before ``lengths`` is there."""

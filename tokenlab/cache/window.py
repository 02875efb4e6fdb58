"""Caches of the newest tokens, with or without the first ones."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from tokenlab.cache.base import CachePolicy, Entries, Heads, Reading, Room
from tokenlab.cache.choosing import ranks
from tokenlab.cache.full import Slots
from tokenlab.core.arrays import Array, Float, Int
from tokenlab.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingCache(CachePolicy):
    """Keeps the newest tokens: position p lies in slot ``p % budget``.

    Of a row that leaves out positions, these are the tokens at the newest ``budget`` of them. What
    a query sees is the model's own mask rule: with ``SlidingWindow(size=budget)`` decoding equals
    the full cache's. Tokens of one pass see each other whatever the budget.

    Attributes:
        budget: tokens kept in a layer.
    """

    budget: int

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise UserError(f"RingCache.budget is {self.budget}; keep at least 1 token")

    def init(self, room: Room, heads: Heads) -> Slots:
        """Empty slots."""
        return Slots.empty(room, heads, min(self.budget, room.capacity))

    def read(self, state: Slots, new: Entries, *, heads: Heads) -> Reading:
        """Everything that is kept."""
        return Reading((state.view(new.q),), None, state)

    def append(self, state: Slots, new: Entries, *, heads: Heads) -> Slots:
        """Writes the newest tokens over the oldest."""
        return _write(state, new, sinks=0)

    def truncate(self, state: Slots, lengths: Int[Array, " B"]) -> Slots:
        """Without what is later; the window is shorter until it has filled again."""
        return state.before(lengths)

    def held(self, state: Slots) -> Float[Array, " B"]:
        """At most ``budget``."""
        return state.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkCache(CachePolicy):
    """Keeps the first tokens of a row and the newest.

    Reference: Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han, Mike Lewis, "Efficient Streaming
    Language Models with Attention Sinks", 2023, arXiv:2309.17453.

    Differences from the paper: a prompt is read whole, and only then cut to the budget.

    Attributes:
        budget: tokens kept in a layer, sinks among them.
        sinks: first tokens that are kept for good.
        renumber: whether entries and queries take their positions from their place in the cache,
            as in the paper, so that no distance exceeds the budget; otherwise they keep their own.
    """

    budget: int
    sinks: int = 4
    renumber: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sinks < self.budget:
            raise UserError(
                f"SinkCache has a budget of {self.budget} tokens for {self.sinks} sinks; "
                "use 0 <= sinks < budget"
            )

    @property
    def rotated(self) -> bool:
        """Not where positions are given anew at every pass."""
        return not self.renumber

    def init(self, room: Room, heads: Heads) -> Slots:
        """Empty slots."""
        return Slots.empty(room, heads, min(self.budget, room.capacity))

    def read(self, state: Slots, new: Entries, *, heads: Heads) -> Reading:
        """Everything that is kept, at its own positions or at those in the cache."""
        if not self.renumber:
            return Reading((state.view(new.q),), None, state)
        place = ranks(state.positions, state.positions >= 0)
        k = heads.rotate(state.k.swapaxes(1, 2), positions=place).swapaxes(1, 2)
        behind = jnp.sum(state.positions >= 0, axis=1, dtype=jnp.int32)[:, None]
        own = behind + jnp.arange(new.positions.shape[1], dtype=jnp.int32)[None]
        view = state.replace(k=k).view(heads.rotate(new.q, positions=own))
        return Reading((view,), own, state)

    def append(self, state: Slots, new: Entries, *, heads: Heads) -> Slots:
        """Writes sinks for good, other tokens over the oldest that is no sink."""
        return _write(state, new, sinks=self.sinks)

    def truncate(self, state: Slots, lengths: Int[Array, " B"]) -> Slots:
        """Without what is later."""
        return state.before(lengths)

    def held(self, state: Slots) -> Float[Array, " B"]:
        """At most ``budget``."""
        return state.count()


def _write(state: Slots, new: Entries, *, sinks: int) -> Slots:
    """Sinks by position, the rest around a ring; of tokens that share a slot, the newest."""
    ring = state.positions.shape[1] - sinks
    if ring < 1:
        return state.write(new, new.positions)
    last = jnp.max(jnp.where(new.segments > 0, new.positions, -1), axis=1, keepdims=True)
    slots = jnp.where(new.positions < sinks, new.positions, sinks + (new.positions - sinks) % ring)
    kept = (new.positions < sinks) | (new.positions > last - ring)
    state = state.write(new, jnp.where(kept, slots, -1))
    # Where a row leaves out positions, nothing has overwritten what is too old.
    old = (state.positions >= sinks) & (state.positions <= last - ring)
    return state.replace(positions=jnp.where(old, -1, state.positions))

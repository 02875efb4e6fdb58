"""Layers that remember in different ways."""

from __future__ import annotations

import dataclasses

from jaxtyping import PyTree

from tokenlab.cache.base import CachePolicy, Entries, Heads, Reading, Room
from tokenlab.core.arrays import Array, Float, Int
from tokenlab.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLayer(CachePolicy):
    """Policies that take turns: layer i has ``policies[i % len(policies)]``.

    A model of the pattern local, local, full is served by ``PerLayer(policies=(RingCache(budget=W),
    RingCache(budget=W), FullCache()))``. Asked itself, it answers as the policy of layer 0.

    Attributes:
        policies: one of each place in a turn.
    """

    policies: tuple[CachePolicy, ...]

    def __post_init__(self) -> None:
        if not self.policies:
            raise UserError("PerLayer has no policies; give at least one")

    @property
    def rotated(self) -> bool:
        """As layer 0 has it."""
        return self.of_layer(0).rotated

    def of_layer(self, number: int) -> CachePolicy:
        """The policy whose turn it is."""
        return self.policies[number % len(self.policies)].of_layer(number)

    def init(self, room: Room, heads: Heads) -> PyTree:
        """An empty cache of layer 0."""
        return self.of_layer(0).init(room, heads)

    def read(self, state: PyTree, new: Entries, *, heads: Heads) -> Reading:
        """As layer 0 reads."""
        return self.of_layer(0).read(state, new, heads=heads)

    def append(self, state: PyTree, new: Entries, *, heads: Heads) -> PyTree:
        """As layer 0 appends."""
        return self.of_layer(0).append(state, new, heads=heads)

    def truncate(self, state: PyTree, lengths: Int[Array, " B"]) -> PyTree:
        """As layer 0 forgets."""
        return self.of_layer(0).truncate(state, lengths)

    def held(self, state: PyTree) -> Float[Array, " B"]:
        """What layer 0 keeps."""
        return self.of_layer(0).held(state)

    def fork(self, state: PyTree, rows: Int[Array, " N"]) -> PyTree:
        """As layer 0 forks."""
        return self.of_layer(0).fork(state, rows)

    def insert(self, state: PyTree, rows: Int[Array, " N"], other: PyTree) -> PyTree:
        """As layer 0 inserts."""
        return self.of_layer(0).insert(state, rows, other)

    def counters(self, state: PyTree) -> dict[str, Float[Array, " B"]]:
        """What layer 0 counts."""
        return self.of_layer(0).counters(state)

    def after_pass(self, states: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        """Layers of one policy tell each other; those of several do not."""
        after = list(states)
        turns = len(self.policies)
        for place, policy in enumerate(self.policies):
            after[place::turns] = policy.after_pass(states[place::turns])
        return tuple(after)

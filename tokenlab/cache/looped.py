"""The caches of a looped stack, in one pass of which tokens of different recursions meet."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.cache.base import CachePolicy, Heads, Room
from tokenlab.cache.layers import Cache, LayerCache
from tokenlab.core.arrays import Array, Float, Int
from tokenlab.core.errors import UserError


class LoopedCache(flax.struct.PyTreeNode):
    """What ``Cache`` holds, with all recursions of a layer as rows of one state.

    Row b of recursion r is row ``r * B + b``, so that a pass of the layer may take each token to
    the keys of its own recursion.

    Attributes:
        policy: what is kept.
        heads: of each layer.
        order: layer and recursion of each cache, in the order of ``Cache.layer``.
        states: of the policy, by layer.
        pairs: query-key pairs attended so far, per cache and row.
    """

    policy: CachePolicy = flax.struct.field(pytree_node=False)
    heads: tuple[Heads, ...] = flax.struct.field(pytree_node=False)
    order: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)
    states: tuple[PyTree, ...]
    pairs: Float[Array, "C B"]

    @classmethod
    def empty(
        cls,
        policy: CachePolicy,
        room: Room,
        *,
        heads: tuple[Heads, ...],
        order: tuple[tuple[int, int], ...],
    ) -> LoopedCache:
        """Caches that have read nothing.

        Args:
            policy: what is kept.
            room: of one recursion.
            heads: of each layer.
            order: layer and recursion of each cache.

        Raises:
            UserError: the policy has no room, its layers tell each other what they saw, or the
                recursions of a layer have different caches.
        """
        for number, (layer, _) in enumerate(order):
            part = policy.of_layer(number)
            if type(part).after_pass is not CachePolicy.after_pass:
                raise UserError(
                    f"the layers of {type(part).__name__} tell each other what they saw in a pass, "
                    "and no pass of this decoder has them all; use cache=FullCache()"
                )
            if part != policy.of_layer(layer):
                raise UserError(
                    f"{type(policy).__name__} gives the recursions of a layer different caches, "
                    "and here they lie in one; use cache=FullCache()"
                )
        recursions = [sum(mine == layer for mine, _ in order) for layer in range(len(heads))]
        states = tuple(
            policy.of_layer(layer).init(room._replace(batch=count * room.batch), one)
            for layer, (one, count) in enumerate(zip(heads, recursions, strict=True))
        )
        return cls(policy, heads, order, states, jnp.zeros((len(order), room.batch)))

    def lanes(
        self, layer: int, rows: Int[Array, " N"], recursion: Int[Array, " N"] | int
    ) -> LayerCache:
        """What a layer is given for one token of each of some rows, in its own recursion."""
        policy = self.policy.of_layer(layer)
        state = policy.lanes(self.states[layer], recursion * self.pairs.shape[1] + rows)
        nothing = jnp.zeros(len(rows))
        return LayerCache(
            policy=policy, heads=self.heads[layer], stage="next", state=state, pairs=nothing
        )

    def rejoined(
        self,
        layer: int,
        rows: Int[Array, " N"],
        recursion: Int[Array, " N"] | int,
        lanes: LayerCache,
    ) -> LoopedCache:
        """After a pass of one layer over its ``lanes``."""
        at = recursion * self.pairs.shape[1] + rows
        state = self.policy.of_layer(layer).rejoined(self.states[layer], at, lanes.state)
        states = (*self.states[:layer], state, *self.states[layer + 1 :])
        numbers = jnp.asarray([i for i, (mine, _) in enumerate(self.order) if mine == layer])
        pairs = self.pairs.at[numbers[recursion], rows].add(lanes.pairs)
        return self.replace(states=states, pairs=pairs)

    def insert(self, rows: Int[Array, " N"], other: Cache) -> LoopedCache:
        """Puts rows that were read in whole passes in the place of ``rows``."""
        states = list(self.states)
        for (layer, recursion), theirs in zip(self.order, other.states, strict=True):
            at = recursion * self.pairs.shape[1] + rows
            states[layer] = self.policy.of_layer(layer).insert(states[layer], at, theirs)
        pairs = self.pairs.at[:, rows].set(other.pairs)
        return self.replace(states=tuple(states), pairs=pairs)

    def held(self) -> Float[Array, "C B"]:
        """Entries that each cache keeps of each row."""
        held = [self.policy.of_layer(i).held(state) for i, state in enumerate(self.states)]
        split = [each.reshape(-1, self.pairs.shape[1]) for each in held]
        return jnp.stack([split[layer][recursion] for layer, recursion in self.order])

    def counters(self) -> dict[str, Float[Array, " B"]]:
        """What the policies count of each row, by name, a sum over layers and recursions."""
        total: dict[str, Array] = {}
        for i, state in enumerate(self.states):
            for name, value in self.policy.of_layer(i).counters(state).items():
                of_rows = jnp.sum(value.reshape(-1, self.pairs.shape[1]), axis=0)
                total[name] = total[name] + of_rows if name in total else of_rows
        return total

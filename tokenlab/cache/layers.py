"""The caches of all layers, and attention of the tokens of one pass over one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.struct
import jax.numpy as jnp
from jaxtyping import PyTree

from kernels_pallas.block_sparse_attention import MaskRule
from tokenlab.cache.attending import Impl, merged, over_each_other, over_view
from tokenlab.cache.base import CachePolicy, Entries, Heads, Picked, Room
from tokenlab.core.arrays import Array, Bool, Float, Int

# What a layer says of how it read the beginnings of rows, by name.
Shares = dict[str, Float[Array, " B"]]
# Of turned entries: the result, the number of pairs, and such shares.
First = Callable[[Entries, Heads], tuple[Float[Array, "B T H E"], Float[Array, " B"], Shares]]
# What the tokens of a pass are: the beginnings of their rows, what follows, or a draft that is not
# appended yet.
Stage = Literal["first", "next", "draft"]


class LayerCache(flax.struct.PyTreeNode):
    """What one attention layer is given.

    Attributes:
        policy: what is kept.
        heads: of the layer.
        stage: what the tokens of the pass are.
        state: of the policy.
        pairs: query-key pairs that the pass attended, per row.
        seen: which tokens of the pass see which; None where the mask rule says it all.
        waiting: the entries of a draft, after the pass.
        shares: what the attention of the beginnings of rows says of itself, after the pass.
        picked: which tokens of the pass come to the layer; None is all, in order.
    """

    policy: CachePolicy = flax.struct.field(pytree_node=False)
    heads: Heads = flax.struct.field(pytree_node=False)
    stage: Stage = flax.struct.field(pytree_node=False)
    state: PyTree
    pairs: Float[Array, " B"]
    seen: Bool[Array, "B T T"] | None = None
    waiting: Entries | None = None
    shares: Shares = flax.struct.field(default_factory=dict)
    picked: Picked | None = None

    def attend(
        self, new: Entries, *, rule: MaskRule, impl: Impl | None, first: First | None = None
    ) -> tuple[Float[Array, "B T H E"], LayerCache]:
        """Attention of the tokens of a pass over each other and the past.

        Args:
            new: the tokens, not turned yet.
            rule: which keys a query may see.
            impl: form of the kernels.
            first: attention of the beginnings of rows with themselves, in place of the kernels.

        Returns:
            What they read, and the cache with them appended, or waiting where they are a draft.
        """
        out, after = self.look(new, rule=rule, impl=impl, first=first)
        return out, after.keep(new.following(out))

    def look(
        self,
        new: Entries,
        *,
        rule: MaskRule,
        impl: Impl | None,
        first: First | None = None,
        asks: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H E"], LayerCache]:
        """:meth:`attend` that appends nothing.

        Args:
            new: the tokens, whose keys are read.
            rule: which keys a query may see.
            impl: form of the kernels.
            first: as there.
            asks: the tokens whose queries count, None for all; what others read means nothing.
        """
        heads, policy = self.heads, self.policy
        turned = _turned(new, heads, new.positions)
        state, parts, pairs, shares = self.state, [], self.pairs, self.shares
        if self.stage != "first":
            asking = turned if policy.rotated else new
            if asks is not None:
                asking = asking._replace(segments=jnp.where(asks, new.segments, 0))
            reading = policy.read(state, asking, heads=heads)
            state = reading.state
            if reading.positions is not None:
                turned = _turned(new, heads, reading.positions)
            for view in reading.views:
                part, count = over_view(view, asking, heads, rule, impl)
                parts.append(part)
                pairs += count
        if self.stage == "first" and first is not None:
            out, count, shares = first(turned, heads)
        else:
            own, count = over_each_other(turned, self._seen(), heads, rule, impl, asks)
            out = merged([*parts, own])
        return out, self.replace(state=state, pairs=pairs + count, shares=shares)

    def keep(self, new: Entries) -> LayerCache:
        """With the tokens appended, or waiting where they are a draft."""
        kept = _turned(new, self.heads, new.positions) if self.policy.rotated else new
        if self.stage == "draft":
            waiting = kept if self.picked is None else kept.spread(self.picked)
            return self.replace(waiting=waiting)
        return self.replace(state=self.policy.append(self.state, kept, heads=self.heads))

    def _seen(self) -> Bool[Array, "B C C"] | None:
        """Which tokens that come see which."""
        if self.seen is None or self.picked is None:
            return self.seen
        return self.picked.gather(self.picked.gather(self.seen).swapaxes(1, 2)).swapaxes(1, 2)


def _turned(new: Entries, heads: Heads, positions: Int[Array, "B T"]) -> Entries:
    q, k = (heads.rotate(x, positions=positions) for x in (new.q, new.k))
    return new._replace(q=q, k=k)


class Cache(flax.struct.PyTreeNode):
    """The caches of all layers that have one, in the order in which a pass comes to them.

    Attributes:
        policy: what is kept.
        heads: of each layer.
        stage: what the tokens of the next pass are.
        states: of the policy, by layer.
        seen: which tokens of the next pass see which, or None.
        waiting: entries of a draft, by layer.
        pairs: query-key pairs attended so far, per layer and row.
        shares: what the attention of the beginnings said of itself, a mean over layers.
    """

    policy: CachePolicy = flax.struct.field(pytree_node=False)
    heads: tuple[Heads, ...] = flax.struct.field(pytree_node=False)
    stage: Stage = flax.struct.field(pytree_node=False)
    states: tuple[PyTree, ...]
    pairs: Float[Array, "L B"]
    seen: Bool[Array, "B T T"] | None = None
    waiting: tuple[Entries, ...] = ()
    shares: Shares = flax.struct.field(default_factory=dict)

    @classmethod
    def empty(cls, policy: CachePolicy, room: Room, heads: tuple[Heads, ...]) -> Cache:
        """Caches that have read nothing."""
        states = tuple(policy.of_layer(i).init(room, one) for i, one in enumerate(heads))
        return cls(policy, heads, "first", states, jnp.zeros((len(heads), room.batch)))

    def layer(self, number: int) -> LayerCache:
        """What layer ``number`` is given."""
        return LayerCache(
            policy=self.policy.of_layer(number), heads=self.heads[number], stage=self.stage,
            state=self.states[number], pairs=jnp.zeros(self.pairs.shape[1]), seen=self.seen,
        )  # fmt: skip

    def after(self, layers: tuple[LayerCache, ...]) -> Cache:
        """The caches after a pass, from what the layers gave back."""
        pairs = self.pairs + jnp.stack([layer.pairs for layer in layers])
        states = tuple(layer.state for layer in layers)
        if self.stage == "draft":
            waiting = tuple(layer.waiting for layer in layers)
            return self.replace(states=states, pairs=pairs, waiting=waiting)
        states = self.policy.after_pass(states)
        shares = self.shares if self.stage == "next" else _means([x.shares for x in layers])
        return self.replace(states=states, pairs=pairs, shares=shares, stage="next")

    def draft(self, seen: Bool[Array, "B T T"] | None = None) -> Cache:
        """The next pass reads a draft, of which nothing is kept before :meth:`accept`."""
        return self.replace(stage="draft", seen=seen, waiting=())

    def accept(self, index: Int[Array, "B N"], count: Int[Array, " B"]) -> Cache:
        """Appends tokens ``index[b, :count[b]]`` of the draft, in this order, drops the rest."""
        states = tuple(
            self.policy.of_layer(i).append(state, new.take(index, count), heads=heads)
            for i, (state, new, heads) in enumerate(
                zip(self.states, self.waiting, self.heads, strict=True)
            )
        )
        states = self.policy.after_pass(states)
        return self.replace(states=states, stage="next", seen=None, waiting=())

    def forget(self) -> Cache:
        """Drops the whole draft."""
        return self.replace(stage="next", seen=None, waiting=())

    def fork(self, rows: Int[Array, " N"]) -> Cache:
        """The caches of ``rows``, in which a row may be twice; they go on apart."""
        states = self._each(lambda policy, state: policy.fork(state, rows))
        shares = {name: share[rows] for name, share in self.shares.items()}
        return self.replace(states=states, pairs=self.pairs[:, rows], shares=shares)

    def insert(self, rows: Int[Array, " N"], other: Cache) -> Cache:
        """Puts the rows of another cache in the place of ``rows``."""
        states = tuple(
            self.policy.of_layer(i).insert(mine, rows, theirs)
            for i, (mine, theirs) in enumerate(zip(self.states, other.states, strict=True))
        )
        shares = {
            name: share.at[rows].set(other.shares[name]) for name, share in self.shares.items()
        }
        pairs = self.pairs.at[:, rows].set(other.pairs)
        return self.replace(states=states, pairs=pairs, shares=shares)

    def truncate(self, lengths: Int[Array, " B"]) -> Cache:
        """Forgets entries at positions from ``lengths`` on."""
        states = self._each(lambda policy, state: policy.truncate(state, lengths))
        return self.replace(states=states)

    def held(self) -> Float[Array, "L B"]:
        """Entries that each layer keeps of each row."""
        return jnp.stack(self._each(lambda policy, state: policy.held(state)))

    def counters(self) -> dict[str, Float[Array, " B"]]:
        """What the policies count of each row, by name, a sum over layers; and the shares."""
        total: dict[str, Array] = dict(self.shares)
        for counted in self._each(lambda policy, state: policy.counters(state)):
            for name, value in counted.items():
                total[name] = total[name] + value if name in total else value
        return total

    def _each(self, function):
        return tuple(function(self.policy.of_layer(i), s) for i, s in enumerate(self.states))


def _means(layers: list[Shares]) -> Shares:
    """Over the layers that have each."""
    names = {name for shares in layers for name in shares}
    return {
        name: jnp.mean(jnp.stack([x[name] for x in layers if name in x]), axis=0) for name in names
    }

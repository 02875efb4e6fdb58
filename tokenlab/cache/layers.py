"""The caches of all layers, and attention of the tokens of one pass over one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import flax.struct
import jax.numpy as jnp
from jaxtyping import PyTree

from kernels_pallas.block_sparse_attention import MaskRule, partial_attention
from kernels_pallas.decode_attention import merge_partial, partial_decode_attention
from tokenlab.cache.base import CachePolicy, CacheView, Entries, Heads, Room
from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.per_device import per_device

Impl = Literal["ref", "xla", "tpu", "gpu"]
Partial = tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]
# What a layer says of how it read the beginnings of rows, by name.
Shares = dict[str, Float[Array, " B"]]
# Of turned entries: the result, the number of pairs, and such shares.
First = Callable[[Entries, Heads], tuple[Float[Array, "B T H E"], Float[Array, " B"], Shares]]
# What the tokens of a pass are: the beginnings of their rows, what follows, or a draft that is not
# appended yet.
Stage = Literal["first", "next", "draft"]

_HEADS, _ROWS = ("batch", None, "heads", None), ("batch", None)
_POOL = ("batch", "heads", None, None)
_AXES = (
    {name: _HEADS for name in ("q", "k", "v")}
    | {name: _ROWS for name in ("q_positions", "kv_positions", "q_segments", "kv_segments")}
    | {"mask": ("batch", None, None), "selected": ("batch", None, None), "pages": _ROWS}
)


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
    """

    policy: CachePolicy = flax.struct.field(pytree_node=False)
    heads: Heads = flax.struct.field(pytree_node=False)
    stage: Stage = flax.struct.field(pytree_node=False)
    state: PyTree
    pairs: Float[Array, " B"]
    seen: Bool[Array, "B T T"] | None = None
    waiting: Entries | None = None
    shares: Shares = flax.struct.field(default_factory=dict)

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
        heads, policy = self.heads, self.policy
        turned = _turned(new, heads, new.positions)
        kept, state, parts = (turned if policy.rotated else new), self.state, []
        pairs, shares = self.pairs, {}
        if self.stage != "first":
            reading = policy.read(state, kept, heads=heads)
            state = reading.state
            if reading.positions is not None:
                turned = _turned(new, heads, reading.positions)
            for view in reading.views:
                part, count = over_view(view, new, heads, rule, impl)
                parts.append(part)
                pairs += count
        if self.stage == "first" and first is not None:
            out, count, shares = first(turned, heads)
        else:
            own, count = _over_each_other(turned, self.seen, heads, rule, impl)
            out = _merged([*parts, own])
        if self.stage == "draft":
            return out, self.replace(state=state, waiting=kept, pairs=pairs + count)
        state = policy.append(state, kept, heads=heads)
        return out, self.replace(state=state, pairs=pairs + count, shares=shares)


def _turned(new: Entries, heads: Heads, positions: Int[Array, "B T"]) -> Entries:
    q, k = (heads.rotate(x, positions=positions) for x in (new.q, new.k))
    return new._replace(q=q, k=k)


def _merged(parts: list[Partial]) -> Float[Array, "B T H E"]:
    if len(parts) == 1:
        return parts[0][0]
    outs, log_sum_exps = (jnp.stack(part) for part in zip(*parts, strict=True))
    return merge_partial(outs, log_sum_exps)[0]


def _over_each_other(
    new: Entries,
    seen: Bool[Array, "B T T"] | None,
    heads: Heads,
    rule: MaskRule,
    impl: Impl | None,
) -> tuple[Partial, Float[Array, " B"]]:
    """The tokens of a pass over themselves, and the pairs."""
    valid = (new.segments > 0).astype(jnp.int32)
    if new.q.shape[1] == 1:
        return _over_itself(new, heads), valid[:, 0].astype(jnp.float32)
    where = {"q_positions": new.positions, "q_segments": valid}
    if seen is None:
        attend = functools.partial(
            partial_attention, rule=rule, scale=heads.scale, softcap=heads.softcap, impl=impl
        )
        part = per_device(
            attend, axes=_AXES, out=(_HEADS, _HEADS[:3]), q=new.q, k=new.k, v=new.v, **where,
            kv_positions=new.positions, kv_segments=valid,
        )  # fmt: skip
        mask = _admitted(rule, new.positions, valid, new.positions, valid)
        return part, jnp.sum(mask, axis=(1, 2), dtype=jnp.float32)
    view = CacheView(new.q, new.k.swapaxes(1, 2), new.v.swapaxes(1, 2), new.positions, valid)
    return over_view(view, new, heads, rule, impl, mask=seen)


def _over_itself(new: Entries, heads: Heads) -> Partial:
    """One token of each row: its value, and its score as the log-sum-exp."""
    groups = heads.num_heads // heads.num_kv_heads
    k, v = (jnp.repeat(x, groups, axis=2) for x in (new.k, new.v))
    score = heads.scale * jnp.sum(new.q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1)
    if heads.softcap is not None:
        score = heads.softcap * jnp.tanh(score / heads.softcap)
    return v.astype(new.q.dtype), score


def over_view(
    view: CacheView,
    new: Entries,
    heads: Heads,
    rule: MaskRule,
    impl: Impl | None,
    mask: Bool[Array, "B T S"] | None = None,
) -> tuple[Partial, Float[Array, " B"]]:
    """The tokens of a pass over older ones, and the pairs, a mean over key heads."""
    q_segments = (new.segments > 0).astype(jnp.int32)
    if view.positions.ndim == 3:
        return _by_heads(view, new, q_segments, heads, rule, impl)
    arrays = {
        "q": view.q, "k": view.k, "v": view.v, "q_positions": new.positions,
        "kv_positions": view.positions, "q_segments": q_segments, "kv_segments": view.segments,
        "pages": view.pages, "selected": view.selected, "mask": mask,
    }  # fmt: skip
    shown = _admitted(rule, new.positions, q_segments, view.positions, view.segments)
    if mask is not None:
        shown &= mask
    attend = functools.partial(
        partial_decode_attention, rule=rule, scale=heads.scale, softcap=heads.softcap,
        impl=None if impl == "gpu" else impl,
    )  # fmt: skip
    pool = _POOL if view.pages is None else (None, *_POOL[1:])
    part = per_device(
        attend,
        axes=_AXES | {"k": pool, "v": pool},
        out=(_HEADS, _HEADS[:3]),
        **{name: array for name, array in arrays.items() if array is not None},
    )
    return part, _count(shown, view.selected)


def _count(shown: Bool[Array, "B T S"], selected: Int[Array, "B L M"] | None) -> Float[Array, " B"]:
    """Pairs of a row: what is shown, of what is selected where something is."""
    if selected is None:
        return jnp.sum(shown, axis=(1, 2), dtype=jnp.float32)
    readers = jnp.sum(shown, axis=1, dtype=jnp.float32)[:, None]
    readers = jnp.broadcast_to(readers, (*selected.shape[:2], shown.shape[2]))
    read = jnp.take_along_axis(readers, jnp.maximum(selected, 0), axis=2)
    return jnp.mean(jnp.sum(jnp.where(selected >= 0, read, 0), axis=2), axis=1)


def _admitted(
    rule: MaskRule,
    q_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    kv_segments: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    return rule(
        q_positions[:, :, None], kv_positions[:, None], q_segments[:, :, None], kv_segments[:, None]
    )


def _by_heads(
    view: CacheView,
    new: Entries,
    q_segments: Int[Array, "B T"],
    heads: Heads,
    rule: MaskRule,
    impl: Impl | None,
) -> tuple[Partial, Float[Array, " B"]]:
    """Key heads with entries of their own, as rows of their own."""
    batch, length = q_segments.shape
    count, groups = heads.num_kv_heads, heads.num_heads // heads.num_kv_heads

    def rows(x: Array) -> Array:
        return x.reshape(batch * count, *x.shape[2:])

    def queries(x: Array) -> Array:
        return rows(jnp.repeat(x[:, None], count, axis=1))

    q = view.q.reshape(batch, length, count, groups, -1)
    q, k, v = rows(jnp.moveaxis(q, 2, 1)), rows(view.k)[:, None], rows(view.v)[:, None]
    if view.bias is not None:
        q, k, v = _with_bias(q, k, v, rows(view.bias)[:, None], heads)
    flat = CacheView(q, k, v, rows(view.positions), rows(view.segments))
    several = new._replace(positions=queries(new.positions), segments=queries(q_segments))
    (out, log_sum_exp), pairs = over_view(flat, several, heads, rule, impl)

    def whole(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(batch, count, length, groups, *x.shape[3:]), 1, 2)
        return x.reshape(batch, length, count * groups, *x.shape[4:])

    part = whole(out[..., : view.v.shape[-1]]), whole(log_sum_exp)
    return part, jnp.mean(pairs.reshape(batch, count), axis=1)


def _with_bias(
    q: Float[Array, "B T G E"],
    k: Float[Array, "B 1 S E"],
    v: Float[Array, "B 1 S E"],
    bias: Float[Array, "B 1 S"],
    heads: Heads,
) -> tuple[Float[Array, "B T G F"], Float[Array, "B 1 S F"], Float[Array, "B 1 S F"]]:
    """``scale · (q · k) + bias`` as a product with one more column."""
    if heads.softcap is not None:
        raise ValueError("scores with a soft-cap take no bias")
    one = jnp.full((*q.shape[:-1], 1), 1 / heads.scale)
    q = jnp.concatenate([q.astype(jnp.float32), one], axis=-1)
    k = jnp.concatenate([k.astype(jnp.float32), bias[..., None]], axis=-1)
    v = jnp.concatenate([v.astype(jnp.float32), jnp.zeros_like(bias)[..., None]], axis=-1)
    return q, k, v


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

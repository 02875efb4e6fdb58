"""The cache family: what one attention layer keeps, and what a query sees of it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Int


class Heads(NamedTuple):
    """How the heads of a layer score, all of it static.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads; query head h reads ``h // (num_heads / num_kv_heads)``.
        width: width of a head.
        scale: factor of the scores.
        softcap: bound of the absolute scores, or None.
        rotate: ``rotate(x[B, T, N, E], positions=[B, T])`` turns queries or keys; equal layers have
            equal ones.
    """

    num_heads: int
    num_kv_heads: int
    width: int
    scale: float
    softcap: float | None
    rotate: Callable[..., Float[Array, "B T N E"]]


class Room(NamedTuple):
    """What a cache has to hold, all of it static.

    Attributes:
        batch: rows.
        capacity: tokens of the longest row.
        dtype: of keys and values.
    """

    batch: int
    capacity: int
    dtype: Any


class Picked(NamedTuple):
    """Some of the tokens of each row.

    Attributes:
        index: where in the row each of them stands, in order; behind the last it means nothing.
        kept: the same choice as a mask.
    """

    index: Int[Array, "B C"]
    kept: Bool[Array, "B T"]

    def in_use(self) -> Bool[Array, "B C"]:
        """Slots that hold a token."""
        count = jnp.sum(self.kept, axis=1, keepdims=True)
        return jnp.arange(self.index.shape[1])[None] < count

    def gather(self, x: Array) -> Array:
        """What they have of ``x [B, T, ...]``."""
        return jnp.take_along_axis(x, _along(self.index, x), axis=1)

    def spread(self, x: Array, into: Array) -> Array:
        """``into [B, T, ...]`` with what they have, ``x [B, C, ...]``, in their places."""
        place = jnp.maximum(_ranks(self.kept), 0)
        there = self.kept.reshape(*self.kept.shape, *[1] * (x.ndim - 2))
        return jnp.where(there, jnp.take_along_axis(x, _along(place, x), axis=1), into)

    def among(self, others: Picked) -> Picked:
        """The same tokens, numbered among ``others``, all of which they are."""
        index = jnp.take_along_axis(_ranks(others.kept), self.index, axis=1)
        kept = others.gather(self.kept) & others.in_use()
        return Picked(jnp.maximum(index, 0), kept)


class Entries(NamedTuple):
    """Queries, keys and values of the tokens of one pass.

    Attributes:
        q: queries, turned by their positions unless the policy's ``rotated`` is False.
        k: keys, likewise.
        v: values.
        positions: position of each token in its row.
        segments: 0 for padding, which comes after the tokens of a row.
    """

    q: Float[Array, "B T H E"]
    k: Float[Array, "B T K E"]
    v: Float[Array, "B T K E"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]

    def take(self, index: Int[Array, "B N"], count: Int[Array, " B"]) -> Entries:
        """Entries ``index[b, :count[b]]`` of each row but for padding, which comes behind them."""
        there = jnp.arange(index.shape[1])[None] < count[:, None]
        there &= jnp.take_along_axis(self.segments, index, axis=1) > 0
        index = jnp.take_along_axis(index, jnp.argsort(~there, axis=1, stable=True), axis=1)
        picked = jax.tree.map(lambda x: jnp.take_along_axis(x, _along(index, x), axis=1), self)
        kept = jnp.arange(index.shape[1])[None] < jnp.sum(there, axis=1, keepdims=True)
        return picked._replace(segments=jnp.where(kept, picked.segments, 0))

    def following(self, out: Float[Array, "B T H E"]) -> Entries:
        """The same, but known only once ``out`` is, which was read from a cache.

        XLA copies a whole cache that might be written before it has been read, and no barrier
        tells its CPU compiler otherwise; so zeros that it cannot see through are added.
        """
        first = out.reshape(*self.k.shape[:3], -1)[..., :1]  # of each key head, where it lies
        nothing = zeros_behind(first).astype(self.k.dtype)
        return self._replace(k=self.k + nothing, v=self.v + nothing)

    def spread(self, picked: Picked) -> Entries:
        """Those of picked tokens in the places of the row, padding in the others."""
        rows = picked.kept.shape

        def placed(x: Array) -> Array:
            return picked.spread(x, jnp.zeros((*rows, *x.shape[2:]), x.dtype))

        return jax.tree.map(placed, self)


def zeros_behind(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Zeros that XLA takes for a function of ``x``."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return (jnp.minimum(bits, 1) >> 1).astype(jnp.float32)


class CacheView(NamedTuple):
    """Older entries that the queries of a pass attend to.

    Keys lie in a pool of pages, as :func:`kernels_pallas.decode_attention.decode_attention` reads
    them; without a table, page b is row b. Where every key head has entries of its own, positions
    and segments have an axis of heads.

    Attributes:
        q: queries, turned as they meet these keys.
        k: keys, likewise.
        v: values.
        positions: original position of the entry in each slot, by which the mask rule sees it.
        segments: 1 for an entry, 0 for an empty slot.
        pages: page table, or None.
        selected: slots to read, -1 for none, or None for all.
        bias: added to the scores, or None; float32.
    """

    q: Float[Array, "B T H E"]
    k: Float[Array, "P K Y E"]
    v: Float[Array, "P K Y E"]
    positions: Int[Array, "B S"] | Int[Array, "B K S"]
    segments: Int[Array, "B S"] | Int[Array, "B K S"]
    pages: Int[Array, "B N"] | None = None
    selected: Int[Array, "B L M"] | None = None
    bias: Float[Array, "B K S"] | None = None


class Reading(NamedTuple):
    """How a pass meets the past.

    Attributes:
        views: sets of older entries, no entry in two of them; attention is one softmax over all.
        positions: where the tokens of the pass turn their own queries and keys; None where these
            come turned.
        state: the cache afterwards, as looking may change what is looked at next.
    """

    views: tuple[CacheView, ...]
    positions: Int[Array, "B T"] | None
    state: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePolicy(abc.ABC):
    """Decides which keys and values of one layer are kept and which of them are read.

    The tokens of a pass attend to each other and to what ``read`` shows of older ones; then those
    that are to stay are appended. So a draft that is rejected was never in a cache. A state is a
    pytree whose shapes do not change, its leaves rows first unless a member forks and inserts
    otherwise.
    """

    @property
    def rotated(self) -> bool:
        """Whether queries and keys come turned by their positions."""
        return True

    def of_layer(self, number: int) -> CachePolicy:
        """The policy of layer ``number``: this one, unless layers differ."""
        return self

    @abc.abstractmethod
    def init(self, room: Room, heads: Heads) -> PyTree:
        """An empty cache.

        Raises:
            UserError: the room or the heads do not suit the policy.
        """

    @abc.abstractmethod
    def read(self, state: PyTree, new: Entries, *, heads: Heads) -> Reading:
        """What the tokens of a pass see of the cache."""

    @abc.abstractmethod
    def append(self, state: PyTree, new: Entries, *, heads: Heads) -> PyTree:
        """Adds entries; those with segment 0 are padding and are not kept."""

    @abc.abstractmethod
    def truncate(self, state: PyTree, lengths: Int[Array, " B"]) -> PyTree:
        """Forgets entries at positions from ``lengths`` on; what was dropped does not come back."""

    @abc.abstractmethod
    def held(self, state: PyTree) -> Float[Array, " B"]:
        """Entries that each row keeps, a mean over key heads where they differ."""

    def fork(self, state: PyTree, rows: Int[Array, " N"]) -> PyTree:
        """The caches of ``rows``, in which a row may be twice; they go on apart."""
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), state)

    def insert(self, state: PyTree, rows: Int[Array, " N"], other: PyTree) -> PyTree:
        """Puts the rows of another cache in the place of ``rows``."""
        return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new), state, other)

    def lanes(self, state: PyTree, rows: Int[Array, " N"]) -> PyTree:
        """The caches of some rows for one pass; what is appended goes back by ``rejoined``."""
        return self.fork(state, rows)

    def rejoined(self, state: PyTree, rows: Int[Array, " N"], lanes: PyTree) -> PyTree:
        """The whole cache after a pass over ``lanes`` of it, which are its ``rows``."""
        return self.insert(state, rows, lanes)

    def counters(self, state: PyTree) -> dict[str, Float[Array, " B"]]:
        """What a member counts of each row, by name; decoders report the sum over layers."""
        return {}

    def after_pass(self, states: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        """What layers tell each other between two passes; nothing unless a member says so."""
        return states


def _along(index: Int[Array, "B N"], x: Array) -> Int[Array, "B N ..."]:
    return index.reshape(*index.shape, *[1] * (x.ndim - 2))


def _ranks(kept: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """How many kept ones come before each kept one."""
    return jnp.cumsum(kept, axis=1, dtype=jnp.int32) - 1

"""The cache that forgets nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp

from tokenlab.cache.base import CachePolicy, CacheView
from tokenlab.core.arrays import Array, Float, Int


@flax.struct.dataclass
class FullCacheState:
    """Entries of each row, packed from slot 0; heads first, the order in which they are read.

    Attributes:
        k: keys; slots at and after ``length`` hold nothing of meaning.
        v: values.
        positions: original position of each entry.
        length: entries per row.
    """

    k: Float[Array, "B K S E"]
    v: Float[Array, "B K S E"]
    positions: Int[Array, "B S"]
    length: Int[Array, " B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullCache(CachePolicy):
    """Keeps every key and value, up to a fixed capacity.

    Rows fill independently, so prompts of different length need no left padding. Entries beyond
    the capacity are dropped; decoders refuse such a request before they start.

    Attributes:
        capacity: slots per row.
    """

    capacity: int

    def init(self, *, batch: int, num_kv_heads: int, head_dim: int, dtype: Any) -> FullCacheState:
        """An empty cache for ``batch`` rows."""
        shape = (batch, num_kv_heads, self.capacity, head_dim)
        return FullCacheState(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            positions=jnp.zeros((batch, self.capacity), jnp.int32),
            length=jnp.zeros((batch,), jnp.int32),
        )

    def append(
        self,
        state: FullCacheState,
        *,
        k: Float[Array, "B T K E"],
        v: Float[Array, "B T K E"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> FullCacheState:
        """Writes the new entries behind the old ones, row by row."""
        kept = segments > 0
        rows = jnp.arange(k.shape[0])[:, None]
        slots = state.length[:, None] + jnp.arange(k.shape[1])[None, :]
        slots = jnp.where(kept, slots, self.capacity)
        return FullCacheState(
            k=state.k.at[rows, :, slots].set(k.astype(state.k.dtype), mode="drop"),
            v=state.v.at[rows, :, slots].set(v.astype(state.v.dtype), mode="drop"),
            positions=state.positions.at[rows, slots].set(positions, mode="drop"),
            length=jnp.minimum(state.length + jnp.sum(kept, axis=1), self.capacity),
        )

    def view(self, state: FullCacheState, *, q: Float[Array, "B T H E"]) -> CacheView:
        """Every entry, for every query."""
        filled = jnp.arange(self.capacity)[None, :] < state.length[:, None]
        k, v = state.k.swapaxes(1, 2), state.v.swapaxes(1, 2)
        return CacheView(k, v, state.positions, filled.astype(jnp.int32))

    def truncate(self, state: FullCacheState, *, lengths: Int[Array, " B"]) -> FullCacheState:
        """Forgets the entries of each row from slot ``lengths`` on."""
        return dataclasses.replace(state, length=jnp.minimum(state.length, lengths))

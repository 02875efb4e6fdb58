"""What layers keep that read the past as a state of fixed size."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax.numpy as jnp

from tokenlab.cache.base import CachePolicy, Entries, Heads, Reading, Room
from tokenlab.core.arrays import Array, Float, Int
from tokenlab.core.errors import UserError


class RecurrentState(flax.struct.PyTreeNode):
    """The state of one layer.

    Attributes:
        matrices: of each head, float32.
        entries: of a key-value cache that take as many bytes.
    """

    matrices: Float[Array, "B H N P"]
    entries: float = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrent(CachePolicy):
    """One square matrix per query head, whatever the length of a row.

    The mixer itself updates it; there are no entries to read or to append. What was read cannot be
    taken back, so drafts and :meth:`truncate` are refused. Layers of attention among recurrent ones
    get another policy by :class:`PerLayer`.
    """

    def init(self, room: Room, heads: Heads) -> RecurrentState:
        """Zeros."""
        shape = (room.batch, heads.num_heads, heads.width, heads.width)
        entry = 2 * heads.num_kv_heads * heads.width * jnp.dtype(room.dtype).itemsize
        size = 4 * heads.num_heads * heads.width**2
        return RecurrentState(matrices=jnp.zeros(shape, jnp.float32), entries=size / entry)

    def read(self, state: RecurrentState, new: Entries, *, heads: Heads) -> Reading:
        """Refused: a state has no entries."""
        raise UserError("Recurrent keeps no keys and values; give attention a policy by PerLayer")

    def append(self, state: RecurrentState, new: Entries, *, heads: Heads) -> RecurrentState:
        """Refused: a state has no entries."""
        raise UserError("Recurrent keeps no keys and values; give attention a policy by PerLayer")

    def truncate(self, state: RecurrentState, lengths: Int[Array, " B"]) -> RecurrentState:
        """Refused: a state does not forget."""
        raise UserError("Recurrent cannot take tokens back; decode without drafts")

    def held(self, state: RecurrentState) -> Float[Array, " B"]:
        """The entries of keys and values that would take as many bytes, at any length."""
        return jnp.full(state.matrices.shape[:1], state.entries)

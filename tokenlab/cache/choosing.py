"""Which slots are read: sets of slots, as masks and as lists of a fixed size."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention import NOTHING
from tokenlab.core.arrays import Array, Bool, Float, Int


def best(
    scores: Float[Array, "*N S"], count: Int[Array, "*N"] | int, *, most: int
) -> Bool[Array, "*N S"]:
    """The ``count`` highest of each row, the earlier of equal ones; never one below -1e29.

    Args:
        scores: ``NOTHING`` for what is no candidate.
        count: how many of each row.
        most: static bound of ``count``.
    """
    slots = scores.shape[-1]
    values, places = jax.lax.top_k(scores, min(most, slots))
    rank = jnp.arange(values.shape[-1]).reshape((1,) * (values.ndim - 1) + (-1,))
    count = jnp.broadcast_to(count, values.shape[:-1])[..., None]
    kept = (rank < count) & (values > NOTHING / 10)
    return mask_of(jnp.where(kept, places, -1), slots)


def mask_of(places: Int[Array, "*N M"], slots: int) -> Bool[Array, "*N S"]:
    """Which of ``slots`` slots are in each list; -1 is none."""
    flat = places.reshape(-1, places.shape[-1])
    rows = jnp.arange(len(flat))[:, None]
    mask = jnp.zeros((len(flat), slots), bool)
    mask = mask.at[rows, jnp.where(flat < 0, slots, flat)].set(True, mode="drop")
    return mask.reshape(*places.shape[:-1], slots)


def compacted(chosen: Bool[Array, "*N S"], most: int) -> Int[Array, "*N M"]:
    """The first ``most`` chosen slots in order, then -1."""
    slots = chosen.shape[-1]
    # The earliest slots as the highest numbers: a sum along slots takes far longer to compile.
    number = jnp.arange(slots, 0, -1, dtype=jnp.float32).reshape((1,) * (chosen.ndim - 1) + (-1,))
    found, places = jax.lax.top_k(jnp.where(chosen, number, 0.0), min(most, slots))
    places = jnp.where(found > 0, places, -1)
    pad = [(0, 0)] * (chosen.ndim - 1) + [(0, most - places.shape[-1])]
    return jnp.pad(places, pad, constant_values=-1)


def ranks(positions: Int[Array, "B S"], filled: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """How many filled slots of the row have a lower position."""
    order = jnp.argsort(jnp.where(filled, positions, jnp.iinfo(jnp.int32).max), axis=1)
    return jnp.argsort(order, axis=1).astype(jnp.int32)

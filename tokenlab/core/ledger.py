"""What a forward pass cost, counted in units that any two methods can be compared in."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float


@flax.struct.dataclass
class Ledger:
    """Counts of one or more forward passes; float32 inside a step, summed in float64 outside.

    Attributes:
        passes: forward passes of the model.
        tokens: tokens read, padding excluded.
        slots: positions computed, padding included.
        block_tokens: tokens times blocks run on them.
        attended_pairs: query-key pairs that attention admits, over all blocks (heads not counted).
        flops: multiply-adds times two of all matrix products, attention over admitted pairs only.
        cache_entries: key-value entries held after the pass, over all blocks.
        cache_bytes: bytes of those entries.
        saved_bytes: bytes of what the passes leave for their backward passes, as
            :func:`saved_bytes` counts them, on all devices together.
    """

    passes: Float[Array, ""] | float = 0.0
    tokens: Float[Array, ""] | float = 0.0
    slots: Float[Array, ""] | float = 0.0
    block_tokens: Float[Array, ""] | float = 0.0
    attended_pairs: Float[Array, ""] | float = 0.0
    flops: Float[Array, ""] | float = 0.0
    cache_entries: Float[Array, ""] | float = 0.0
    cache_bytes: Float[Array, ""] | float = 0.0
    saved_bytes: Float[Array, ""] | float = 0.0

    def merge(self, other: Ledger) -> Ledger:
        """Adds every count."""
        return jax.tree.map(jnp.add, self, other)


def saved_bytes(pullback: Callable[..., PyTree], *given: PyTree) -> int:
    """Bytes of the arrays that a function from ``jax.vjp`` holds, each counted once.

    It is what differentiation keeps of a pass, by shapes; the compiler may compute some of it
    again, and needs room for what it is working on besides.

    Args:
        pullback: as ``jax.vjp`` returned it.
        given: arrays that are there anyway, such as parameters and the batch.
    """
    there = {id(leaf) for leaf in jax.tree.leaves(given)}
    held = {id(leaf): leaf for leaf in jax.tree.leaves(pullback) if id(leaf) not in there}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in held.values())

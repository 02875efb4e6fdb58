"""A sum and its weight, kept apart until the very end.

A mean of means over micro-batches, hosts or terms is wrong as soon as their weights differ.
``Weighted`` merges totals and weights separately and divides once.
"""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Float, Scalar


@flax.struct.dataclass
class Weighted:
    """A weighted sum that has not been divided yet, or several that are divided one by one.

    Attributes:
        total: float32 sum of ``values * weights``.
        weight: float32 sum of ``weights``.
    """

    total: Float[Array, "*R"]
    weight: Float[Array, "*R"]

    @classmethod
    def of(cls, values: Float[Array, "*N"], weights: Float[Array, "*N"]) -> Weighted:
        """Sums ``values`` under ``weights`` in float32.

        Values of weight zero are replaced before the product, so a non-finite value there
        reaches neither the sum nor its gradient.

        Args:
            values: unreduced values, any shape.
            weights: non-negative weights of the same shape.

        Raises:
            ValueError: the shapes differ (they are never broadcast).
        """
        if values.shape != weights.shape:
            raise ValueError(f"values {values.shape} and weights {weights.shape} differ in shape")
        weights = weights.astype(jnp.float32)
        kept = jnp.where(weights > 0, values.astype(jnp.float32), 0.0)
        return cls(total=jnp.sum(kept * weights), weight=jnp.sum(weights))

    def merge(self, other: Weighted) -> Weighted:
        """Adds totals and weights."""
        return Weighted(total=self.total + other.total, weight=self.weight + other.weight)

    def mean(self) -> Scalar:
        """``total / weight``, and 0 with zero gradient where the weight is 0.

        Several sums give the sum of their means.
        """
        safe = jnp.where(self.weight > 0, self.weight, 1.0)
        return jnp.sum(jnp.where(self.weight > 0, self.total, 0.0) / safe)

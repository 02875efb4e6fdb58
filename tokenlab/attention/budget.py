"""The block budget family: how many of the blocks that could be looked at are."""

from __future__ import annotations

import abc
import dataclasses

import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockBudget(abc.ABC):
    """Keeps, for each block of queries, the candidates of highest mass."""

    @abc.abstractmethod
    def __call__(
        self, mass: Float[Array, "*R N"], *, candidates: Bool[Array, "*R N"]
    ) -> Bool[Array, "*R N"]:
        """Which blocks are kept.

        Args:
            mass: estimated share of the attention; sums to 1 over the candidates of a row, and
                is 0 elsewhere.
            candidates: blocks that may be kept.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class MassBudget(BlockBudget):
    """The fewest blocks that hold a mass of ``threshold``, the one that crosses it included.

    Attributes:
        threshold: mass to keep; from 1 on everything is kept, whatever the rounding of the sum.
    """

    threshold: float = 0.9

    def __call__(
        self, mass: Float[Array, "*R N"], *, candidates: Bool[Array, "*R N"]
    ) -> Bool[Array, "*R N"]:
        """Which blocks are kept."""
        if self.threshold >= 1:
            return candidates
        order, rank = _ranked(mass, candidates)
        sorted_mass = jnp.take_along_axis(mass, order, axis=-1)
        before = jnp.cumsum(sorted_mass, axis=-1)[..., :-1]
        before = jnp.pad(before, [(0, 0)] * (mass.ndim - 1) + [(1, 0)])
        return candidates & jnp.take_along_axis(before < self.threshold, rank, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShareBudget(BlockBudget):
    """A fixed share of the candidates, rounded up: equal in cost for every selector.

    Attributes:
        share: of the candidates, 0 to 1.
    """

    share: float

    def __call__(
        self, mass: Float[Array, "*R N"], *, candidates: Bool[Array, "*R N"]
    ) -> Bool[Array, "*R N"]:
        """Which blocks are kept."""
        allowed = jnp.sum(candidates, axis=-1, keepdims=True)
        # A share such as 0.1 of 30 is 3.0000001 in float32, and is meant to be 3.
        count = jnp.ceil(self.share * allowed - 1e-4)
        return candidates & (_ranked(mass, candidates)[1] < count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountBudget(BlockBudget):
    """A fixed number of blocks.

    Attributes:
        blocks: kept per block of queries, where there are as many.
    """

    blocks: int

    def __call__(
        self, mass: Float[Array, "*R N"], *, candidates: Bool[Array, "*R N"]
    ) -> Bool[Array, "*R N"]:
        """Which blocks are kept."""
        return candidates & (_ranked(mass, candidates)[1] < self.blocks)


def _ranked(
    mass: Float[Array, "*R N"], candidates: Bool[Array, "*R N"]
) -> tuple[Int[Array, "*R N"], Int[Array, "*R N"]]:
    """Blocks by falling mass, candidates first, and the rank of each."""
    order = jnp.argsort(jnp.where(candidates, -mass, jnp.inf), axis=-1, stable=True)
    return order, jnp.argsort(order, axis=-1)

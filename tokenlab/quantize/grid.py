"""Uniform grids: integers times one scale per output."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SymmetricGrid:
    """Integers from ``-2^(b-1)`` to ``2^(b-1) - 1`` times a scale per output.

    The scale is ``f max|w| / (2^(b-1) - 1)`` with the shrink factor ``f`` of
    ``1, 1 - step, ...`` that has the smallest ``Σ |w - q|^exponent`` over the output's weights.

    Attributes:
        bits: b, from 2 to 8.
        factors: shrink factors that are tried.
        step: distance between them.
        exponent: of the error.
    """

    bits: int = 3
    factors: int = 80
    step: float = 0.01
    exponent: float = 2.4

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits {self.bits} must be in 2..8")
        if self.factors < 1 or not (self.factors - 1) * self.step < 1:
            raise ValueError(f"{self.factors} factors a step {self.step} apart do not stay above 0")

    @property
    def lowest(self) -> int:
        """The lowest integer."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The highest integer."""
        return 2 ** (self.bits - 1) - 1

    def scale(self, weight: Float[Array, "I O"]) -> Float[Array, " O"]:
        """The scale of each output; 1 where all of its weights are 0."""
        return _best_scale(self, weight.astype(jnp.float32))

    def codes(
        self, weight: Float[Array, "*I O"], scale: Float[Array, " O"]
    ) -> Float[Array, "*I O"]:
        """Nearest integers of the grid, as floats."""
        scale = scale.reshape((1,) * (weight.ndim - 1) + (-1,))
        return jnp.clip(jnp.round(weight / scale), self.lowest, self.highest)

    def integers(self, codes: Float[Array, "I O"]) -> Int[Array, "I O"]:
        """Codes as they are stored."""
        return codes.astype(jnp.int8)


@functools.partial(jax.jit, static_argnums=0)
def _best_scale(grid: SymmetricGrid, weight: Float[Array, "I O"]) -> Float[Array, " O"]:
    peak = jnp.max(jnp.abs(weight), axis=0) / grid.highest
    peak = jnp.where(peak > 0, peak, 1.0)
    weight = weight / peak[None]

    def attempt(number: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen, least = best
        factor = 1 - number * grid.step
        error = weight - factor * jnp.clip(jnp.round(weight / factor), grid.lowest, grid.highest)
        # By logarithms: a power is several times as slow on a CPU.
        error = jnp.sum(jnp.exp(grid.exponent / 2 * jnp.log(error * error)), axis=0)
        return jnp.where(error < least, factor, chosen), jnp.minimum(error, least)

    start = jnp.ones_like(peak), jnp.full_like(peak, jnp.inf)
    return peak * jax.lax.fori_loop(0, grid.factors, attempt, start)[0]

"""Quantisers that round each weight by itself, or that let later weights mend earlier errors."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from tokenlab.core.arrays import Array, Float
from tokenlab.core.errors import UserError
from tokenlab.quantize.base import Quantized, Quantizer
from tokenlab.quantize.grid import SymmetricGrid


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearest(Quantizer):
    """Every weight to the nearest point of its output's grid; reads no data.

    Attributes:
        grid: the grid.
    """

    grid: SymmetricGrid = SymmetricGrid()

    @property
    def code_bits(self) -> int:
        """Those of the grid."""
        return self.grid.bits

    def __call__(
        self, *, weight: Float[Array, "I O"], moment: Float[np.ndarray, "I I"] | None = None
    ) -> Quantized:
        """Rounds; ``moment`` is not read."""
        del moment
        weight = jnp.asarray(weight, jnp.float32)
        scale = self.grid.scale(weight)
        return _quantized(self.grid, self.grid.codes(weight, scale), scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(Quantizer):
    """Rounds inputs in order; those that follow take up each one's error.

    With the damped moment ``M`` and the upper factor ``U`` of ``M⁻¹ = Uᵀ U``, input i becomes
    ``q_i = round(w_i)`` on the grid and ``w_j -= (w_i - q_i) U_ij / U_ii`` for every later j.
    That minimises ``tr (w - q)ᵀ M (w - q)`` over what is not rounded yet. Inputs that are never
    anything but zero get the weight 0. ``M`` is factored in float64 on the host.

    Reference: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization
    for Generative Pre-trained Transformers", 2022, arXiv:2210.17323.

    Differences from the paper: scales are searched before rounding begins, one per output; ``U``
    comes from one Cholesky factorisation, of ``M`` from its last row up, without an inverse.

    Attributes:
        grid: the grid.
        damping: share of the mean of M's diagonal that is added to it, again until M has a factor.
        block: inputs whose errors are kept back and handed on to later ones together.
    """

    calibrated: ClassVar[bool] = True

    grid: SymmetricGrid = SymmetricGrid()
    damping: float = 0.01
    block: int = 128

    @property
    def code_bits(self) -> int:
        """Those of the grid."""
        return self.grid.bits

    def __post_init__(self) -> None:
        if not self.damping > 0 or self.block < 1:
            raise ValueError(
                f"damping {self.damping} must be above 0, block {self.block} at least 1"
            )

    def __call__(
        self, *, weight: Float[Array, "I O"], moment: Float[np.ndarray, "I I"] | None = None
    ) -> Quantized:
        """Rounds with compensation.

        Raises:
            UserError: there is no moment, or it is not finite.
        """
        if moment is None:
            raise UserError("GPTQ needs second moments of its inputs; give it calibration tokens")
        weight = jnp.asarray(weight, jnp.float32)
        scale = self.grid.scale(weight)
        exact = np.asarray(moment, np.float64)
        dead = np.diagonal(exact) == 0
        factor = upper_factor(exact, self.damping).astype(np.float32)
        weight = jnp.where(jnp.asarray(dead)[:, None], 0.0, weight)
        return _quantized(self.grid, _compensated(self, weight, factor, scale), scale)


def _quantized(
    grid: SymmetricGrid, codes: Float[Array, "I O"], scale: Float[Array, " O"]
) -> Quantized:
    return Quantized(codes=grid.integers(codes), scale=scale[None], values=codes * scale[None])


def upper_factor(moment: Float[np.ndarray, "I I"], damping: float) -> Float[np.ndarray, "I I"]:
    """The upper ``U`` with ``M⁻¹ = Uᵀ U`` of the damped moment; rows may have any common factor.

    Args:
        moment: symmetric, at least nearly positive semidefinite, float64.
        damping: share of the mean diagonal that is added until the factorisation succeeds.

    Raises:
        UserError: the moment is not finite.
    """
    if not np.isfinite(moment).all():
        raise UserError("second moments are not finite; look for NaN in the calibration inputs")
    # By its own size, so that no factor of the moment matters.
    diagonal = np.diagonal(moment)
    mean = diagonal.mean()
    moment = moment / (mean if mean > 0 else 1.0)
    size = np.arange(len(moment))
    moment[size, size] = np.where(diagonal == 0, 1.0, moment[size, size])
    added = damping * np.mean(np.diagonal(moment))
    while True:
        moment[size, size] += added
        try:
            # M = R Rᵀ with R upper, by the factorisation of M from its last row up; U = R⁻¹.
            lower = scipy.linalg.cholesky(moment[::-1, ::-1], lower=True)
        except np.linalg.LinAlgError:
            continue
        (inverse,) = scipy.linalg.get_lapack_funcs(("trtri",), (lower,))
        return inverse(lower, lower=1)[0][::-1, ::-1]


@functools.partial(jax.jit, static_argnums=0)
def _compensated(
    method: GPTQ,
    weight: Float[Array, "I O"],
    factor: Float[Array, "I I"],
    scale: Float[Array, " O"],
) -> Float[Array, "I O"]:
    """Codes, block by block of inputs; sizes are filled up with inputs that err by nothing."""
    inputs, outputs = weight.shape
    block = min(method.block, inputs)
    missing = -inputs % block
    weight = jnp.pad(weight, ((0, missing), (0, 0)))
    factor = jnp.pad(factor, ((0, missing), (0, missing)))
    beyond = jnp.arange(inputs + missing)
    factor += jnp.diag((beyond >= inputs).astype(factor.dtype))

    def of_block(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, codes = state
        start = number * block
        rows = jax.lax.dynamic_slice(factor, (start, 0), (block, len(beyond)))
        among = jax.lax.dynamic_slice(rows, (0, start), (block, block))
        tile = jax.lax.dynamic_slice(weight, (start, 0), (block, outputs))

        def of_input(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            tile, codes, errors = state
            code = method.grid.codes(tile[i], scale)
            error = (tile[i] - code * scale) / among[i, i]
            # U is zero before its diagonal, so inputs that are done stay as they are.
            tile = tile - among[i][:, None] * error[None]
            return tile, codes.at[i].set(code), errors.at[i].set(error)

        nothing = jnp.zeros_like(tile)
        _, found, errors = jax.lax.fori_loop(0, block, of_input, (tile, nothing, nothing))
        later = jnp.where((beyond >= start + block)[None], rows, 0.0)
        handed_on = jnp.einsum("bi,bo->io", later, errors, precision=jax.lax.Precision.HIGHEST)
        return weight - handed_on, jax.lax.dynamic_update_slice(codes, found, (start, 0))

    state = jax.lax.fori_loop(0, len(beyond) // block, of_block, (weight, jnp.zeros_like(weight)))
    return state[1][:inputs]

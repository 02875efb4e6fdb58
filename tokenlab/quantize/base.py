"""The quantiser family: one matrix in a few bits."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import numpy as np

from tokenlab.core.arrays import Array, Float, Int


class Quantized(NamedTuple):
    """A matrix in few bits.

    Attributes:
        codes: what is stored for each weight.
        scale: what groups of codes share; along inputs, O is per output and B per block of it.
        values: the matrix that they stand for, float32.
    """

    codes: Int[Array, "I O"]
    scale: Float[Array, "B O"]
    values: Float[Array, "I O"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantizer(abc.ABC):
    """The quantiser family: rounds the kernel of a projection ``y = x @ kernel``.

    ``calibrated`` says whether a member reads second moments of the projection's inputs. Such a
    member treats each output by itself, so projections of the same inputs may be one matrix.
    """

    calibrated: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def code_bits(self) -> int:
        """Bits of a code, without its share of scales."""

    @abc.abstractmethod
    def __call__(
        self, *, weight: Float[Array, "I O"], moment: Float[np.ndarray, "I I"] | None = None
    ) -> Quantized:
        """Quantises one kernel.

        Args:
            weight: the kernel; inputs come first.
            moment: ``Σ r x xᵀ`` over inputs x of weight r, up to a factor, on the host; members
                that are ``calibrated`` need it.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationQuantizer(abc.ABC):
    """The family that rounds what a projection reads: ``y = round(x) @ kernel``."""

    @abc.abstractmethod
    def __call__(
        self, x: Float[Array, "*N K"], *, largest: float | None = None
    ) -> Float[Array, "*N K"]:
        """Activations as few bits leave them, in their dtype.

        The gradient is straight-through: that of the identity.

        Args:
            x: what a projection reads.
            largest: magnitude that was seen in calibration, so that no token's values depend on
                the others of its pass; None takes that of ``x``.
        """


def straight_through(x: Float[Array, "*N"], rounded: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """``rounded``, exactly, with the gradient of ``x``."""
    return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))

"""NVFP4: 4-bit floats in blocks of 16 with 8-bit scales."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax.numpy as jnp
import numpy as np

from kernels_pallas.nvfp4_matmul import BLOCK, E2M1, decoded, encoded
from tokenlab.core.arrays import Array, Float, Int, Scalar
from tokenlab.core.errors import UserError
from tokenlab.quantize.base import (
    ActivationQuantizer,
    Quantized,
    Quantizer,
    straight_through,
)

_LARGEST_SCALE = 448.0  # of float8_e4m3fn


@flax.struct.dataclass
class NVFP4Tensor:
    """A tensor in NVFP4, blocks of 16 along its first axis.

    Attributes:
        codes: E2M1 codes 0 to 15, one in a byte; ``kernels_pallas.nvfp4_matmul.packed`` puts two.
        scales: of the blocks, float8_e4m3fn.
        tensor_scale: what all share, float32.
    """

    codes: Int[Array, "K ..."]
    scales: Float[Array, "G ..."]
    tensor_scale: Scalar

    def values(self) -> Float[Array, "K ..."]:
        """``code * scale * tensor_scale``, float32."""
        scales = self.scales.astype(jnp.float32) * self.tensor_scale
        return decoded(self.codes) * jnp.repeat(scales, BLOCK, axis=0)


def tensor_scale(largest: Scalar) -> Scalar:
    """The tensor scale by which the largest magnitude has the largest code and scale."""
    return largest.astype(jnp.float32) / (E2M1[-1] * _LARGEST_SCALE)


def nvfp4(x: Float[Array, "K ..."], *, scale: Scalar | None = None) -> NVFP4Tensor:
    """Rounds to NVFP4 along the first axis.

    ``s_b = e4m3(max|x_b| / (6 g))`` and ``code = e2m1(x / (s_b g))``, both to the nearest and even
    at ties. A block whose scale rounds to zero is zero; what lies beyond the largest code has it.

    Args:
        x: a kernel whose inputs come first, or activations with their features first; K is a
            multiple of 16.
        scale: g, of activations that were seen in calibration; None takes that of ``x``.

    Raises:
        UserError: K is no multiple of 16.

    Reference: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, arXiv:2509.25149.
    """
    if x.shape[0] % BLOCK:
        raise UserError(f"NVFP4 has blocks of {BLOCK}, and {x.shape[0]} inputs do not fill them")
    x = x.astype(jnp.float32)
    if scale is None:
        scale = tensor_scale(jnp.max(jnp.abs(x)))
    blocks = x.reshape(-1, BLOCK, *x.shape[1:])
    largest = jnp.max(jnp.abs(blocks), axis=1)
    wanted = largest / (E2M1[-1] * jnp.where(scale > 0, scale, 1.0))
    scales = jnp.minimum(wanted, _LARGEST_SCALE).astype(jnp.float8_e4m3fn)
    step = scales.astype(jnp.float32)[:, None] * scale
    codes = encoded(jnp.where(step > 0, blocks / jnp.where(step > 0, step, 1.0), 0.0))
    return NVFP4Tensor(codes=codes.reshape(x.shape), scales=scales, tensor_scale=scale)


def fake_nvfp4(x: Float[Array, "*N K"], *, scale: Scalar | None = None) -> Float[Array, "*N K"]:
    """Activations as NVFP4 leaves them, blocks along the last axis, in the dtype of ``x``.

    The gradient is straight-through.
    """
    rounded = nvfp4(jnp.moveaxis(x, -1, 0), scale=scale).values()
    return straight_through(x, jnp.moveaxis(rounded, 0, -1).astype(x.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NVFP4Activations(ActivationQuantizer):
    """Every activation to the nearest of NVFP4: with :class:`NVFP4` weights, W4A4.

    Scales of blocks are those of the values at hand; the tensor scale is of ``largest``, and what
    lies beyond has the largest code and scale.

    Reference: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, arXiv:2509.25149.
    """

    def __call__(
        self, x: Float[Array, "*N K"], *, largest: float | None = None
    ) -> Float[Array, "*N K"]:
        """Rounds.

        Raises:
            UserError: the number of features is no multiple of 16.
        """
        return fake_nvfp4(x, scale=None if largest is None else tensor_scale(jnp.float32(largest)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NVFP4(Quantizer):
    """Every weight to the nearest of NVFP4; reads no data.

    ``Quantized.scale`` holds the scales of blocks of 16 inputs times the tensor scale.

    Reference: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, arXiv:2509.25149.
    """

    @property
    def code_bits(self) -> int:
        """4; with scales a weight takes 4.5."""
        return 4

    def __call__(
        self, *, weight: Float[Array, "I O"], moment: Float[np.ndarray, "I I"] | None = None
    ) -> Quantized:
        """Rounds; ``moment`` is not read.

        Raises:
            UserError: the number of inputs is no multiple of 16.
        """
        del moment
        made = nvfp4(jnp.asarray(weight))
        scale = made.scales.astype(jnp.float32) * made.tensor_scale
        return Quantized(codes=made.codes, scale=scale, values=made.values())

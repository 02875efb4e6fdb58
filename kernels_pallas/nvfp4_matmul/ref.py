"""The specification: both sides dequantised to float32, then one product."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from kernels_pallas.nvfp4_matmul.codes import BLOCK, decoded, unpacked
from kernels_pallas.nvfp4_matmul.specs import Nvfp4MatmulConfig


def nvfp4_matmul(
    *,
    x: UInt8[Array, "M P"],
    x_scales: Float[Array, "M G"],
    weight: UInt8[Array, "P N"],
    weight_scales: Float[Array, "G N"],
    config: Nvfp4MatmulConfig,
) -> Float[Array, "M N"]:
    """See :func:`kernels_pallas.nvfp4_matmul.nvfp4_matmul`; without ``alpha``, in float32."""
    del config
    return jnp.einsum(
        "km,kn->mn",
        dequantised(x.T, x_scales.T),
        dequantised(weight, weight_scales),
        precision=lax.Precision.HIGHEST,
    )


def dequantised(codes: UInt8[Array, "P N"], scales: Float[Array, "G N"]) -> Float[Array, "K N"]:
    """Codes times the scales of their blocks, float32: exact, also in bfloat16."""
    return decoded(unpacked(codes)) * jnp.repeat(scales.astype(jnp.float32), BLOCK, axis=0)

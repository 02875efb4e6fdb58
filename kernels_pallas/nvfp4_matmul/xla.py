"""What a CPU runs: some columns of the weight at a time, so that it is never whole in float32."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from kernels_pallas.nvfp4_matmul.ref import dequantised
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
    wide, columns = dequantised(x.T, x_scales.T), weight.shape[1]
    block = min(columns, config.block_columns or 256)

    def product(start):
        return jnp.einsum(
            "km,kn->mn",
            wide,
            dequantised(
                lax.dynamic_slice_in_dim(weight, start, block, axis=1),
                lax.dynamic_slice_in_dim(weight_scales, start, block, axis=1),
            ),
            precision=lax.Precision.HIGHEST,
        )

    whole = columns // block * block
    out = lax.map(product, jnp.arange(0, whole, block))
    out = jnp.swapaxes(out, 0, 1).reshape(x.shape[0], whole)
    rest = columns - whole
    if rest:  # the last columns overlap those before them
        out = jnp.concatenate([out, product(columns - block)[:, block - rest :]], axis=1)
    return out

"""Products of 4-bit codes for a few tokens: what decoding with quantised weights is made of."""

from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from kernels_pallas.common.dispatch import Operation
from kernels_pallas.nvfp4_matmul import gpu, ref, tpu, xla
from kernels_pallas.nvfp4_matmul.codes import BLOCK, E2M1, decoded, encoded, packed, unpacked
from kernels_pallas.nvfp4_matmul.specs import Nvfp4MatmulConfig

_MATMUL = Operation.of(
    "nvfp4_matmul",
    ref=ref.nvfp4_matmul,
    xla=xla.nvfp4_matmul,
    tpu=tpu.nvfp4_matmul,
    tpu_supports=tpu.supports,
    gpu=gpu.nvfp4_matmul,
    gpu_supports=gpu.supports,
)


def nvfp4_matmul(
    *,
    x: UInt8[Array, "M P"],
    x_scales: Float[Array, "M G"],
    weight: UInt8[Array, "P N"],
    weight_scales: Float[Array, "G N"],
    alpha: Float[Array, ""] | float = 1.0,
    dtype: DTypeLike = jnp.float32,
    impl: Literal["ref", "xla", "tpu", "gpu"] | None = None,
    config: Nvfp4MatmulConfig | None = None,
) -> Float[Array, "M N"]:
    """A product of two matrices in NVFP4.

    ``out[m, n] = alpha · Σ_b x_scales[m, b] · weight_scales[b, n] · Σ_{k in b} x[m, k] ·
    weight[k, n]``, with blocks ``b`` of 16 along ``k`` and codes read as E2M1. Accumulated in
    float32; a code times its scale is exact in bfloat16, so only the sum rounds.

    Forward only: nothing but inference multiplies codes, and integers have no gradient.

    Args:
        x: codes of the tokens ``[M, K/2]``, two in a byte along ``K``, the earlier one in the low
            half; K is a multiple of 16.
        x_scales: scales of their blocks, float8_e4m3fn.
        weight: codes of the projection ``[K/2, N]``, likewise.
        weight_scales: scales of its blocks, float8_e4m3fn.
        alpha: product of both tensor scales.
        dtype: of the result.
        impl: ``"ref"``, ``"xla"``, ``"tpu"`` or ``"gpu"`` (Hopper); these two take at most 8
            tokens and read every byte of the weight once for all of them; or ``None`` for the
            best that can run.
        config: block sizes; ``None`` derives them from the shapes.

    Returns:
        ``[M, N]``.

    Raises:
        ValueError: the sides do not fit together, or ``impl`` cannot run; the message has the
            reason.

    Reference: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, arXiv:2509.25149 (the
    format); Lee, Lee, Yoo, et al., "ReSET: Accurate Latency-Critical NVFP4 Reasoning via Step-Aware
    Temperature Scaling", 2026, arXiv:2606.13233 (the matrix-vector product).

    Differences from the paper: contracted positions lie along the first axis of the weight, as
    in all projections here, so that a block's scale is spread along sublanes of a TPU. The
    paper's kernel is for Blackwell's CUDA cores; ``"gpu"`` multiplies on Hopper's tensor cores.
    """
    rows, halves = x.shape
    blocks = 2 * halves // BLOCK
    fitting = (rows, blocks), (halves, weight.shape[1]), (blocks, weight.shape[1])
    if 2 * halves % BLOCK or fitting != (x_scales.shape, weight.shape, weight_scales.shape):
        shapes = x.shape, x_scales.shape, weight.shape, weight_scales.shape
        raise ValueError(
            f"shapes {shapes} are not [M, K/2], [M, K/16], [K/2, N], [K/16, N] of one K that is"
            f" a multiple of {BLOCK}"
        )
    out = _MATMUL(
        impl,
        x=x,
        x_scales=x_scales,
        weight=weight,
        weight_scales=weight_scales,
        config=config or Nvfp4MatmulConfig(),
    )
    return (alpha * out).astype(dtype)


__all__ = [
    "BLOCK",
    "E2M1",
    "Nvfp4MatmulConfig",
    "decoded",
    "encoded",
    "nvfp4_matmul",
    "packed",
    "unpacked",
]

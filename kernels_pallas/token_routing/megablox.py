"""The grouped matrix product by the kernels that JAX ships."""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

from kernels_pallas.common import dispatch
from kernels_pallas.token_routing.specs import GroupedMatmulConfig


def supports(*, x, weights, group_sizes, config) -> str | None:
    """Why it cannot run, or ``None``."""
    del group_sizes
    refusal = dispatch.needs("tpu", config.interpret)
    if refusal is not None:
        return refusal
    if x.dtype != weights.dtype or x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 or bfloat16 for both, not {x.dtype} and {weights.dtype}"
    return None


def grouped_matmul(
    *,
    x: Float[Array, "N D"],
    weights: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    config: GroupedMatmulConfig,
) -> Float[Array, "N F"]:
    """See :func:`kernels_pallas.token_routing.grouped_matmul`."""
    return _grouped(config, x, weights, group_sizes)


# Not megablox's own vjp: its backward pass leaves rows of no group undefined, and would take the
# precision that is current when the backward pass is traced.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(config, x, weights, group_sizes):
    return _product(config, x, weights, group_sizes, transposed=False)


def _forward(config, x, weights, group_sizes):
    return _grouped(config, x, weights, group_sizes), (x, weights, group_sizes)


def _backward(config, residuals, cotangent):
    x, weights, group_sizes = residuals
    tiling = config.tiles(x.shape[0], x.shape[1], cotangent.shape[1])
    with _precision(x.dtype):
        weights_gradient = tgmm(
            _whole_tiles(x, tiling[0]).T,
            _whole_tiles(cotangent, tiling[0]),
            group_sizes,
            preferred_element_type=weights.dtype,
            tiling=tiling,
            interpret=config.interpret,
        )
    x_gradient = _product(config, cotangent, weights, group_sizes, transposed=True)
    return x_gradient, weights_gradient, None


_grouped.defvjp(_forward, _backward)


def _product(config, x, weights, group_sizes, *, transposed: bool):
    width = weights.shape[1 if transposed else 2]
    tiling = config.tiles(*x.shape, width)
    with _precision(x.dtype):
        out = gmm(
            _whole_tiles(x, tiling[0]),
            weights,
            group_sizes,
            preferred_element_type=x.dtype,
            tiling=tiling,
            transpose_rhs=transposed,
            interpret=config.interpret,
        )[: x.shape[0]]
    # The kernel never visits a tile of no group.
    grouped = jnp.arange(x.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(grouped[:, None], out, 0)


def _whole_tiles(x, tall: int):
    return jnp.pad(x, ((0, -x.shape[0] % tall), (0, 0)))


def _precision(dtype):
    if dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()

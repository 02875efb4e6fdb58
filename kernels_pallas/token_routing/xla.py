"""What a CPU runs.

Where the result is bfloat16, adding is a gather: a sorted index gives every token its slots, and
no float32 copy of all tokens is needed. In float32 a scatter is as fast or faster.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.token_routing.ref import in_use
from kernels_pallas.token_routing.specs import GroupedMatmulConfig, TokenRoutingConfig


def gather_tokens(
    *,
    x: Float[Array, "B T D"],
    index: Int[Array, "B C"],
    count: Int[Array, " B"],
    dtype: jnp.dtype,
    config: TokenRoutingConfig,
) -> Float[Array, "B C D"]:
    """See :func:`kernels_pallas.token_routing.gather_tokens`."""
    del config
    return _gather(dtype, x.shape[1], x.dtype, x, index, count)


def scatter_add_tokens(
    *,
    residual: Float[Array, "B T D"],
    y: Float[Array, "B C D"],
    gate: Float[Array, "B C"],
    index: Int[Array, "B C"],
    count: Int[Array, " B"],
    config: TokenRoutingConfig,
) -> Float[Array, "B T D"]:
    """See :func:`kernels_pallas.token_routing.scatter_add_tokens`."""
    del config
    return _scatter(residual, y, gate, index, count)


def grouped_matmul(
    *,
    x: Float[Array, "N D"],
    weights: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    config: GroupedMatmulConfig,
) -> Float[Array, "N F"]:
    """See :func:`kernels_pallas.token_routing.grouped_matmul`."""
    del config
    # Masked before and after: what a backend does with rows of no group is its own affair.
    grouped = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
    out = lax.ragged_dot(
        jnp.where(grouped, x, 0),
        weights,
        group_sizes,
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(grouped, out, 0.0).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(dtype, length, x_dtype, x, index, count):
    del length, x_dtype
    return _rows(x, index, count).astype(dtype)


def _gather_forward(dtype, length, x_dtype, x, index, count):
    return _gather(dtype, length, x_dtype, x, index, count), (index, count)


def _gather_backward(dtype, length, x_dtype, residuals, cotangent):
    del dtype
    nothing = jnp.zeros((cotangent.shape[0], length, cotangent.shape[2]), x_dtype)
    return _added(nothing, cotangent, None, *residuals), None, None


_gather.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def _scatter(residual, y, gate, index, count):
    return _added(residual, y, gate, index, count)


def _scatter_forward(residual, y, gate, index, count):
    return _added(residual, y, gate, index, count), (y, gate, index, count)


def _scatter_backward(residuals, cotangent):
    y, gate, index, count = residuals
    rows = _rows(cotangent, index, count).astype(jnp.float32)
    valid = in_use(index, count)
    y_gradient = jnp.where(valid, gate, 0.0)[:, :, None] * rows
    products = rows * jnp.where(valid[:, :, None], y, 0).astype(jnp.float32)
    return cotangent, y_gradient.astype(y.dtype), jnp.sum(products, axis=2), None, None


_scatter.defvjp(_scatter_forward, _scatter_backward)


def _rows(x, index, count):
    valid = in_use(index, count)
    rows = jnp.take_along_axis(x, jnp.where(valid, index, 0)[:, :, None], axis=1, mode="clip")
    return jnp.where(valid[:, :, None], rows, 0)


def _added(residual, y, gate, index, count):
    """The sum in float32 of the residual and each token's slots, in order."""
    (batch, length, _), slots = residual.shape, y.shape[1]
    rows = lax.broadcasted_iota(jnp.int32, (batch, 1), 0)
    valid = in_use(index, count)
    tokens = jnp.where(valid, index, length)
    if residual.dtype == jnp.float32:
        more = jnp.where(valid[:, :, None], y, 0).astype(jnp.float32)
        if gate is not None:
            more *= jnp.where(valid, gate, 0.0)[:, :, None]
        return residual.at[rows, tokens].add(more, mode="drop")
    times = jnp.zeros((batch, length), jnp.int32).at[rows, tokens].add(1, mode="drop")
    # Once for all, not once for each element of a row.
    times, first = lax.optimization_barrier((times, jnp.cumsum(times, axis=1) - times))

    def add(repeat, total):
        slot = jnp.minimum(first + repeat, slots - 1)
        more = jnp.take_along_axis(y, slot[:, :, None], axis=1, mode="clip").astype(jnp.float32)
        if gate is not None:
            more *= jnp.take_along_axis(gate, slot, axis=1, mode="clip")[:, :, None]
        return jnp.where((repeat < times)[:, :, None], total + more, total)

    def once():
        return add(0, residual.astype(jnp.float32)).astype(residual.dtype)

    def repeatedly():
        total = lax.fori_loop(0, jnp.max(times), add, residual.astype(jnp.float32))
        return total.astype(residual.dtype)

    # The loop would keep the sum in memory, in float32.
    return lax.cond(jnp.max(times) > 1, repeatedly, once)

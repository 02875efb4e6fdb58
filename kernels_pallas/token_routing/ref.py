"""The specification, in float32."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

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
    valid = in_use(index, count)
    # In float32 so that the gradient of a repeated token is summed in it.
    rows = x.astype(jnp.float32)[_batch(index), jnp.where(valid, index, 0)]
    return jnp.where(valid[:, :, None], rows, 0.0).astype(dtype)


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
    valid = in_use(index, count)
    gated = jnp.where(valid, gate, 0.0)[:, :, None] * jnp.where(valid[:, :, None], y, 0)
    total = residual.astype(jnp.float32)
    nowhere = residual.shape[1]
    total = total.at[_batch(index), jnp.where(valid, index, nowhere)].add(gated, mode="drop")
    return total.astype(residual.dtype)


def grouped_matmul(
    *,
    x: Float[Array, "N D"],
    weights: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    config: GroupedMatmulConfig,
) -> Float[Array, "N F"]:
    """See :func:`kernels_pallas.token_routing.grouped_matmul`."""
    del config
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])
    exact = x.dtype == jnp.float32
    total = jnp.zeros((x.shape[0], weights.shape[2]), jnp.float32)
    for expert in range(weights.shape[0]):
        mine = (rows >= ends[expert] - group_sizes[expert]) & (rows < ends[expert])
        total += jnp.einsum(
            "nd,df->nf",
            jnp.where(mine[:, None], x, 0),
            weights[expert],
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if exact else None,
        )
    grouped = rows < ends[-1]
    return jnp.where(grouped[:, None], total, 0.0).astype(x.dtype)


def in_use(index: Int[Array, "B C"], count: Int[Array, " B"]) -> Bool[Array, "B C"]:
    """Which slots hold a token."""
    return jnp.arange(index.shape[1])[None, :] < count[:, None]


def _batch(index: Int[Array, "B C"]) -> Int[Array, "B 1"]:
    return lax.broadcasted_iota(jnp.int32, (index.shape[0], 1), 0)

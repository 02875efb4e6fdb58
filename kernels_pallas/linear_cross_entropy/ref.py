"""The specification: whole logits in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.linear_cross_entropy.specs import LinearCrossEntropyConfig, TargetLogits


def linear_cross_entropy(
    *,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    config: LinearCrossEntropyConfig,
) -> TargetLogits:
    """See :func:`kernels_pallas.linear_cross_entropy.linear_cross_entropy`."""
    del config
    logits = jnp.einsum("btd,vd->btv", hidden, weight, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)[None, None, :]
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return TargetLogits(
        target=jnp.take_along_axis(logits, targets[:, :, None], axis=-1, mode="clip")[:, :, 0],
        log_sum_exp=jax.nn.logsumexp(logits, axis=-1),
        mean=jnp.mean(logits, axis=-1),
    )

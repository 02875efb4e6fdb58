"""The specification: whole logits in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.linear_cross_entropy.specs import (
    LinearCrossEntropyConfig,
    TargetLogits,
    VocabularyStatistics,
)


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
    return _target_logits(_logits(hidden, weight, bias, softcap), targets)


def vocabulary_statistics(
    *,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    config: LinearCrossEntropyConfig,
) -> VocabularyStatistics:
    """See :func:`kernels_pallas.linear_cross_entropy.vocabulary_statistics`."""
    del config
    logits = _logits(hidden, weight, bias, softcap)
    logp = jax.nn.log_softmax(logits, axis=-1)
    return VocabularyStatistics(
        *_target_logits(logits, targets),
        entropy=-jnp.sum(jnp.exp(logp) * logp, axis=-1),
        highest=jax.lax.stop_gradient(jnp.max(logits, axis=-1)),
        best=jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


def _logits(hidden, weight, bias, softcap: float | None) -> Float[Array, "B T V"]:
    logits = jnp.einsum("btd,vd->btv", hidden, weight, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)[None, None, :]
    return capped(logits, softcap)


def capped(logits: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """``softcap · tanh(logits / softcap)``, or the logits where there is no cap."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _target_logits(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> TargetLogits:
    return TargetLogits(
        target=jnp.take_along_axis(logits, targets[:, :, None], axis=-1, mode="clip")[:, :, 0],
        log_sum_exp=jax.nn.logsumexp(logits, axis=-1),
        mean=jnp.mean(logits, axis=-1),
    )

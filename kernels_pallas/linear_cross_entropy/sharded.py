"""The statistics of a whole vocabulary, from those of its parts on the devices of mesh axes."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from kernels_pallas.linear_cross_entropy.specs import TargetLogits, VocabularyStatistics


def local(targets: Int[Array, "B T"], axes: tuple[str, ...], vocabulary: int) -> Int[Array, "B T"]:
    """Targets as ids of this device's part, -1 where they lie in another.

    Args:
        targets: ids in the whole vocabulary.
        axes: mesh axes over which the vocabulary is split, the slowest first.
        vocabulary: entries of this device's part.
    """
    here = targets - lax.axis_index(axes) * vocabulary
    return jnp.where((here >= 0) & (here < vocabulary), here, -1)


def target_logits(
    part: TargetLogits | VocabularyStatistics, here: Int[Array, "B T"], axes: tuple[str, ...]
) -> TargetLogits:
    """Merges what every device found in its part, equal parts assumed.

    Args:
        part: this device's.
        here: what :func:`local` gave.
        axes: mesh axes over which the vocabulary is split.
    """
    return TargetLogits(
        target=lax.psum(jnp.where(here >= 0, part.target, 0.0), axes),
        log_sum_exp=_log_sum_exp(part, axes),
        mean=lax.pmean(part.mean, axes),
    )


def statistics(
    part: VocabularyStatistics, here: Int[Array, "B T"], axes: tuple[str, ...], vocabulary: int
) -> VocabularyStatistics:
    """As :func:`target_logits`, with entropy, the highest logit and where it is.

    ``entropy = Σ_i w_i (entropy_i - log w_i)`` with the parts' shares ``w_i`` of the softmax.
    """
    merged = target_logits(part, here, axes)
    log_share = part.log_sum_exp - merged.log_sum_exp
    highest = lax.pmax(lax.stop_gradient(part.highest), axes)
    everywhere = lax.axis_index(axes) * vocabulary + part.best
    nowhere = lax.axis_size(axes) * vocabulary
    return VocabularyStatistics(
        *merged,
        entropy=lax.psum(jnp.exp(log_share) * (part.entropy - log_share), axes),
        highest=highest,
        best=lax.pmin(jnp.where(part.highest == highest, everywhere, nowhere), axes),
    )


def _log_sum_exp(part: TargetLogits | VocabularyStatistics, axes: tuple[str, ...]) -> Array:
    top = lax.pmax(lax.stop_gradient(part.log_sum_exp), axes)
    return top + jnp.log(lax.psum(jnp.exp(part.log_sum_exp - top), axes))

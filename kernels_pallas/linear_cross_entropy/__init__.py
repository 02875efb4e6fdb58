"""Logits of the targets and their normaliser, without logits of the whole vocabulary in memory."""

from typing import Literal

from jaxtyping import Array, Float, Int

from kernels_pallas.common.dispatch import Implementation, Operation, anything
from kernels_pallas.linear_cross_entropy import ref, xla
from kernels_pallas.linear_cross_entropy.specs import LinearCrossEntropyConfig, TargetLogits

_REF = Implementation(name="ref", run=ref.linear_cross_entropy, supports=anything)
_XLA = Implementation(name="xla", run=xla.linear_cross_entropy, supports=anything)
_OPERATION = Operation(name="linear_cross_entropy", order={"cpu": (_XLA, _REF)})


def linear_cross_entropy(
    *,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
    impl: Literal["ref", "xla"] | None = None,
    config: LinearCrossEntropyConfig | None = None,
) -> TargetLogits:
    """Projects onto the vocabulary and keeps three numbers per token.

    ``z[v] = cap(hidden · weight[v] + bias[v])`` with ``cap(x) = softcap · tanh(x / softcap)``;
    the result is ``z[target]``, ``log Σ_v exp z[v]`` and ``Σ_v z[v] / V``. So the
    log-probability is ``target - log_sum_exp``, the z-loss ``log_sum_exp²``, and the
    cross-entropy with label smoothing ``e``
    ``log_sum_exp - (1 - e) · target - e · mean``.

    Differentiable (reverse mode) in ``hidden``, ``weight`` and ``bias`` through all three.

    Args:
        hidden: last hidden states ``[B, T, D]``; with ``weight``'s dtype it sets the dtype of
            the matrix products, which accumulate in float32.
        weight: output embedding ``[V, D]``.
        targets: token ids ``[B, T]`` in ``[0, V)``; the ``target`` of another id is unspecified.
        bias: logit bias ``[V]``.
        softcap: bound of the absolute logits.
        impl: ``"ref"`` (whole logits), ``"xla"`` (blocks of the vocabulary, recomputed in the
            backward pass), or ``None`` for the best that can run.
        config: block sizes; ``None`` derives them from the shapes.

    Returns:
        float32 ``[B, T]`` each: ``target``, ``log_sum_exp``, ``mean``.

    Raises:
        ValueError: ``impl`` cannot run; the message has the reason.

    Reference: Erik Wijmans, Brody Huval, Alexander Hertzberg, Vladlen Koltun, Philipp
    Krähenbühl, "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009.

    Differences from the paper: no gradient is filtered out for being small and the vocabulary
    is not sorted, so gradients are exact; the mean logit is an output as well.
    """
    return _OPERATION(
        impl,
        hidden=hidden,
        weight=weight,
        targets=targets,
        bias=bias,
        softcap=softcap,
        config=config or LinearCrossEntropyConfig(),
    )


__all__ = ["LinearCrossEntropyConfig", "TargetLogits", "linear_cross_entropy"]

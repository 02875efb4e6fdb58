"""Logits of the targets and their normaliser, without logits of the whole vocabulary in memory."""

from typing import Literal

from jaxtyping import Array, Float, Int

from kernels_pallas.common.dispatch import Operation
from kernels_pallas.linear_cross_entropy import ref, sharded, tpu, xla
from kernels_pallas.linear_cross_entropy.distribution import (
    Projection,
    kl_divergence,
    sum_over_vocabulary,
)
from kernels_pallas.linear_cross_entropy.specs import (
    LinearCrossEntropyConfig,
    TargetLogits,
    VocabularyStatistics,
)
from kernels_pallas.linear_cross_entropy.top import TopLogits, top_logits

_LINEAR_CROSS_ENTROPY = Operation.of(
    "linear_cross_entropy",
    ref=ref.linear_cross_entropy,
    xla=xla.linear_cross_entropy,
    tpu=tpu.linear_cross_entropy,
    tpu_supports=tpu.supports,
)
_VOCABULARY_STATISTICS = Operation.of(
    "vocabulary_statistics",
    ref=ref.vocabulary_statistics,
    xla=xla.vocabulary_statistics,
    tpu=tpu.vocabulary_statistics,
    tpu_supports=tpu.supports,
)


def linear_cross_entropy(
    *,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
    vocabulary_axes: tuple[str, ...] = (),
    impl: Literal["ref", "xla", "tpu"] | None = None,
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
        vocabulary_axes: inside ``jax.shard_map``, the mesh axes over which ``weight`` and ``bias``
            are split into equal parts, the slowest first; ``targets`` are ids of the whole
            vocabulary, and the result, equal along those axes, is that of the whole.
        impl: ``"ref"`` (whole logits), ``"xla"`` (blocks of the vocabulary, recomputed in the
            backward pass), ``"tpu"`` (tiles in VMEM, likewise recomputed; inside
            ``jax.shard_map`` where there are several devices), or ``None`` for the best that
            can run.
        config: block sizes; ``None`` derives them from the shapes.

    Returns:
        float32 ``[B, T]`` each: ``target``, ``log_sum_exp``, ``mean``.

    Raises:
        ValueError: ``impl`` cannot run; the message has the reason.

    Reference: Erik Wijmans, Brody Huval, Alexander Hertzberg, Vladlen Koltun, Philipp
    Krähenbühl, "Cut Your Losses in Large-Vocabulary Language Models", 2024, arXiv:2411.09009.

    Differences from the paper: small gradients are left out only where ``config.skip_below``
    asks for it, by what all outputs have in common and relative to each token's incoming
    gradient; the order of the vocabulary comes from the product of the weight with the mean
    hidden state, with no sums in the forward pass; the mean logit is an output as well.
    """
    here = targets
    if vocabulary_axes:
        here = sharded.local(targets, vocabulary_axes, weight.shape[0])
    part = _LINEAR_CROSS_ENTROPY(
        impl,
        hidden=hidden,
        weight=weight,
        targets=here,
        bias=bias,
        softcap=softcap,
        config=config or LinearCrossEntropyConfig(),
    )
    return sharded.target_logits(part, here, vocabulary_axes) if vocabulary_axes else part


def vocabulary_statistics(
    *,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
    vocabulary_axes: tuple[str, ...] = (),
    impl: Literal["ref", "xla", "tpu"] | None = None,
    config: LinearCrossEntropyConfig | None = None,
) -> VocabularyStatistics:
    """:func:`linear_cross_entropy` with the entropy and the arg-max of each token's softmax.

    With ``z`` as there and ``p = softmax(z)``, ``entropy = -Σ_v p[v] log p[v]`` and
    ``best = argmax_v z[v]``, in the same pass over the vocabulary. Differentiable through all
    but ``highest`` and ``best``: ``∂entropy/∂z[v] = -p[v] (z[v] - Σ_u p[u] z[u])``.

    Args:
        hidden: as there, ``[B, T, D]``.
        weight: as there, ``[V, D]``.
        targets: as there, ``[B, T]``; any ids where ``target`` is not used.
        bias: as there, ``[V]``.
        softcap: as there.
        vocabulary_axes: as there.
        impl: as there.
        config: as there.

    Returns:
        ``[B, T]`` each: float32 ``target``, ``log_sum_exp``, ``mean``, ``entropy`` in nats,
        ``highest``, and int32 ``best``, the lowest of equal ids.

    Raises:
        ValueError: ``impl`` cannot run; the message has the reason.

    Reference: that of :func:`linear_cross_entropy`.

    Differences from the paper: entropy and arg-max are additions.
    """
    here, vocabulary = targets, weight.shape[0]
    if vocabulary_axes:
        here = sharded.local(targets, vocabulary_axes, vocabulary)
    part = _VOCABULARY_STATISTICS(
        impl,
        hidden=hidden,
        weight=weight,
        targets=here,
        bias=bias,
        softcap=softcap,
        config=config or LinearCrossEntropyConfig(),
    )
    if not vocabulary_axes:
        return part
    return sharded.statistics(part, here, vocabulary_axes, vocabulary)


__all__ = [
    "LinearCrossEntropyConfig",
    "Projection",
    "TargetLogits",
    "TopLogits",
    "VocabularyStatistics",
    "kl_divergence",
    "linear_cross_entropy",
    "sum_over_vocabulary",
    "top_logits",
    "vocabulary_statistics",
]

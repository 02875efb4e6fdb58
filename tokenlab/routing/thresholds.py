"""Gates that give a token every expert above a threshold, so that tokens differ in their number."""

from __future__ import annotations

import abc
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Bool, Float, Hidden
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import parameter
from tokenlab.core.weighted import Weighted
from tokenlab.routing.experts import ExpertChoice, ExpertGate, ExpertScores, best


class ThresholdGate(ExpertGate):
    """Experts of probability ``p_e >= τ`` and the likeliest, mixed by a softmax over them.

    With ``p = softmax(g)`` the active set of a token is
    ``A = {e: p_e >= τ} ∪ {argmax_e p_e}`` and the weights are ``softmax(g)`` over A. τ carries no
    gradient.

    Attributes:
        most: the most experts of a token, by score; None is all.
    """

    most: int | None = None

    @abc.abstractmethod
    def _threshold(
        self, probabilities: ExpertScores, valid: Bool[Array, "B T"], train: bool
    ) -> tuple[Float[Array, "#B #T 1"], dict[str, Weighted]]:
        """τ, and the losses of the gate's own parameters."""

    @nn.compact
    def __call__(
        self, x: Hidden, *, num_experts: int, valid: Bool[Array, "B T"], train: bool
    ) -> ExpertChoice:
        """Compares every probability with the threshold."""
        logits = self._logits(x, num_experts)
        probabilities = nn.softmax(logits)
        threshold, aux = self._threshold(jax.lax.stop_gradient(probabilities), valid, train)
        chosen = (probabilities >= threshold) | best(logits, 1)
        if self.most is not None:
            chosen &= best(logits, self.most_active(num_experts))
        weights = nn.softmax(logits, where=chosen)
        chosen &= valid[..., None]
        return ExpertChoice(
            chosen=chosen,
            weights=jnp.where(chosen, weights, 0.0),
            probabilities=probabilities,
            aux=aux,
        )

    @nn.nowrap
    def most_active(self, num_experts: int) -> int:
        """All of them, or ``most``.

        Raises:
            UserError: there are fewer experts.
        """
        if self.most is None:
            return num_experts
        if not 1 <= self.most <= num_experts:
            raise UserError(
                f"gate.most is {self.most}; use 1 to {num_experts}, the number of experts, or None"
            )
        return self.most


class PooledThresholdGate(ThresholdGate):
    """τ is a percentile of all probabilities of the layer and the batch: easy tokens get fewer.

    In training ``τ = quantile_P {p_ie}`` over tokens and experts, so ``(1 - P/100) E`` experts run
    on a token in the mean, beside those that run on a token because it must have one. Elsewhere τ
    is the parameter ``threshold``, so that a token's experts depend on that token alone.
    ``aux["threshold"]`` is ``(threshold - quantile)^2 / 2``, so ``AuxiliaryTerm(name="threshold")``
    and ``Group(parameters=("*/gate/threshold",),
    optimizer=SGD(learning_rate=Constant(peak=0.01)))`` make the parameter the moving average of
    the quantiles with decay 0.99. It starts at ``1/E``.

    Reference: Gülmez, "DynaMoE: Dynamic Token-Level Expert Activation with Layer-Wise Adaptive
    Capacity for Mixture-of-Experts Neural Networks", 2026, arXiv:2603.01697.

    Differences from the paper: it is known by its abstract and by second hand, where the percentile
    is of a token's own logits, which gives every token equally many (``TokenThresholdGate``); so
    the pool is ours. Of micro-batches the quantiles are averaged.

    Attributes:
        percentile: P, 0 to 100.
    """

    percentile: float = 75.0

    def _threshold(
        self, probabilities: ExpertScores, valid: Bool[Array, "B T"], train: bool
    ) -> tuple[Float[Array, "#B #T 1"], dict[str, Weighted]]:
        init = nn.initializers.constant(1 / probabilities.shape[-1])
        kept = parameter(self, "threshold", init, (1,), ("norm",))
        quantile = pooled_quantile(probabilities, valid=valid, percentile=self.percentile)
        tokens = jnp.sum(valid, dtype=jnp.float32)
        distance = 0.5 * jnp.square(kept[0] - quantile)
        aux = {"threshold": Weighted(total=tokens * distance, weight=tokens)}
        threshold = quantile if train else jax.lax.stop_gradient(kept)
        return threshold.reshape(1, 1, 1), aux


class TokenThresholdGate(ThresholdGate):
    """τ is a percentile of the token's own probabilities: top-k by another name.

    Where no two are equal, every token gets ``E - ceil((E - 1) P / 100)`` experts.

    Reference: as ``PooledThresholdGate``: arXiv:2603.01697.

    Differences from the paper: of probabilities, not logits, which are in the same order.

    Attributes:
        percentile: P, 0 to 100.
    """

    percentile: float = 75.0

    def _threshold(
        self, probabilities: ExpertScores, valid: Bool[Array, "B T"], train: bool
    ) -> tuple[Float[Array, "#B #T 1"], dict[str, Weighted]]:
        place = (probabilities.shape[-1] - 1) * self.percentile / 100
        # Between two neighbours lies no probability, so the upper one separates as well.
        return jnp.sort(probabilities, axis=-1)[..., math.ceil(place), None], {}


class FixedThresholdGate(ThresholdGate):
    """τ is a number: ``-inf`` mixes all experts, ``inf`` takes the likeliest alone.

    Reference: as ``PooledThresholdGate``: arXiv:2603.01697.

    Differences from the paper: τ is not learned, for no gradient reaches it.

    Attributes:
        threshold: τ, a probability.
    """

    threshold: float = 0.2

    def _threshold(
        self, probabilities: ExpertScores, valid: Bool[Array, "B T"], train: bool
    ) -> tuple[Float[Array, "#B #T 1"], dict[str, Weighted]]:
        return jnp.full((1, 1, 1), self.threshold), {}


def pooled_quantile(
    values: Float[Array, "B T E"], *, valid: Bool[Array, "B T"], percentile: float
) -> Float[Array, ""]:
    """A percentile of all values of valid tokens, linear between neighbours.

    Args:
        values: at most 1.
        valid: tokens that count; where there are none the result means nothing.
        percentile: 0 to 100.
    """
    ordered = jnp.sort(jnp.where(valid[..., None], values, 2.0).ravel())
    count = jnp.sum(valid) * values.shape[-1]
    place = percentile / 100 * jnp.maximum(count - 1, 0)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, jnp.maximum(count - 1, 0))]
    return low + (place - below) * (high - low)

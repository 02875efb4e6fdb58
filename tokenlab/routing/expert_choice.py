"""Expert choice: each computation takes the tokens it scores highest."""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.token_routing import in_use
from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int, Scalar
from tokenlab.core.weighted import Weighted
from tokenlab.routing.base import Route, Router
from tokenlab.routing.scores import LinearScores, Scores


class Asked(NamedTuple):
    """What a router is asked for; its fields are the arguments of ``Router``.

    Attributes:
        active: tokens that may be picked.
        capacity: slots.
        limit: of those, how many a row may use.
        share: of the active tokens, for a choice by chance.
    """

    active: Bool[Array, "B T"]
    capacity: int
    limit: Int[Array, " B"]
    share: float | Scalar


Kept = tuple[Bool[Array, "B T"], dict[str, Weighted]]


class ScoringRouter(Router):
    """Scores ``u`` of a part over a temperature, and gates ``alpha * sigmoid(u)``.

    Attributes:
        alpha: the gate of a token of highest confidence.
        temperature: divides the scores.
        head: gives ``u``.
    """

    alpha: float = 0.1
    temperature: float = 1.0
    head: Scores = LinearScores()

    @abc.abstractmethod
    def _kept(self, x: Hidden, scores: Float[Array, "B T"], asked: Asked) -> Kept:
        """The choice, and its losses."""

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        *,
        active: Bool[Array, "B T"],
        capacity: int,
        limit: Int[Array, " B"],
        share: float | Scalar,
    ) -> Route:
        """The choice under the gates; a causal one may be of the whole row."""
        scores = self._scored(x)
        kept, aux = self._kept(x, scores, Asked(active, capacity, limit, share))
        slots = x.shape[1] if self.causal else capacity
        return Route.of(kept, self.alpha * jax.nn.sigmoid(scores), capacity=slots, aux=aux)

    def _scored(self, x: Hidden, name: str = "scores") -> Float[Array, "B T"]:
        of = self.head.copy(parent=self, name=name)
        return of(x, choices=1)[..., 0] / self.temperature


class ExpertChoiceRouter(ScoringRouter):
    """The tokens of highest score, a fixed number of each row; training only, it sees the future.

    The gradient reaches the scores through the gates. ``aux["membership"]`` is the binary
    cross-entropy of ``sigmoid(u)`` against the choice, over the tokens that could be picked: it
    teaches the scores to be read with a threshold, which is how the causal twin picks. With
    ``auxiliary`` it teaches scores of their own instead, from a stream that gets no gradient, so
    that the choice itself is left alone.

    Reference: Raposo, Ritter, Richards, Lillicrap, Humphreys, Santoro, "Mixture-of-Depths:
    Dynamically allocating compute in transformer-based language models", 2024,
    arXiv:2404.02258; as used in Bae et al., "Mixture-of-Recursions: Learning Dynamic Recursive
    Depths for Adaptive Token-Level Computation", 2025, arXiv:2507.10524.

    Attributes:
        auxiliary: whether the threshold is read from scores of its own.
    """

    auxiliary: bool = False
    causal: ClassVar[bool] = False

    def _kept(self, x: Hidden, scores: Float[Array, "B T"], asked: Asked) -> Kept:
        kept = highest(scores, asked)
        told = scores
        if self.auxiliary:
            told = self._scored(jax.lax.stop_gradient(x), "auxiliary_scores")
        surprise = jax.nn.softplus(told) - jnp.where(kept, told, 0.0)
        return kept, {"membership": Weighted.of(surprise, asked.active.astype(jnp.float32))}

    @nn.nowrap
    def causal_twin(self) -> Router:
        """A threshold at one half on the same scores."""
        return ThresholdRouter(
            alpha=self.alpha,
            temperature=self.temperature,
            head=self.head,
            auxiliary=self.auxiliary,
        )


class ThresholdRouter(ScoringRouter):
    """Every active token with ``sigmoid(u) >= 1/2``, however many there are.

    Reference: as ``ExpertChoiceRouter``, whose causal twin it is.

    Attributes:
        auxiliary: whether the threshold is read from scores of its own.
    """

    auxiliary: bool = False
    causal: ClassVar[bool] = True

    def _kept(self, x: Hidden, scores: Float[Array, "B T"], asked: Asked) -> Kept:
        told = self._scored(x, "auxiliary_scores") if self.auxiliary else scores
        return asked.active & (told >= 0), {}

    @nn.nowrap
    def causal_twin(self) -> Router:
        """Itself."""
        return self


def highest(scores: Float[Array, "B T"], asked: Asked) -> Bool[Array, "B T"]:
    """The ``limit`` active tokens of highest score in each row; the earlier of equal ones."""
    ranked = jnp.where(asked.active, jax.lax.stop_gradient(scores), -jnp.inf)
    best = jax.lax.top_k(ranked, asked.capacity)[1]
    used = in_use(best, jnp.minimum(asked.limit, jnp.sum(asked.active, axis=1)))
    rows = jnp.arange(best.shape[0])[:, None]
    kept = jnp.zeros(scores.shape, bool)
    return kept.at[rows, jnp.where(used, best, scores.shape[1])].set(True, mode="drop")

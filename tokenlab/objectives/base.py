"""The objective families: unreduced losses, the weights of tokens, and their weighted sum."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Scalar, Values, Weights
from tokenlab.core.context import Context
from tokenlab.core.weighted import Weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss(abc.ABC):
    """The token loss family."""

    @abc.abstractmethod
    def __call__(self, context: Context) -> Values:
        """Loss of every position, float32, unreduced and unweighted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenWeights(abc.ABC):
    """The token weight family: which tokens count, and how much."""

    @abc.abstractmethod
    def __call__(self, context: Context) -> Weights:
        """Non-negative weights; they multiply those that the batch itself carries."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllTokens(TokenWeights):
    """Every token counts as the batch says."""

    def __call__(self, context: Context) -> Weights:
        """One everywhere."""
        return jnp.ones_like(context.batch["weights"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """One summand of an objective.

    Attributes:
        loss: the unreduced loss.
        tokens: the weights of its tokens.
        coefficient: factor of the term's mean.
    """

    loss: TokenLoss
    tokens: TokenWeights = AllTokens()
    coefficient: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A weighted sum of means: ``sum_k coefficient_k * total_k / weight_k``.

    Attributes:
        terms: the summands by name; metrics carry the names.
    """

    terms: Mapping[str, Term]

    def __call__(self, context: Context) -> dict[str, Weighted]:
        """Total and weight of every term, undivided; weights carry no gradient."""
        sums = {}
        for name, term in self.terms.items():
            weights = jax.lax.stop_gradient(term.tokens(context)) * context.batch["weights"]
            sums[name] = Weighted.of(term.loss(context), weights)
        return sums

    def value(self, sums: Mapping[str, Weighted]) -> Scalar | float:
        """The scalar to minimise, from sums over the whole batch."""
        return sum(term.coefficient * sums[name].mean() for name, term in self.terms.items())

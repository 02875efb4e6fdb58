"""The objective families: unreduced losses, the weights of tokens, and their weighted sum."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Scalar, Values, Weights
from tokenlab.core.context import Context
from tokenlab.core.errors import UserError
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
class TargetRange(TokenWeights):
    """Tokens whose target has an id in a range, such as the answers of a task.

    Attributes:
        first: the lowest id.
        last: the id behind the highest.
    """

    first: int
    last: int

    def __call__(self, context: Context) -> Weights:
        """One where ``first <= target < last``, else zero."""
        targets = context.batch["targets"]
        return ((targets >= self.first) & (targets < self.last)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summand(abc.ABC):
    """One summand of an objective.

    Attributes:
        coefficient: factor of the summand's mean.
    """

    coefficient: float = 1.0

    @abc.abstractmethod
    def __call__(self, context: Context) -> Weighted:
        """Total and weight, undivided; the weight carries no gradient."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term(Summand):
    """A loss of tokens.

    Attributes:
        loss: the unreduced loss.
        tokens: the weights of its tokens.
    """

    loss: TokenLoss
    tokens: TokenWeights = AllTokens()

    def __call__(self, context: Context) -> Weighted:
        """The loss under its own weights and those of the batch."""
        weights = jax.lax.stop_gradient(self.tokens(context)) * context.batch["weights"]
        return Weighted.of(self.loss(context), weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxiliaryTerm(Summand):
    """A loss that the model itself reports, such as that of a router.

    Attributes:
        name: of the entry of ``trace.aux``.
        view: the model that is asked.
    """

    name: str
    view: str = "policy"

    def __call__(self, context: Context) -> Weighted:
        """What the forward pass reported.

        Raises:
            UserError: it reported no loss of that name.
        """
        aux = context.output(self.view).trace.aux
        if self.name not in aux:
            shown = ", ".join(aux) or "none"
            raise UserError(f"the model reports no loss {self.name!r}; it has {shown}")
        return aux[self.name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A weighted sum of means: ``sum_k coefficient_k * total_k / weight_k``.

    Attributes:
        terms: the summands by name; metrics carry the names.
    """

    terms: Mapping[str, Summand]

    def __call__(self, context: Context) -> dict[str, Weighted]:
        """Total and weight of every term, undivided; weights carry no gradient."""
        return {name: term(context) for name, term in self.terms.items()}

    def value(self, sums: Mapping[str, Weighted]) -> Scalar | float:
        """The scalar to minimise, from sums over the whole batch."""
        return sum(term.coefficient * sums[name].mean() for name, term in self.terms.items())

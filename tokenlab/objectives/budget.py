"""A penalty on how much a model runs, over all its layers together."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Scalar
from tokenlab.core.context import Context
from tokenlab.core.errors import UserError
from tokenlab.core.weighted import Weighted
from tokenlab.objectives.base import Summand


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetPenalty(Summand):
    """``|m - budget|`` or its square, m being the share of units that run, over layers and tokens.

    One budget for all of them: a layer may run more where another runs less. Padding is in no mean.
    Of several micro-batches it is the mean of their penalties.

    Reference: Alizadeh et al., "Duo-LLM: A Framework for Studying Adaptive Computation in Large
    Language Models", 2024, arXiv:2410.10846 (the square; its coefficient is not published); Zhao et
    al., "SkipGPT: Dynamic Layer Pruning Reinvented with Token Awareness and Module Decoupling",
    2025, arXiv:2506.04179 (the absolute value, with coefficient 20).

    Attributes:
        budget: wanted share, 0 to 1.
        distance: how far m is from it.
        name: entry of ``trace.aux`` with the tokens of each unit that run, over all its tokens.
        view: the model that is asked.
    """

    budget: float
    distance: Literal["absolute", "squared"] = "absolute"
    name: str = "executed"
    view: str = "policy"

    def __call__(self, context: Context) -> Weighted:
        """The penalty of a forward pass.

        Raises:
            UserError: the model has no units that may be left out.
        """
        aux = context.output(self.view).trace.aux
        if self.name not in aux:
            raise UserError(
                f"the model reports no {self.name!r}; give its units stand-ins (with_stand_ins)"
            )
        return self.of(aux[self.name])

    def of(self, executed: Weighted) -> Weighted:
        """The penalty, weighed by the tokens of all units.

        Args:
            executed: of each unit, the tokens that it runs on, over all its tokens.
        """
        away = mean_share(executed) - self.budget
        penalty = jnp.abs(away) if self.distance == "absolute" else away**2
        tokens = jax.lax.stop_gradient(jnp.sum(executed.weight))
        return Weighted(total=tokens * penalty, weight=tokens)


def mean_share(executed: Weighted) -> Scalar:
    """The mean over all units and tokens of what units report, 0 where there are no tokens."""
    weight = jnp.sum(executed.weight)
    return jnp.sum(executed.total) / jnp.where(weight > 0, weight, 1.0)

"""Losses of whole distributions, for models that are fed mixtures of tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Values
from tokenlab.core.context import Context
from tokenlab.core.errors import UserError
from tokenlab.objectives.base import TokenLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributionKL(TokenLoss):
    """``KL(a || softmax(z))`` from the batch's ``distribution`` a of each position, in nats.

    Where a is one token this is its negative log-likelihood. Logits of the whole vocabulary are in
    memory, as is the batch's distribution over it.

    Reference: Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak, "Continuous Chain of Thought
    Enables Parallel Exploration and Reasoning", 2025, arXiv:2505.23648.

    Differences from the paper: the model's own mixtures are found by repeated passes over whole
    rows, one thought per pass, with gradients through all of them.

    Attributes:
        view: the model that is scored.
        passes: thoughts from the first on that the model is fed as it predicts them itself (the
            soft teacher); 0 feeds what the batch says (the hard teacher).
    """

    view: str = "policy"
    passes: int = 0

    def __post_init__(self) -> None:
        if self.passes < 0:
            raise ValueError(f"passes {self.passes} must be 0 or more")

    def __call__(self, context: Context) -> Values:
        """Nats of every position; 0 where the batch has no distribution.

        Raises:
            UserError: the batch has no ``distribution``.
        """
        if "distribution" not in context.batch:
            raise UserError(
                "the batch has no distribution; use a task that has one, or NextToken for targets"
            )
        wanted = context.batch["distribution"].astype(jnp.float32)
        logp = jax.nn.log_softmax(context.logits(self.view, passes=self.passes), axis=-1)
        some = wanted > 0
        safe = jnp.where(some, wanted, 1.0)
        return jnp.sum(jnp.where(some, wanted * (jnp.log(safe) - logp), 0.0), axis=-1)

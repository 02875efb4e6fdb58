"""Losses of the next token."""

from __future__ import annotations

import dataclasses

from tokenlab.core.arrays import Values
from tokenlab.core.context import Context
from tokenlab.objectives.base import TokenLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(TokenLoss):
    """Negative log-likelihood of the target: ``-log p(target)``, in nats.

    Attributes:
        view: the model that is scored.
    """

    view: str = "policy"

    def __call__(self, context: Context) -> Values:
        """Nats of every target."""
        return -context.token_logp(self.view)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothedNextToken(TokenLoss):
    """Cross-entropy against a target mixed with the uniform distribution over the vocabulary.

    ``-(1 - s) log p(target) - s * mean_v log p(v)``.

    Reference: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture
    for Computer Vision", 2015, arXiv:1512.00567, section 7.

    Attributes:
        smoothing: share s of the uniform distribution, 0 to 1.
        view: the model that is scored.
    """

    smoothing: float = 0.1
    view: str = "policy"

    def __call__(self, context: Context) -> Values:
        """Nats of every position against the smoothed target."""
        logits = context.target_logits(self.view)
        mixed = (1 - self.smoothing) * logits.target + self.smoothing * logits.mean
        return logits.log_sum_exp - mixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZLoss(TokenLoss):
    """Keeps the softmax normaliser near one: ``log(Z)^2``.

    Reference: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022,
    arXiv:2204.02311, section 5 (coefficient 1e-4).

    Attributes:
        view: the model that is scored.
    """

    view: str = "policy"

    def __call__(self, context: Context) -> Values:
        """Squared log-normaliser of every position."""
        return context.target_logits(self.view).log_sum_exp ** 2

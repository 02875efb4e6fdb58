"""Losses of the next token."""

from __future__ import annotations

import abc
import dataclasses

import jax.numpy as jnp

from kernels_pallas.linear_cross_entropy import LinearCrossEntropyConfig, TargetLogits
from tokenlab.core.arrays import Values
from tokenlab.core.context import Context, LossImpl
from tokenlab.core.errors import UserError
from tokenlab.objectives.base import TokenLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyLoss(TokenLoss, abc.ABC):
    """A loss of the logits' statistics, which all terms over one view share.

    Attributes:
        view: the model that is scored.
        impl: form of ``kernels_pallas.linear_cross_entropy``; None takes the best that the
            platform has.
        config: its block sizes, and which small gradients it may leave out.
    """

    view: str = "policy"
    impl: LossImpl | None = None
    config: LinearCrossEntropyConfig | None = None

    def __call__(self, context: Context) -> Values:
        """The loss of every position."""
        return self.of(context.target_logits(self.view, self.impl, self.config))

    @abc.abstractmethod
    def of(self, logits: TargetLogits) -> Values:
        """The loss, from target logit, log-sum-exp and mean logit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(VocabularyLoss):
    """Negative log-likelihood of the target: ``-log p(target)``, in nats."""

    def of(self, logits: TargetLogits) -> Values:
        """Nats of every target."""
        return logits.log_sum_exp - logits.target


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothedNextToken(VocabularyLoss):
    """Cross-entropy against a target mixed with the uniform distribution over the vocabulary.

    ``-(1 - s) log p(target) - s * mean_v log p(v)``.

    Reference: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture
    for Computer Vision", 2015, arXiv:1512.00567, section 7.

    Attributes:
        smoothing: share s of the uniform distribution, 0 to 1.
    """

    smoothing: float = 0.1

    def of(self, logits: TargetLogits) -> Values:
        """Nats of every position against the smoothed target."""
        mixed = (1 - self.smoothing) * logits.target + self.smoothing * logits.mean
        return logits.log_sum_exp - mixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZLoss(VocabularyLoss):
    """Keeps the softmax normaliser near one: ``log(Z)^2``.

    Reference: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022,
    arXiv:2204.02311, section 5 (coefficient 1e-4).
    """

    def of(self, logits: TargetLogits) -> Values:
        """Squared log-normaliser of every position."""
        return logits.log_sum_exp**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedNextToken(NextToken):
    """Negative log-likelihood expected over depths: ``-sum_d q(d) log p_d(target)``, in nats.

    The model is one whose depth program leaves a stream for every depth, as
    ``HaltingLoop(readout="expected_loss")`` does. The gradient reaches the chances q as well.

    Reference: Banino, Balaguer, Blundell, "PonderNet: Learning to Ponder", 2021, arXiv:2107.05407.
    """

    def __call__(self, context: Context) -> Values:
        """Nats of every target.

        Raises:
            UserError: the model leaves one stream alone.
        """
        trace = context.output(self.view).trace
        if trace.streams is None:
            raise UserError(
                f"{self.view} leaves one stream, not one for each depth; "
                "use model.depth.readout=expected_loss, or the loss NextToken()"
            )
        losses = [
            self.of(context.logits_from(hidden, self.view, self.impl, self.config))
            for hidden in trace.streams
        ]
        return jnp.sum(trace.figures["halting"] * jnp.stack(losses), axis=0)

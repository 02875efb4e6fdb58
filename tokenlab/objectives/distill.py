"""Losses that make one model do what another does."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Values
from tokenlab.core.context import Context, LossImpl
from tokenlab.core.errors import UserError
from tokenlab.core.weighted import Weighted
from tokenlab.objectives.base import Summand, TokenLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherKL(TokenLoss):
    """``KL(teacher || student)`` of each position, over the whole vocabulary, in nats.

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
    arXiv:1503.02531.

    Differences from the paper: temperature 1, and the divergence in place of the cross-entropy,
    which is as much more as the teacher's entropy.

    Attributes:
        view: the student.
        teacher: the teacher, which gets no gradient.
        impl: form of ``kernels_pallas.linear_cross_entropy``; None takes the best that the
            platform has.
    """

    view: str = "policy"
    teacher: str = "teacher"
    impl: LossImpl | None = None

    def __call__(self, context: Context) -> Values:
        """Nats of every position."""
        return context.kl_divergence(self.teacher, self.view, self.impl)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamError(Summand):
    """How far the residual stream is from the teacher's: ``mean_l |h_l - t_l|² / |t_l|²``.

    A mean over all tokens that are not padding, whatever the batch weighs.

    Reference: Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin
    Deep Nets", 2014, arXiv:1412.6550.

    Differences from the paper: every layer is compared, without a map between widths, and errors
    are relative.

    Attributes:
        view: the student.
        teacher: the teacher, which gets no gradient.
    """

    view: str = "policy"
    teacher: str = "teacher"

    def __call__(self, context: Context) -> Weighted:
        """Total and number of tokens.

        Raises:
            UserError: the models differ in layers or width.
        """
        ours, theirs = context.streams(self.view), context.streams(self.teacher)
        if [x.shape for x in ours] != [x.shape for x in theirs]:
            shown = " and ".join(
                f"{len(x)} layers of width {x[0].shape[-1]}" for x in (ours, theirs)
            )
            raise UserError(
                f"{self.view} and {self.teacher} have {shown}; StreamError compares equal ones"
            )
        error = jnp.zeros(ours[0].shape[:2], jnp.float32)
        for our, their in zip(ours, theirs, strict=True):
            wanted = jax.lax.stop_gradient(their).astype(jnp.float32)
            square = jnp.sum((our.astype(jnp.float32) - wanted) ** 2, axis=-1)
            error += square / jnp.maximum(jnp.sum(wanted**2, axis=-1), 1e-12)
        tokens = (context.batch["segments"] > 0).astype(jnp.float32)
        return Weighted.of(error / len(ours), tokens)

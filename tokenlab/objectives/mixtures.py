"""Losses of whole distributions, for models that are fed mixtures of tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Float, Values
from tokenlab.core.context import Context
from tokenlab.core.errors import UserError
from tokenlab.models.mixtures import MeanOfSamples, RandomMixture
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixturePolicy(TokenLoss):
    """Clipped policy gradient of drawn thoughts: ``-min(r A, clip(r, 1 - c, 1 + c) A)``.

    ``r`` is how much likelier what was drawn at a position has become: a mixture by its density
    where the batch's ``thought`` [B, T] is above 0, elsewhere a token. What was drawn is the
    batch's ``distribution``, what was read its ``mixture``; ``advantages`` [B, T] is A, and
    ``old_logits`` [B, T, V] are those of the policy that drew, fed the same.

    Reference: Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak, "Continuous Chain of Thought
    Enables Parallel Exploration and Reasoning", 2025, arXiv:2505.23648; Shao et al., "DeepSeekMath:
    Pushing the Limits of Mathematical Reasoning in Open Language Models", 2024, arXiv:2402.03300.

    Attributes:
        mixture: how thoughts were drawn.
        clip: c, above 0.
        view: the policy that learns.
    """

    mixture: RandomMixture = MeanOfSamples()
    clip: float = 0.1
    view: str = "policy"

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"clip {self.clip} must be above 0")

    def __call__(self, context: Context) -> Values:
        """The surrogate of every position.

        Raises:
            UserError: the batch has no rollouts.
        """
        batch = context.batch
        wanted = ("distribution", "thought", "advantages", "old_logits")
        if absent := [name for name in wanted if name not in batch]:
            raise UserError(
                f"the batch has no {', '.join(absent)}; MixturePolicy learns by rollouts"
            )
        new = context.logits(self.view)
        old = jax.lax.stop_gradient(batch["old_logits"].astype(jnp.float32))
        drawn, advantages = batch["distribution"], batch["advantages"]
        gain = jax.nn.log_softmax(new, axis=-1) - jax.nn.log_softmax(old, axis=-1)
        ratio = jnp.exp(
            jnp.where(
                batch["thought"] > 0,
                self.mixture.log_ratio(mixture=drawn, new=new, old=old),
                jnp.sum(drawn * gain, axis=-1),
            )
        )
        clipped = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
        return -jnp.minimum(ratio * advantages, clipped * advantages)


def group_advantages(rewards: Float[Array, "P G"], *, least: float = 1e-12) -> Float[Array, "P G"]:
    """Rewards of the rollouts of one prompt against each other: ``(r - mean) / std``.

    Reference: Shao et al., "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open
    Language Models", 2024, arXiv:2402.03300, section 4.1.

    Args:
        rewards: of G rollouts of each of P prompts.
        least: floor of the standard deviation; equal rewards have advantage 0.
    """
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    spread = jnp.sqrt(jnp.mean(centred**2, axis=1, keepdims=True))
    return centred / jnp.maximum(spread, least)

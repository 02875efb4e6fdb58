"""Losses of a model that thinks: before a thought, after it, and of what was thought."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Float, Values
from tokenlab.core.context import Context
from tokenlab.core.errors import UserError
from tokenlab.objectives.base import TokenLoss


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeforeThought(TokenLoss):
    """Nats of each target without a thought: ``-log p(y)`` of the stream before it.

    Reference: Zelikman, Harik, Shao, Jayasiri, Haber, Goodman, "Quiet-STaR: Language Models Can
    Teach Themselves to Think Before Speaking", 2024, arXiv:2403.09629.

    Attributes:
        view: a model that thinks.
    """

    view: str = "policy"

    def __call__(self, context: Context) -> Values:
        """Of every position."""
        return context.thought_nats(self.view)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AfterThought(TokenLoss):
    """Nats of each target after a thought, a mean over all thoughts that say it.

    A target is said after the thoughts behind the M tokens before it, S of each.

    Reference: as ``BeforeThought``: arXiv:2403.09629.

    Attributes:
        view: a model that thinks.
    """

    view: str = "policy"

    def __call__(self, context: Context) -> Values:
        """Of every position; 0 for padding."""
        there = context.thoughts(self.view).there.astype(jnp.float32)
        after = jnp.mean(context.thought_nats(self.view)[1], axis=0)
        return jnp.sum(after * there, axis=0) / jnp.maximum(jnp.sum(there, axis=0), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThoughtPolicy(TokenLoss):
    """Policy gradient of thoughts by how much likelier they make what follows: ``-A log p(z)``.

    The reward of a thought z is ``r = sum_m [nats before - nats after]`` over the M targets said
    behind it, each by its weight in the batch; ``A = r - mean(r)`` over the S thoughts of a
    position, and with ``clamp`` no less than 0. ``log p(z)`` is a mean over the tokens that were
    drawn. Rewards carry no gradient.

    Subtracting a mean that has the thought's own reward in it makes the gradient (S - 1) / S of the
    true one; clamping biases it.

    Reference: as ``BeforeThought``: arXiv:2403.09629.

    Attributes:
        temperature: at which ``p(z)`` is taken; thoughts are drawn at 1.
        clamp: whether thoughts below the mean count as the mean.
        view: a model that thinks.
    """

    temperature: float = 3.0
    clamp: bool = True
    view: str = "policy"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} must be above 0")

    def __call__(self, context: Context) -> Values:
        """Of every position.

        Raises:
            UserError: the model draws no thoughts, or one per position, which beats no other.
        """
        thoughts = context.thoughts(self.view)
        samples, count, batch, length = thoughts.drawn.shape
        if samples < 2 or count == 0:
            raise UserError(
                f"{samples} thoughts of {count} drawn tokens leave nothing to choose; "
                "use model.samples of 2 or more, and model.thought of 1 or more with kind='drawn'"
            )
        found = context.logits_from(
            thoughts.drawing.reshape(-1, length, thoughts.drawing.shape[-1]),
            self.view,
            targets=thoughts.drawn.reshape(-1, length),
            temperature=self.temperature,
        )
        nats = (found.log_sum_exp - found.target).reshape(samples, count, batch, length)
        advantages = self.advantages(thought_rewards(context, self.view))
        return jnp.mean(jax.lax.stop_gradient(advantages) * jnp.mean(nats, axis=1), axis=0)

    def advantages(self, rewards: Float[Array, "S B T"]) -> Float[Array, "S B T"]:
        """``A`` of rewards."""
        centred = rewards - jnp.mean(rewards, axis=0, keepdims=True)
        return jnp.maximum(centred, 0.0) if self.clamp else centred


def thought_rewards(context: Context, view: str = "policy") -> Float[Array, "S B T"]:
    """``r`` of every thought behind every token."""
    before, after = context.thought_nats(view)
    counted = context.thoughts(view).there * context.batch["weights"][None]
    gains = (before[None, None] - after) * counted[None]
    return sum(
        (
            jnp.pad(gains[:, ahead, :, ahead:], ((0, 0), (0, 0), (0, ahead)))
            for ahead in range(gains.shape[1])
        ),
        start=jnp.zeros_like(gains[:, 0]),
    )

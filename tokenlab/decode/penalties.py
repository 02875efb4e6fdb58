"""Processors that lower what has been said already."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float
from tokenlab.decode.processors import History, Processor, RowLogits


def _counts(history: History, where: Bool[Array, "B C"], vocabulary: int) -> Float[Array, "B V"]:
    """How often each token occurs among those of ``where``."""
    rows = jnp.arange(len(history.tokens))[:, None]
    at = jnp.where(where, history.tokens, vocabulary)
    return jnp.zeros((len(history.tokens), vocabulary)).at[rows, at].add(1.0, mode="drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionPenalty(Processor):
    """Makes every token of the prompt and of what was written less likely, once.

    A logit above 0 is divided by the penalty, one below is multiplied.

    Reference: Keskar, McCann, Varshney, Xiong, Socher, "CTRL: A Conditional Transformer Language
    Model for Controllable Generation", 2019, arXiv:1909.05858.

    Attributes:
        penalty: above 0; 1 changes nothing.
    """

    penalty: float

    def __post_init__(self) -> None:
        if not self.penalty > 0:
            raise ValueError(f"penalty {self.penalty} must be above 0")

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        """Scales the logits of tokens that are there."""
        there = jnp.arange(history.tokens.shape[1])[None, :] < history.lengths[:, None]
        seen = _counts(history, there, logits.shape[-1]) > 0
        scaled = jnp.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return jnp.where(seen, scaled, logits), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class PresencePenalty(Processor):
    """``logits - presence · [count > 0] - frequency · count``, over what was written.

    Attributes:
        presence: subtracted once from a token that was written.
        frequency: subtracted for each time.
    """

    presence: float = 0.0
    frequency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("presence", "frequency"):
            if not -100 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} {getattr(self, name)} must be in -100..100")

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        """Subtracts; the prompt does not count."""
        counts = _counts(history, history.written(), logits.shape[-1])
        return logits - self.presence * (counts > 0) - self.frequency * counts, state

"""Two temperatures, by the entropy of a token and of the reasoning step that it stands in."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.tokenizers import Tokenizer

# Dividing by less than this is taking the best.
_GREEDY = 1e-6


@flax.struct.dataclass
class StepEntropy:
    """Entropies of the tokens drawn so far, in nats; of each row by itself.

    Attributes:
        recent: the last of them, in a ring.
        count: how many there are.
        total: their sum.
        step_count: how many the current step has.
        step_total: their sum.
    """

    recent: Float[Array, "B W"]
    count: Int[Array, " B"]
    total: Float[Array, " B"]
    step_count: Int[Array, " B"]
    step_total: Float[Array, " B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTemperature:
    """The temperature of a token: ``high`` where its entropy reaches a threshold, else ``low``.

    The entropy of the step so far is estimated by ``S``, the mean over its tokens; while it has
    fewer than ``window``, by the mean of the last ``window`` tokens of all steps; before the first
    token by the entropy H of the token itself. A step is uncertain where S is above the mean of
    all earlier tokens. The threshold is S in an uncertain step and ``threshold`` in any other.

    Attributes:
        high: temperature of uncertain tokens.
        low: temperature of the others; 0 takes the most likely token.
        threshold: in nats, of steps that are not uncertain; the paper takes the 80th percentile
            over what the quantised model draws at temperature 0.6.
        window: tokens, at least 1.
    """

    high: float = 1.0
    low: float = 0.3
    threshold: float = 0.55
    window: int = 32

    def __post_init__(self) -> None:
        if not self.high > 0 or not self.low >= 0:
            raise ValueError(f"high {self.high} must be above 0 and low {self.low} not below it")
        if self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1")

    def init(self, *, batch: int) -> StepEntropy:
        """The state before the first token; prompts are not counted."""
        none, zero = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.float32)
        recent = jnp.zeros((batch, self.window), jnp.float32)
        return StepEntropy(recent=recent, count=none, total=zero, step_count=none, step_total=zero)

    def __call__(
        self, *, logits: Float[Array, "B V"], boundary: Bool[Array, " B"], state: StepEntropy
    ) -> tuple[Float[Array, " B"], StepEntropy]:
        """The temperature of each row's next token, and the state with its entropy.

        Args:
            logits: before any temperature or truncation.
            boundary: rows whose last token ended a step.
            state: of the tokens before.
        """
        entropy = _entropy(logits)
        step_count = jnp.where(boundary, 0, state.step_count)
        step_total = jnp.where(boundary, 0.0, state.step_total)
        mean = jnp.where(state.count > 0, state.total / jnp.maximum(state.count, 1), entropy)
        # As long as the ring is not full, its mean is that of all, to the last bit.
        windowed = jnp.where(state.count > self.window, jnp.mean(state.recent, axis=1), mean)
        whole = step_total / jnp.maximum(step_count, 1)
        step = jnp.where(step_count < self.window, windowed, whole)
        threshold = jnp.where(step > mean, step, self.threshold)
        temperature = jnp.where(entropy >= threshold, self.high, self.low)
        place = jnp.arange(self.window)[None] == (state.count % self.window)[:, None]
        return temperature, StepEntropy(
            recent=jnp.where(place, entropy[:, None], state.recent),
            count=state.count + 1,
            total=state.total + entropy,
            step_count=step_count + 1,
            step_total=step_total + entropy,
        )


def _entropy(logits: Float[Array, "B V"]) -> Float[Array, " B"]:
    """In nats; tokens that are ruled out add nothing."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(logp) * jnp.where(jnp.isfinite(logp), logp, 0.0), axis=-1)


def at_temperature(
    logits: Float[Array, "B V"], temperature: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits over each row's temperature; of 0 the first of the largest alone stays."""
    greedy = temperature <= _GREEDY
    best = jnp.arange(logits.shape[1])[None] == jnp.argmax(logits, axis=-1)[:, None]
    scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    return jnp.where(greedy[:, None] & ~best, -jnp.inf, scaled)


class StepEnds(NamedTuple):
    """Tokens that end a step of reasoning: a blank line, in one token or in two.

    Attributes:
        blank: ids whose text has a blank line.
        newline: ids whose text is one line break and nothing else.
    """

    blank: tuple[int, ...]
    newline: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> StepEnds:
        """The ids of a tokenizer, by the text of each."""
        texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        return cls(
            blank=tuple(i for i, text in enumerate(texts) if b"\n\n" in text),
            newline=tuple(i for i, text in enumerate(texts) if text == b"\n"),
        )

    def __call__(self, *, last: Int[Array, " B"], before: Int[Array, " B"]) -> Bool[Array, " B"]:
        """Whether a step has ended with the tokens ``before`` and ``last``.

        Args:
            last: the last token drawn; -1 where there is none.
            before: the one before it, likewise.
        """
        blank, newline = (jnp.asarray(ids, jnp.int32) for ids in self)
        two = jnp.isin(last, newline) & jnp.isin(before, newline)
        return jnp.isin(last, blank) | two

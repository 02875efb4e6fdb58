"""Two temperatures, by the entropy of a token and of the reasoning step that it stands in."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.decode.processors import History, Processor, RowLogits, entropy_of
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
class StepEnds:
    """Tokens that end a step of reasoning: a blank line, in one token or in two.

    Attributes:
        blank: ids whose text has a blank line.
        newline: ids whose text is one line break and nothing else.
    """

    blank: tuple[int, ...] = ()
    newline: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> StepEnds:
        """The ids of a tokenizer, by the text of each."""
        texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        return cls(
            blank=tuple(i for i, text in enumerate(texts) if b"\n\n" in text),
            newline=tuple(i for i, text in enumerate(texts) if text == b"\n"),
        )

    def reached(self, last: Int[Array, "B 2"]) -> Bool[Array, " B"]:
        """Whether a step has ended with the last two tokens, -1 where there is none."""
        blank, newline = (jnp.asarray(ids, jnp.int32) for ids in (self.blank, self.newline))
        return jnp.isin(last[:, 1], blank) | jnp.all(jnp.isin(last, newline), axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReSET(Processor):
    """One temperature for tokens whose entropy reaches a threshold, and another for the rest.

    The entropy of the step so far is estimated by ``S``, the mean over its tokens; while it has
    fewer than ``window``, by the mean of the last ``window`` tokens of all steps; before the first
    token by the entropy of that token itself. A step is uncertain where S is above the mean of all
    earlier tokens. The threshold is S in an uncertain step and ``threshold`` in any other. So
    symbols that must be right are drawn sharply, and branches stay open.

    It must be the first of the processors, for it reads the entropy of the model, and the only
    temperature among them; the paper lets ``TopP(p=0.95)`` follow.

    Reference: Lee, Lee, Yoo, et al., "ReSET: Accurate Latency-Critical NVFP4 Reasoning via
    Step-Aware Temperature Scaling", 2026, arXiv:2606.13233, as its released code has it.

    Attributes:
        high: temperature of uncertain tokens.
        low: temperature of the others; 0 takes the most likely token.
        threshold: in nats, of steps that are not uncertain; the paper takes the 80th percentile
            over what the quantised model draws at temperature 0.6.
        window: tokens, at least 1.
        ends: tokens that end a step (``StepEnds.of(tokenizer)``).
    """

    high: float = 1.0
    low: float = 0.3
    threshold: float = 0.55
    window: int = 32
    ends: StepEnds = StepEnds()

    def __post_init__(self) -> None:
        if not self.high > 0 or not self.low >= 0:
            raise ValueError(f"high {self.high} must be above 0 and low {self.low} not below it")
        if not self.threshold >= 0 or self.window < 1:
            raise ValueError(
                f"threshold {self.threshold} must be 0 or more and window {self.window} at least 1"
            )

    def init(self, *, batch: int) -> StepEntropy:
        """The state before the first token; prompts are not counted."""
        none, zero = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.float32)
        return StepEntropy(
            recent=jnp.zeros((batch, self.window), jnp.float32),
            count=none,
            total=zero,
            step_count=none,
            step_total=zero,
        )

    def __call__(
        self, logits: RowLogits, state: StepEntropy, *, history: History
    ) -> tuple[RowLogits, StepEntropy]:
        """Logits over the temperature of each row."""
        boundary = self.ends.reached(history.last(2))
        temperature, state = self.temperature(logits=logits, boundary=boundary, state=state)
        return at_temperature(logits, temperature), state

    def temperature(
        self, *, logits: Float[Array, "B V"], boundary: Bool[Array, " B"], state: StepEntropy
    ) -> tuple[Float[Array, " B"], StepEntropy]:
        """The temperature of each row's next token, and the state with its entropy.

        Args:
            logits: before any temperature or truncation.
            boundary: rows whose last token ended a step.
            state: of the tokens before.
        """
        entropy = entropy_of(logits)
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


def at_temperature(
    logits: Float[Array, "B V"], temperature: Float[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits over each row's temperature; of 0 the first of the largest alone stays."""
    greedy = temperature <= _GREEDY
    best = jnp.arange(logits.shape[1])[None] == jnp.argmax(logits, axis=-1)[:, None]
    scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
    return jnp.where(greedy[:, None] & ~best, -jnp.inf, scaled)

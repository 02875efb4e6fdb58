"""Processors reshape the logits that tokens are drawn from."""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Int

RowLogits = Float[Array, "B V"]


def entropy_of(logits: RowLogits) -> Float[Array, " B"]:
    """Of the distribution of each row, in nats; tokens that are ruled out add nothing."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.exp(logp) * jnp.where(jnp.isfinite(logp), logp, 0.0), axis=-1)


class History(NamedTuple):
    """What each row has read and written.

    Attributes:
        tokens: prompt and what was written after it; anything from ``lengths`` on.
        lengths: tokens of a row.
        prompts: tokens of its prompt.
    """

    tokens: Int[Array, "B C"]
    lengths: Int[Array, " B"]
    prompts: Int[Array, " B"]

    def written(self) -> Bool[Array, "B C"]:
        """Where the tokens are that were written."""
        place = jnp.arange(self.tokens.shape[1])[None, :]
        return (place >= self.prompts[:, None]) & (place < self.lengths[:, None])

    def last(self, count: int) -> Int[Array, "B N"]:
        """The last ``count`` tokens of each row, -1 before its beginning."""
        place = self.lengths[:, None] - count + jnp.arange(count)[None, :]
        found = jnp.take_along_axis(self.tokens, jnp.maximum(place, 0), axis=1)
        return jnp.where(place >= 0, found, -1)

    def append(self, tokens: Int[Array, " B"], running: Bool[Array, " B"]) -> History:
        """With one more token in the rows that are ``running``."""
        rows = jnp.arange(len(tokens))
        place = jnp.where(running, self.lengths, self.tokens.shape[1])
        written = self.tokens.at[rows, place].set(tokens, mode="drop")
        return self._replace(tokens=written, lengths=self.lengths + running)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor(abc.ABC):
    """The processor family: changes what is sampled, never what the model believes.

    Tokens are ruled out by logits of minus infinity. A member that needs more than the history
    keeps a state, whose leaves are rows first.
    """

    def init(self, *, batch: int) -> PyTree:
        """State before the first token; none unless a member says otherwise."""
        return ()

    @abc.abstractmethod
    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        """Logits to sample from, and the new state.

        Args:
            logits: of the model, as earlier processors left them; float32.
            state: own state.
            history: the tokens before the one to be drawn.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature(Processor):
    """Divides logits by a temperature.

    Attributes:
        value: above 0; below 1 sharpens.
    """

    value: float

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"temperature {self.value} must be above 0; use Greedy() for 0")

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        """``logits / value``."""
        return logits / self.value, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Processor):
    """Keeps the k most likely tokens; ties at the boundary all stay.

    Reference: Fan, Lewis, Dauphin, "Hierarchical Neural Story Generation", 2018, arXiv:1805.04833.

    Attributes:
        k: tokens kept, at least 1.
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k {self.k} must be at least 1")

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        """Rules out everything below the k-th logit."""
        kth = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][:, -1:]
        return jnp.where(logits >= kth, logits, -jnp.inf), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopP(Processor):
    """Keeps the smallest set of most likely tokens that holds probability p; ties all stay.

    Reference: Holtzman, Buys, Du, Forbes, Choi, "The Curious Case of Neural Text Degeneration",
    2019, arXiv:1904.09751.

    Attributes:
        p: mass to reach, above 0 and at most 1.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p {self.p} must be above 0 and at most 1")

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        """Rules out tokens before which the mass is already reached."""
        ordered = jnp.sort(logits, axis=-1)
        # Summed from the unlikely end, where rounding would otherwise lose the whole tail.
        kept = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) > 1 - self.p
        smallest = jnp.min(jnp.where(kept, ordered, ordered[:, -1:]), axis=-1, keepdims=True)
        return jnp.where(logits >= smallest, logits, -jnp.inf), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinP(Processor):
    """Keeps tokens at least p times as likely as the most likely one.

    Reference: Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM
    Outputs", 2024, arXiv:2407.01082.

    Attributes:
        p: share of the highest probability, 0 to 1.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p {self.p} must be in 0..1")

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        """Compares log-probabilities, which differ from logits by a constant."""
        best = jnp.max(logits, axis=-1, keepdims=True)
        return jnp.where(logits - best >= jnp.log(self.p), logits, -jnp.inf), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Typical(Processor):
    """Keeps the tokens whose surprise is nearest to the entropy, until they hold mass p.

    With ``H = -Σ p log p``, tokens are taken in the order of ``|-log p - H|``; ties all stay.

    Reference: Meister, Pimentel, Wiher, Cotterell, "Locally Typical Sampling", 2022,
    arXiv:2202.00666.

    Attributes:
        p: mass to reach, above 0 and at most 1.
    """

    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p {self.p} must be above 0 and at most 1")

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        """Rules out tokens before which the mass is already reached."""
        logp = jax.nn.log_softmax(logits, axis=-1)
        chances = jnp.exp(logp)
        surprise = jnp.where(chances > 0, -logp, jnp.inf)
        entropy = jnp.sum(jnp.where(chances > 0, chances * surprise, 0), axis=-1, keepdims=True)
        distance = jnp.abs(surprise - entropy)
        nearest, ordered = jax.lax.sort((distance, chances), num_keys=1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        count = jnp.sum(before < self.p, axis=-1, keepdims=True)
        farthest = jnp.take_along_axis(nearest, count - 1, axis=-1)
        return jnp.where(distance <= farthest, logits, -jnp.inf), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstTokens(Processor):
    """Keeps the first tokens of the vocabulary: those a tokenizer has, where the model has more.

    Attributes:
        count: tokens kept, at least 1.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count {self.count} must be at least 1")

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        """Rules out tokens from ``count`` on."""
        known = jnp.arange(logits.shape[-1])[None, :] < self.count
        return jnp.where(known, logits, -jnp.inf), state

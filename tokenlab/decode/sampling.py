"""Processors reshape logits, samplers draw from them and record both log-probabilities."""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float, Int, RowKeys

RowLogits = Float[Array, "B V"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor(abc.ABC):
    """The processor family: changes what is sampled, never what the model believes.

    Tokens are ruled out by logits of minus infinity.
    """

    def init(self, *, batch: int) -> PyTree:
        """State before the first token; none unless a member says otherwise."""
        return ()

    @abc.abstractmethod
    def __call__(self, logits: RowLogits, state: PyTree) -> tuple[RowLogits, PyTree]:
        """Logits to sample from, and the new state."""


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

    def __call__(self, logits: RowLogits, state: PyTree) -> tuple[RowLogits, PyTree]:
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

    def __call__(self, logits: RowLogits, state: PyTree) -> tuple[RowLogits, PyTree]:
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

    def __call__(self, logits: RowLogits, state: PyTree) -> tuple[RowLogits, PyTree]:
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

    def __call__(self, logits: RowLogits, state: PyTree) -> tuple[RowLogits, PyTree]:
        """Compares log-probabilities, which differ from logits by a constant."""
        best = jnp.max(logits, axis=-1, keepdims=True)
        return jnp.where(logits - best >= jnp.log(self.p), logits, -jnp.inf), state


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

    def __call__(self, logits: RowLogits, state: PyTree) -> tuple[RowLogits, PyTree]:
        """Rules out tokens from ``count`` on."""
        known = jnp.arange(logits.shape[-1])[None, :] < self.count
        return jnp.where(known, logits, -jnp.inf), state


class Draw(NamedTuple):
    """Drawn tokens and how likely they were.

    Attributes:
        token: the tokens.
        logp_model: log-probability under the model itself.
        logp_behaviour: log-probability under what was sampled from.
    """

    token: Int[Array, " B"]
    logp_model: Float[Array, " B"]
    logp_behaviour: Float[Array, " B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler(abc.ABC):
    """The sampler family.

    Attributes:
        processors: applied to the logits in turn.
    """

    processors: tuple[Processor, ...] = ()

    def init(self, *, batch: int) -> PyTree:
        """States of all processors."""
        return tuple(processor.init(batch=batch) for processor in self.processors)

    def __call__(self, logits: RowLogits, state: PyTree, *, keys: RowKeys) -> tuple[Draw, PyTree]:
        """Draws one token per row.

        Args:
            logits: float32, of the model.
            state: of the processors.
            keys: one key per row, so that a row's draw does not depend on its neighbours.
        """
        shaped, states = logits, []
        for processor, one in zip(self.processors, state, strict=True):
            shaped, one = processor(shaped, one)
            states.append(one)
        token, logp_behaviour = self.choose(shaped, keys)
        logp = jax.nn.log_softmax(logits, axis=-1)
        logp_model = jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
        return Draw(token, logp_model, logp_behaviour), tuple(states)

    @abc.abstractmethod
    def choose(
        self, logits: RowLogits, keys: RowKeys
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """Tokens and their log-probability under the rule of choice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy(Sampler):
    """The most likely token, with probability one."""

    def choose(
        self, logits: RowLogits, keys: RowKeys
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """The first of the highest logits."""
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros(logits.shape[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Categorical(Sampler):
    """A token in proportion to its probability after the processors."""

    def choose(
        self, logits: RowLogits, keys: RowKeys
    ) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """One categorical draw per row."""
        token = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        logp = jax.nn.log_softmax(logits, axis=-1)
        return token, jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]

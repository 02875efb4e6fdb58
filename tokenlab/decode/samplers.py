"""Samplers draw tokens and record both log-probabilities."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Int, RowKeys
from tokenlab.decode.processors import (
    History,
    MinP,
    Processor,
    RowLogits,
    Temperature,
    TopK,
    TopP,
)


class Draw(NamedTuple):
    """Drawn tokens and how likely they were.

    Attributes:
        token: the tokens.
        logp_model: log-probability under the model itself.
        logp_behaviour: log-probability under what was sampled from.
        possible: whether the processors left any token; where not, the others mean nothing.
    """

    token: Int[Array, " B"]
    logp_model: Float[Array, " B"]
    logp_behaviour: Float[Array, " B"]
    possible: Bool[Array, " B"]


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

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History, keys: RowKeys
    ) -> tuple[Draw, PyTree]:
        """Draws one token per row.

        Args:
            logits: float32, of the model.
            state: of the processors.
            history: the tokens before.
            keys: one key per row, so that a row's draw does not depend on its neighbours.
        """
        shaped, possible, state = self.shape(logits, state, history=history)
        token = self.choose(shaped, keys)
        logp_model, logp_behaviour = (
            jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
            for logp in (jax.nn.log_softmax(logits, axis=-1), self.logp(shaped))
        )
        return Draw(token, logp_model, logp_behaviour, possible), state

    def shape(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, Bool[Array, " B"], PyTree]:
        """Logits after all processors, whether these leave any token, and their states.

        Rows of which nothing is left keep the logits they had, which then mean nothing.
        """
        shaped, states = logits, []
        for processor, one in zip(self.processors, state, strict=True):
            shaped, one = processor(shaped, one, history=history)
            states.append(one)
        possible = jnp.any(shaped > -jnp.inf, axis=-1)
        return jnp.where(possible[:, None], shaped, logits), possible, tuple(states)

    def behind(self, processors: Sequence[Processor]) -> Sampler:
        """The same sampler with ``processors`` before its own."""
        return dataclasses.replace(self, processors=(*processors, *self.processors))

    @abc.abstractmethod
    def choose(self, logits: RowLogits, keys: RowKeys) -> Int[Array, " B"]:
        """Tokens by shaped logits."""

    @abc.abstractmethod
    def logp(self, logits: RowLogits) -> RowLogits:
        """Log-probability of every token under :meth:`choose`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy(Sampler):
    """The most likely token, with probability one."""

    def choose(self, logits: RowLogits, keys: RowKeys) -> Int[Array, " B"]:
        """The first of the highest logits."""
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def logp(self, logits: RowLogits) -> RowLogits:
        """0 for it, minus infinity for all others."""
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1])[None] == best, 0.0, -jnp.inf)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Categorical(Sampler):
    """A token in proportion to its probability after the processors."""

    def choose(self, logits: RowLogits, keys: RowKeys) -> Int[Array, " B"]:
        """One categorical draw per row."""
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def logp(self, logits: RowLogits) -> RowLogits:
        """Their log-softmax."""
        return jax.nn.log_softmax(logits, axis=-1)


def usual_sampler(
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Sampler:
    """The sampler of the usual four settings, applied in this order.

    Args:
        temperature: divisor of the logits; 0 takes the likeliest token, whatever the rest.
        top_k: tokens to draw from, or None for all.
        top_p: share of the probability to draw from, or None.
        min_p: least probability relative to the highest, or None.

    Raises:
        ValueError: a setting is out of its range.
    """
    if temperature == 0:
        return Greedy()
    processors: list[Processor] = [Temperature(value=temperature)]
    if top_k is not None:
        processors.append(TopK(k=top_k))
    if top_p is not None:
        processors.append(TopP(p=top_p))
    if min_p is not None:
        processors.append(MinP(p=min_p))
    return Categorical(processors=tuple(processors))

"""Samplers draw tokens and record both log-probabilities."""

from __future__ import annotations

import abc
import dataclasses
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
        shaped, state = self.shape(logits, state, history=history)
        possible = jnp.any(shaped > -jnp.inf, axis=-1)
        token, logp_behaviour = self.choose(jnp.where(possible[:, None], shaped, logits), keys)
        logp = jax.nn.log_softmax(logits, axis=-1)
        logp_model = jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
        return Draw(token, logp_model, logp_behaviour, possible), state

    def shape(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        """Logits after all processors, and their states."""
        states = []
        for processor, one in zip(self.processors, state, strict=True):
            logits, one = processor(logits, one, history=history)
            states.append(one)
        return logits, tuple(states)

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

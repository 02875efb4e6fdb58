"""What a model reads of a token that was drawn: the token, or a mixture of all of them."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Hidden, RowKeys
from tokenlab.core.context import View
from tokenlab.decode.processors import History, RowLogits, entropy_of
from tokenlab.decode.samplers import Draw
from tokenlab.models import Transformer
from tokenlab.models.mixtures import ExpectedToken, TokenMixture


class Fed(NamedTuple):
    """What is written and what is read next.

    Attributes:
        draw: the tokens that are written.
        state: of the feed.
        stop: rows that end with this token.
        mixed: rows that read a mixture; None where no row ever does.
        mixture: its shares, or None.
    """

    draw: Draw
    state: PyTree
    stop: Bool[Array, " B"] | bool = False
    mixed: Bool[Array, " B"] | None = None
    mixture: Float[Array, "B V"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feed(abc.ABC):
    """The feed family."""

    def init(self, *, batch: int, vocabulary: int) -> PyTree:
        """State before the first token, rows first; none unless a member says otherwise."""
        return ()

    def statistics(self, state: PyTree) -> dict[str, Array]:
        """What it counted of each row, rows first."""
        return {}

    @abc.abstractmethod
    def __call__(
        self, draw: Draw, logits: RowLogits, state: PyTree, *, history: History, keys: RowKeys
    ) -> Fed:
        """What becomes of a drawn token.

        Args:
            draw: the tokens drawn.
            logits: of the model, before any processor.
            state: own state.
            history: the tokens before.
            keys: those that the tokens were drawn with.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFeed(Feed):
    """The token itself."""

    def __call__(
        self, draw: Draw, logits: RowLogits, state: PyTree, *, history: History, keys: RowKeys
    ) -> Fed:
        """As drawn."""
        return Fed(draw, state)


@flax.struct.dataclass
class Thoughts:
    """What was thought so far.

    Attributes:
        entropy: of the model's prediction at each thought, nats.
        mixtures: what was fed, where it is recorded.
    """

    entropy: Float[Array, "B N"]
    mixtures: Float[Array, "B N V"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThoughtFeed(Feed):
    """The first ``count`` tokens are thoughts: the model reads a mixture in place of each.

    What was drawn stays in the transcript, where it says what the thought was nearest to. Then
    tokens are read as ever, so the one that follows the thoughts is the answer's first.

    Reference: Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak, "Continuous Chain of Thought
    Enables Parallel Exploration and Reasoning", 2025, arXiv:2505.23648.

    Attributes:
        count: thoughts.
        mixture: what is fed of each.
        record: whether the statistics have ``thoughts``, the mixtures [B, count, V], beside
            ``thought_entropy`` [B, count].
    """

    count: int
    mixture: TokenMixture = ExpectedToken()
    record: bool = False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count {self.count} must be 0 or more")

    def init(self, *, batch: int, vocabulary: int) -> Thoughts:
        """Nothing thought yet."""
        shape = (batch, self.count)
        mixtures = jnp.zeros((*shape, vocabulary), jnp.float32) if self.record else None
        return Thoughts(entropy=jnp.zeros(shape, jnp.float32), mixtures=mixtures)

    def statistics(self, state: Thoughts) -> dict[str, Array]:
        """Entropies, and the mixtures where they are recorded."""
        recorded = {} if state.mixtures is None else {"thoughts": state.mixtures}
        return {"thought_entropy": state.entropy} | recorded

    def __call__(
        self, draw: Draw, logits: RowLogits, state: Thoughts, *, history: History, keys: RowKeys
    ) -> Fed:
        """The mixture, as long as thoughts are left."""
        number = history.lengths - history.prompts
        mixture = self.mixture(logits=logits, keys=keys)
        rows = jnp.arange(len(number))
        entropy = state.entropy.at[rows, number].set(entropy_of(logits), mode="drop")
        mixtures = state.mixtures
        if mixtures is not None:
            mixtures = mixtures.at[rows, number].set(mixture, mode="drop")
        return Fed(
            draw,
            Thoughts(entropy=entropy, mixtures=mixtures),
            mixed=number < self.count,
            mixture=mixture,
        )


def entering(
    model: Transformer, params: PyTree, fed: Fed
) -> tuple[Hidden | None, Bool[Array, " B"] | bool]:
    """What enters the stack, None for the tokens themselves, and the rows where it is mixed."""
    if fed.mixture is None or fed.mixed is None:
        return None, False
    view = View(model=model, params=params)
    mixture = jnp.where(fed.mixed[:, None], fed.mixture, 0.0)
    x: Any = view(fed.draw.token[:, None], mixture=mixture[:, None], method="mix")
    return x, fed.mixed

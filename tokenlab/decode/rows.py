"""What a decoder keeps of each row beside its cache, and how a row gets its next token."""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Int, RowKeys
from tokenlab.decode.feeds import Fed, Feed
from tokenlab.decode.processors import History, RowLogits
from tokenlab.decode.samplers import Sampler


class Rules(NamedTuple):
    """How rows go on and when they end, all of it static.

    Attributes:
        sampler: draws tokens.
        feed: what the model reads of them.
        end_ids: tokens that end a row.
        max_new_tokens: tokens that end it whatever they are.
    """

    sampler: Sampler
    feed: Feed
    end_ids: tuple[int, ...]
    max_new_tokens: int


class Rows(flax.struct.PyTreeNode):
    """Requests in slots; leaves are rows first.

    Attributes:
        history: what was read and written.
        done: rows that have ended.
        processors: states of the sampler's.
        feed: state of the feed.
        logp_model: of each new token, under the model.
        logp_behaviour: of each new token, under what it was drawn from.
        keys: of each row.
    """

    history: History
    done: Bool[Array, " B"]
    processors: PyTree
    feed: PyTree
    logp_model: Float[Array, "B N"]
    logp_behaviour: Float[Array, "B N"]
    keys: RowKeys

    @classmethod
    def begin(cls, rules: Rules, history: History, keys: RowKeys, *, vocabulary: int) -> Rows:
        """Rows that have written nothing."""
        batch = len(history.lengths)
        nothing = jnp.zeros((batch, rules.max_new_tokens))
        return cls(
            history=history,
            done=jnp.zeros((batch,), bool),
            processors=rules.sampler.init(batch=batch),
            feed=rules.feed.init(batch=batch, vocabulary=vocabulary),
            logp_model=nothing,
            logp_behaviour=nothing,
            keys=keys,
        )

    def drawn(self, rules: Rules, logits: RowLogits) -> tuple[Rows, Fed, Bool[Array, " B"]]:
        """The rows with one more token each, what the model is fed of it, and who wrote one."""
        position = self.history.lengths
        here = jax.vmap(jax.random.fold_in)(self.keys, position)
        draw, processors = rules.sampler(logits, self.processors, history=self.history, keys=here)
        fed = rules.feed(draw, logits, self.feed, history=self.history, keys=here)
        draw = fed.draw
        running = ~self.done & draw.possible
        history = self.history.append(draw.token, running)
        new = history.lengths - history.prompts
        place = jnp.where(running, new - 1, rules.max_new_tokens)
        rows = jnp.arange(len(position))

        def written(buffer: Array, values: Array) -> Array:
            return buffer.at[rows, place].set(values, mode="drop")

        def where_running(new: Array, old: Array) -> Array:
            return jnp.where(running.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        ended = jnp.isin(draw.token, jnp.asarray(rules.end_ids, jnp.int32))
        after = Rows(
            history=history,
            done=~running | ended | fed.stop | (new >= rules.max_new_tokens),
            processors=processors,
            feed=jax.tree.map(where_running, fed.state, self.feed),
            logp_model=written(self.logp_model, draw.logp_model),
            logp_behaviour=written(self.logp_behaviour, draw.logp_behaviour),
            keys=self.keys,
        )
        return after, fed, running

    def take(self, rows: Int[Array, " N"]) -> Rows:
        """Some of the rows."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def put(self, rows: Int[Array, " N"], other: Rows) -> Rows:
        """``other`` in the place of ``rows``; numbers that are no row are left out."""
        return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new, mode="drop"), self, other)

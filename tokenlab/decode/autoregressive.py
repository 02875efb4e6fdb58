"""One token at a time: jitted prefill, then a while loop on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab.cache import Cache, CachePolicy, FullCache
from tokenlab.core.arrays import Array, Bool, Float, Int, PRNGKeyArray, RowKeys
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode.base import Decoder, Generation, OnTokens, bucket, padded
from tokenlab.decode.feeds import Feed, TokenFeed, entering
from tokenlab.decode.passes import Spent, begin, ledger, logits_of, read
from tokenlab.decode.processors import History, Processor
from tokenlab.decode.samplers import Categorical, Sampler
from tokenlab.models import Transformer, for_decoding

Static = tuple[Transformer, "Autoregressive"]


class _State(flax.struct.PyTreeNode):
    """The while loop's carry: a row is a slot that holds one request."""

    cache: Cache
    logits: Float[Array, "B V"]
    history: History
    done: Bool[Array, " B"]
    processors: PyTree
    feed: PyTree
    logp_model: Float[Array, "B N"]
    logp_behaviour: Float[Array, "B N"]
    keys: RowKeys
    spent: Spent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive(Decoder):
    """Decodes left to right; a slot whose row has ended takes the next prompt.

    A row also ends where its processors leave no token.

    Attributes:
        sampler: draws tokens.
        cache: what is remembered.
        slots: rows decoded at a time; None is as many as there are prompts.
        prefill_chunk: prompt tokens read in one pass; None reads a prompt whole.
        stream_every: tokens between calls of ``on_tokens``.
        feed: what the model reads of a token that was drawn.
    """

    sampler: Sampler = Categorical()
    cache: CachePolicy = FullCache()
    slots: int | None = None
    prefill_chunk: int | None = None
    stream_every: int = 16
    feed: Feed = TokenFeed()

    def __post_init__(self) -> None:
        for name in ("slots", "prefill_chunk", "stream_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value} must be at least 1")

    def __call__(
        self,
        view: View,
        prompts: Sequence[Sequence[int]],
        *,
        key: PRNGKeyArray,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        """See :meth:`Decoder.__call__`; ``on_tokens`` comes every ``stream_every`` tokens."""
        self._check(view, prompts)
        run = _Run(self, view, prompts, key)
        while not run.finished:
            run.decode(self.stream_every if on_tokens is not None else self.max_new_tokens)
            if on_tokens is not None:
                run.show(on_tokens)
            run.refill()
        return run.generation()

    def behind(self, processors: Sequence[Processor]) -> Autoregressive:
        """The same with another sampler."""
        return dataclasses.replace(self, sampler=self.sampler.behind(processors))


class _Run:
    """The host's side of a call: which request each slot holds, and what is written so far."""

    def __init__(
        self,
        decoder: Autoregressive,
        view: View,
        prompts: Sequence[Sequence[int]],
        key: PRNGKeyArray,
    ) -> None:
        model, self.params = for_decoding(cast(Transformer, view.model), view.params)
        self.static: Static = (model, decoder)
        self.prompts, self.new = prompts, decoder.max_new_tokens
        width = bucket(max(len(prompt) for prompt in prompts))
        self.sizes = (width, bucket(width + self.new))
        self.keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(prompts)))
        slots = min(decoder.slots or len(prompts), len(prompts))
        self.owners: list[int | None] = list(range(slots))
        self.waiting = list(range(slots, len(prompts)))
        self.state = self._begin(self.owners)
        self.written = Generation.empty(len(prompts), self.new)
        caches = len(self.state.cache.heads)
        self.pairs, self.held = np.zeros(caches), np.zeros(caches)

    def _begin(self, requests: Sequence[int | None]) -> _State:
        """The state that holds ``requests``, ready to draw their first tokens."""
        rows = [cast(int, request) for request in requests]
        prompts = [self.prompts[row] for row in rows]
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        width, capacity = self.sizes
        return _prefill(
            self.static, capacity, self.params, padded(prompts, width), lengths,
            self.keys[np.asarray(rows)],
        )  # fmt: skip

    @property
    def finished(self) -> bool:
        return all(owner is None for owner in self.owners)

    def decode(self, steps: int) -> None:
        """Up to ``steps`` tokens in every slot; fewer where one ends and a prompt waits."""
        self.state = _decode(self.static, self.params, self.state, steps, bool(self.waiting))
        tokens, lengths, logp_model, logp_behaviour = (
            np.asarray(x)
            for x in (
                self.state.history.tokens, self.state.history.lengths,
                self.state.logp_model, self.state.logp_behaviour,
            )
        )  # fmt: skip
        for slot, request in enumerate(self.owners):
            if request is None:
                continue
            start = len(self.prompts[request])
            count = int(lengths[slot]) - start
            self.written.tokens[request, :count] = tokens[slot, start : start + count]
            self.written.logp_model[request, :count] = logp_model[slot, :count]
            self.written.logp_behaviour[request, :count] = logp_behaviour[slot, :count]
            self.written.lengths[request] = count

    def show(self, on_tokens: OnTokens) -> None:
        """Shows what is written; ends the rows that the caller has enough of."""
        longest = int(self.written.lengths.max())
        stop = on_tokens(self.written.tokens[:, :longest].copy(), self.written.lengths.copy())
        if stop is not None:
            mine = [request is not None and bool(stop[request]) for request in self.owners]
            self.state = self.state.replace(done=self.state.done | jnp.asarray(mine))

    def refill(self) -> None:
        """Frees the slots whose rows have ended, and gives them to prompts that wait."""
        done = np.asarray(self.state.done)
        ended = [s for s, owner in enumerate(self.owners) if owner is not None and done[s]]
        if not ended:
            return
        self.pairs += np.asarray(self.state.cache.pairs, np.float64)[:, ended].sum(axis=1)
        self.held += np.asarray(self.state.cache.held(), np.float64)[:, ended].sum(axis=1)
        requests = [cast(int, self.owners[slot]) for slot in ended]
        feed = self.static[1].feed.statistics(self.state.feed)
        for name, counted in (self.state.cache.counters() | feed).items():
            values = np.asarray(counted)
            shape = (len(self.prompts), *values.shape[1:])
            all_rows = self.written.statistics.setdefault(name, np.zeros(shape))
            all_rows[requests] = values[ended]
        for slot in ended:
            self.owners[slot] = self.waiting.pop(0) if self.waiting else None
            if self.owners[slot] is not None:
                other = self._begin([self.owners[slot]])
                self.state = _insert(self.state, jnp.asarray([slot]), other)

    def generation(self) -> Generation:
        """What was written, and what it cost."""
        cost = ledger(self.static[0], self.state.spent, pairs=self.pairs, held=self.held)
        return dataclasses.replace(self.written, ledger=cost)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    static: Static,
    capacity: int,
    params: PyTree,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    keys: RowKeys,
) -> _State:
    """Reads the prompts; the state is ready to draw the first token."""
    model, decoder = static
    begun = begin(
        model, params, decoder.cache, tokens, lengths, capacity=capacity,
        chunk=decoder.prefill_chunk,
    )  # fmt: skip
    batch = len(tokens)
    return _State(
        **begun._asdict(),
        done=jnp.zeros((batch,), bool),
        processors=decoder.sampler.init(batch=batch),
        feed=decoder.feed.init(batch=batch, vocabulary=model.vocab_size),
        logp_model=jnp.zeros((batch, decoder.max_new_tokens)),
        logp_behaviour=jnp.zeros((batch, decoder.max_new_tokens)),
        keys=keys,
    )


@functools.partial(jax.jit, donate_argnums=0)
def _insert(state: _State, rows: Int[Array, " N"], other: _State) -> _State:
    """``other`` in the place of ``rows``."""
    apart = {"cache": None, "spent": None}
    merged = jax.tree.map(
        lambda leaf, new: leaf.at[rows].set(new), state.replace(**apart), other.replace(**apart)
    )
    return merged.replace(
        cache=state.cache.insert(rows, other.cache), spent=state.spent.plus(other.spent)
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    static: Static,
    params: PyTree,
    state: _State,
    steps: Int[Array, ""],
    wait: Bool[Array, ""],
) -> _State:
    """Draws ``steps`` tokens, or until every row has ended, or one where another waits."""
    model, decoder = static

    def unfinished(carry: tuple[Array, _State]) -> Bool[Array, ""]:
        done = carry[1].done
        return (carry[0] < steps) & ~jnp.all(done) & ~(wait & jnp.any(done))

    def step(carry: tuple[Array, _State]) -> tuple[Array, _State]:
        count, state = carry
        position = state.history.lengths
        here = jax.vmap(jax.random.fold_in)(state.keys, position)
        draw, processors = decoder.sampler(
            state.logits, state.processors, history=state.history, keys=here
        )
        fed = decoder.feed(draw, state.logits, state.feed, history=state.history, keys=here)
        draw = fed.draw
        running = ~state.done & draw.possible
        segments = running.astype(jnp.int32)[:, None]
        embeddings, mixed = entering(model, params, fed)
        out: Any = read(
            model, params, state.cache, draw.token[:, None],
            positions=position[:, None], segments=segments, embeddings=embeddings,
        )  # fmt: skip
        history = state.history.append(draw.token, running)
        ended = jnp.isin(draw.token, jnp.asarray(decoder.end_ids, jnp.int32))
        new = history.lengths - history.prompts
        place = jnp.where(running, new - 1, decoder.max_new_tokens)
        rows = jnp.arange(len(position))

        def written(buffer: Array, values: Array) -> Array:
            return buffer.at[rows, place].set(values, mode="drop")

        return count + 1, state.replace(
            cache=out.cache,
            logits=logits_of(model, params, out.hidden)[:, 0],
            history=history,
            done=~running | ended | fed.stop | (new >= decoder.max_new_tokens),
            processors=processors,
            feed=fed.state,
            logp_model=written(state.logp_model, draw.logp_model),
            logp_behaviour=written(state.logp_behaviour, draw.logp_behaviour),
            spent=state.spent.after(out, segments, jnp.sum(running)).mixing(
                model, jnp.sum(running & mixed)
            ),
        )

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]

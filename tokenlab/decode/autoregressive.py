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
from tokenlab.decode.processors import Processor
from tokenlab.decode.rows import Rows, Rules
from tokenlab.decode.samplers import Categorical, Sampler
from tokenlab.models import Transformer, for_decoding

Static = tuple[Transformer, "Autoregressive"]


class State(flax.struct.PyTreeNode):
    """The while loop's carry: a row is a slot that holds one request.

    Attributes:
        cache: what was read.
        logits: of each row's next token.
        rows: what was written.
        spent: the work.
    """

    cache: Cache
    logits: Float[Array, "B V"]
    rows: Rows
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
        run = self._run(view, prompts, key)
        while not run.finished:
            run.decode(self.stream_every if on_tokens is not None else self.max_new_tokens)
            if on_tokens is not None:
                run.show(on_tokens)
            run.refill()
        return run.generation()

    def behind(self, processors: Sequence[Processor]) -> Autoregressive:
        """The same with another sampler."""
        return dataclasses.replace(self, sampler=self.sampler.behind(processors))

    @property
    def rules(self) -> Rules:
        """How rows go on and when they end."""
        return Rules(self.sampler, self.feed, self.end_ids, self.max_new_tokens)

    def _run(self, view: View, prompts: Sequence[Sequence[int]], key: PRNGKeyArray) -> Run:
        """The host's side of a call."""
        return Run(self, view, prompts, key)


class Run:
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
        slots = min(self._slots(decoder), len(prompts))
        self.owners: list[int | None] = list(range(slots))
        self.waiting = list(range(slots, len(prompts)))
        self.state = self._begin_all(self.owners)
        self.written = Generation.empty(len(prompts), self.new)
        caches = len(self.state.cache.pairs)
        self.pairs, self.held = np.zeros(caches), np.zeros(caches)

    def _slots(self, decoder: Autoregressive) -> int:
        """Rows in flight, if there are as many."""
        return decoder.slots or len(self.prompts)

    def _begin_all(self, requests: Sequence[int | None]) -> Any:
        """The first rows."""
        return self._begin(requests)

    def _advance(self, steps: int) -> Any:
        """The state up to ``steps`` tokens later."""
        return _decode(self.static, self.params, self.state, steps, bool(self.waiting))

    def _insert(self, slot: int, begun: State) -> Any:
        """The state with another row in a slot."""
        return _insert(self.state, jnp.asarray([slot]), begun)

    def _begin(self, requests: Sequence[int | None]) -> State:
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
        """Whether no slot holds a request."""
        return all(owner is None for owner in self.owners)

    def decode(self, steps: int) -> None:
        """Up to ``steps`` tokens in every slot; fewer where one ends and a prompt waits."""
        self.state = self._advance(steps)
        rows: Rows = self.state.rows
        tokens, lengths, logp_model, logp_behaviour = (
            np.asarray(x)
            for x in (
                rows.history.tokens, rows.history.lengths, rows.logp_model, rows.logp_behaviour,
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
            rows = self.state.rows
            self.state = self.state.replace(rows=rows.replace(done=rows.done | jnp.asarray(mine)))

    def refill(self) -> None:
        """Frees the slots whose rows have ended, and gives them to prompts that wait."""
        done = np.asarray(self.state.rows.done)
        ended = [s for s, owner in enumerate(self.owners) if owner is not None and done[s]]
        if not ended:
            return
        self.pairs += np.asarray(self.state.cache.pairs, np.float64)[:, ended].sum(axis=1)
        self.held += np.asarray(self.state.cache.held(), np.float64)[:, ended].sum(axis=1)
        requests = [cast(int, self.owners[slot]) for slot in ended]
        feed = self.static[1].feed.statistics(self.state.rows.feed)
        for name, counted in (self.state.cache.counters() | feed).items():
            values = np.asarray(counted)
            shape = (len(self.prompts), *values.shape[1:])
            all_rows = self.written.statistics.setdefault(name, np.zeros(shape))
            all_rows[requests] = values[ended]
        for slot in ended:
            self.owners[slot] = self.waiting.pop(0) if self.waiting else None
            if self.owners[slot] is not None:
                self.state = self._insert(slot, self._begin([self.owners[slot]]))

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
) -> State:
    """Reads the prompts; the state is ready to draw the first token."""
    model, decoder = static
    begun = begin(
        model, params, decoder.cache, tokens, lengths, capacity=capacity,
        chunk=decoder.prefill_chunk,
    )  # fmt: skip
    rows = Rows.begin(decoder.rules, begun.history, keys, vocabulary=model.vocab_size)
    return State(begun.cache, begun.logits, rows, begun.spent)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(state: State, rows: Int[Array, " N"], other: State) -> State:
    """``other`` in the place of ``rows``."""
    return State(
        cache=state.cache.insert(rows, other.cache),
        logits=state.logits.at[rows].set(other.logits),
        rows=state.rows.put(rows, other.rows),
        spent=state.spent.plus(other.spent),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    static: Static,
    params: PyTree,
    state: State,
    steps: Int[Array, ""],
    wait: Bool[Array, ""],
) -> State:
    """Draws ``steps`` tokens, or until every row has ended, or one where another waits."""
    model, decoder = static

    def unfinished(carry: tuple[Array, State]) -> Bool[Array, ""]:
        done = carry[1].rows.done
        return (carry[0] < steps) & ~jnp.all(done) & ~(wait & jnp.any(done))

    def step(carry: tuple[Array, State]) -> tuple[Array, State]:
        count, state = carry
        position = state.rows.history.lengths
        rows, fed, running = state.rows.drawn(decoder.rules, state.logits)
        segments = running.astype(jnp.int32)[:, None]
        embeddings, mixed = entering(model, params, fed)
        out: Any = read(
            model, params, state.cache, fed.draw.token[:, None],
            positions=position[:, None], segments=segments, embeddings=embeddings,
        )  # fmt: skip
        spent = state.spent.after(out, segments, jnp.sum(running))
        return count + 1, State(
            cache=out.cache,
            logits=logits_of(model, params, out.hidden)[:, 0],
            rows=rows,
            spent=spent.mixing(model, jnp.sum(running & mixed)),
        )

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]

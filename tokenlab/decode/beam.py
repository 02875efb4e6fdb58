"""Beam search: the likeliest continuation among those that stay in view."""

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
from tokenlab.core.arrays import Array, Bool, Float, Int, PRNGKeyArray
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode.base import Decoder, Generation, OnTokens, bucket, padded
from tokenlab.decode.passes import Spent, begin, ledger_of, logits_of, read
from tokenlab.decode.processors import History, Processor
from tokenlab.decode.samplers import Greedy
from tokenlab.models import Transformer, for_decoding

_NEVER = -1e30


class _Beams(flax.struct.PyTreeNode):
    """K hypotheses of each row, best first.

    Attributes:
        tokens: what was written.
        logp: log-probability of each token.
        lengths: how many tokens.
        scores: sums of log-probabilities; of finished ones divided by the length's penalty.
    """

    tokens: Int[Array, "B K N"]
    logp: Float[Array, "B K N"]
    lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]

    def take(self, index: Int[Array, "B J"]) -> _Beams:
        """Hypotheses ``index`` of each row."""
        return jax.tree.map(
            lambda x: jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), 1),
            self,
        )

    def best_of(self, other: _Beams) -> _Beams:
        """The K best of both."""
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, other)
        return both.take(jax.lax.top_k(both.scores, self.scores.shape[1])[1])


class _State(flax.struct.PyTreeNode):
    """The loop's carry; caches and logits have a row for each live hypothesis."""

    cache: Cache
    logits: Float[Array, "M V"]
    live: _Beams
    finished: _Beams
    step: Int[Array, ""]
    spent: Spent


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearch(Decoder):
    """Keeps the K likeliest unfinished continuations of each prompt and the best finished ones.

    A finished one is ranked by ``log p / length^alpha``. A row ends when K are finished and none of
    the live ones can still be better. Generated log-probabilities are the model's; those of
    behaviour are 0, as nothing is drawn. ``statistics["score"]`` ranks the answer.

    Reference: Wu et al., "Google's Neural Machine Translation System: Bridging the Gap between
    Human and Machine Translation", 2016, arXiv:1609.08144, section 7, with ``length^alpha`` as the
    penalty and no coverage term.

    Attributes:
        beams: hypotheses K.
        alpha: exponent of the penalty; 0 ranks by log-probability alone.
        processors: shape the logits before they are summed; none keeps a state.
        cache: what is remembered.
    """

    beams: int = 4
    alpha: float = 1.0
    processors: tuple[Processor, ...] = ()
    cache: CachePolicy = FullCache()

    def __post_init__(self) -> None:
        if self.beams < 1 or self.alpha < 0:
            raise UserError(f"beams {self.beams} must be at least 1, alpha {self.alpha} at least 0")

    def __call__(
        self,
        view: View,
        prompts: Sequence[Sequence[int]],
        *,
        key: PRNGKeyArray,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        """See :meth:`Decoder.__call__`; nothing is drawn, and nothing shown before the end."""
        self._check(view, prompts)
        model, params = for_decoding(cast(Transformer, view.model), view.params)
        if jax.tree.leaves(Greedy(processors=self.processors).init(batch=1)):
            raise UserError("a processor keeps a state, which beam search does not reorder")
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        width = bucket(int(lengths.max()))
        capacity = bucket(width + self.max_new_tokens)
        tokens = padded(prompts, width)
        state = _search((model, self), capacity, params, tokens, lengths)
        # What never finished competes as it stands.
        live = state.live.replace(scores=_penalised(state.live, self.alpha))
        best = jax.tree.map(lambda x: np.asarray(x[:, 0]), state.finished.best_of(live))
        if on_tokens is not None:
            on_tokens(best.tokens, best.lengths)
        return Generation(
            tokens=best.tokens,
            lengths=best.lengths,
            logp_model=best.logp,
            logp_behaviour=np.zeros_like(best.logp),
            ledger=ledger_of(model, state.spent, state.cache),
            statistics={"score": best.scores},
        )

    def behind(self, processors: Sequence[Processor]) -> BeamSearch:
        """The same with more processors."""
        return dataclasses.replace(self, processors=(*processors, *self.processors))


def _penalised(beams: _Beams, alpha: float) -> Float[Array, "B K"]:
    return jnp.where(
        beams.scores > _NEVER, beams.scores / jnp.maximum(beams.lengths, 1) ** alpha, _NEVER
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(
    static: tuple[Transformer, BeamSearch],
    capacity: int,
    params: PyTree,
    prompts: Int[Array, "B W"],
    lengths: Int[Array, " B"],
) -> _State:
    """Reads the prompts once, then searches."""
    model, decoder = static
    batch, beams = len(prompts), decoder.beams
    begun = begin(model, params, decoder.cache, prompts, lengths, capacity=capacity)
    shape = (batch, beams, decoder.max_new_tokens)
    none = _Beams(
        tokens=jnp.zeros(shape, jnp.int32),
        logp=jnp.zeros(shape),
        lengths=jnp.zeros(shape[:2], jnp.int32),
        scores=jnp.full(shape[:2], _NEVER),
    )
    rows = jnp.repeat(jnp.arange(batch), beams)
    state = _State(
        # Only the first fork counts what reading the prompt has cost.
        cache=_counted_once(begun.cache.fork(rows), beams),
        logits=begun.logits[rows],
        live=none.replace(scores=none.scores.at[:, 0].set(0.0)),
        finished=none,
        step=jnp.zeros((), jnp.int32),
        spent=begun.spent,
    )

    def unfinished(state: _State) -> Bool[Array, ""]:
        reach = state.live.scores[:, 0] / decoder.max_new_tokens**decoder.alpha
        worst = state.finished.scores[:, -1]
        return (state.step < decoder.max_new_tokens) & jnp.any(worst < reach)

    def step(state: _State) -> _State:
        return _step(static, params, begun.history, state)

    return jax.lax.while_loop(unfinished, step, state)


def _counted_once(cache: Cache, beams: int) -> Cache:
    first = jnp.arange(cache.pairs.shape[1]) % beams == 0
    return cache.replace(pairs=jnp.where(first[None], cache.pairs, 0))


def _step(
    static: tuple[Transformer, BeamSearch],
    params: PyTree,
    prompts: History,
    state: _State,
) -> _State:
    """One more token in every live hypothesis."""
    model, decoder = static
    (batch, beams), vocabulary = state.live.scores.shape, state.logits.shape[-1]
    history = _histories(prompts, state.live)
    shaped, possible, _ = Greedy(processors=decoder.processors).shape(
        state.logits, tuple(() for _ in decoder.processors), history=history
    )
    logp = jax.nn.log_softmax(state.logits, axis=-1).reshape(batch, beams, vocabulary)
    ranked = jnp.where(possible[:, None], jax.nn.log_softmax(shaped, axis=-1), _NEVER)
    ranked = ranked.reshape(batch, beams, vocabulary)
    total = jnp.maximum(state.live.scores[..., None] + ranked, 2 * _NEVER)
    # Twice as many as there are beams: half of them may end.
    scores, flat = jax.lax.top_k(total.reshape(batch, -1), min(2 * beams, beams * vocabulary))
    source, token = flat // vocabulary, (flat % vocabulary).astype(jnp.int32)
    grown = state.live.take(source)
    at = state.step
    gained = jnp.take_along_axis(logp.reshape(batch, -1), flat, axis=1)
    grown = _Beams(
        tokens=grown.tokens.at[:, :, at].set(token),
        logp=grown.logp.at[:, :, at].set(gained),
        lengths=grown.lengths + 1,
        scores=scores,
    )
    ended = jnp.isin(token, jnp.asarray(decoder.end_ids, jnp.int32))
    done = grown.replace(scores=jnp.where(ended, _penalised(grown, decoder.alpha), _NEVER))
    alive = jnp.where(ended, _NEVER, scores)
    kept = jax.lax.top_k(alive, beams)[1]
    live = grown.take(kept).replace(scores=jnp.take_along_axis(alive, kept, axis=1))
    rows = jnp.arange(batch)[:, None] * beams + jnp.take_along_axis(source, kept, axis=1)
    cache = state.cache.fork(rows.reshape(-1)).replace(pairs=state.cache.pairs)
    written = live.tokens[:, :, at].reshape(-1, 1)
    segments = jnp.ones_like(written)
    positions = jnp.repeat(prompts.lengths, beams)[:, None] + at
    out: Any = read(model, params, cache, written, positions=positions, segments=segments)
    return state.replace(
        cache=out.cache,
        logits=logits_of(model, params, out.hidden)[:, 0],
        live=live,
        finished=state.finished.best_of(done),
        step=at + 1,
        spent=state.spent.after(out, segments, len(written)),
    )


def _histories(prompts: History, live: _Beams) -> History:
    """The history of every live hypothesis."""
    beams, new = live.scores.shape[1], live.tokens.shape[2]
    tokens, starts = (jnp.repeat(x, beams, axis=0) for x in (prompts.tokens, prompts.lengths))
    place = starts[:, None] + jnp.arange(new)[None, :]
    rows = jnp.arange(len(tokens))[:, None]
    tokens = tokens.at[rows, place].set(live.tokens.reshape(-1, new), mode="drop")
    return History(tokens, starts + live.lengths.reshape(-1), starts)

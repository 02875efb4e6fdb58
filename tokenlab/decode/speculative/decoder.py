"""Speculative decoding: many tokens of a draft are judged in one pass of the target."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
from tokenlab.core.rng import stream
from tokenlab.decode.base import Decoder, Generation, OnTokens, bucket, padded
from tokenlab.decode.passes import Spent, begin, ledger_of, logits_of, read
from tokenlab.decode.processors import History, Processor
from tokenlab.decode.samplers import Categorical, Sampler
from tokenlab.decode.speculative.drafters import Draft, Drafter, Outcome, path_histories
from tokenlab.decode.speculative.tree import Tree
from tokenlab.decode.speculative.verify import RecursiveRejection, Verifier
from tokenlab.models import Transformer, for_decoding


class _State(flax.struct.PyTreeNode):
    """The loop's carry; the cache lacks the last token of a row, on which the next tree hangs."""

    cache: Cache
    history: History
    done: Bool[Array, " B"]
    drafter: PyTree
    logp_model: Float[Array, "B N"]
    logp_behaviour: Float[Array, "B N"]
    passes: Int[Array, " B"]
    accepted: Int[Array, " B"]
    spent: Spent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculative(Decoder):
    """Drafts a tree, reads it in one pass under a mask of ancestors, takes what the verifier takes.

    The distribution of what is written is that of :class:`Autoregressive` with the same sampler;
    with ``Greedy`` the tokens are the same. ``statistics`` has per row: ``passes`` of the target
    that wrote something, and ``accepted`` drafted tokens.

    Attributes:
        drafter: proposes.
        verifier: judges.
        sampler: whose distribution is written; its processors keep no state.
        cache: what the target remembers.
        prefill_chunk: prompt tokens read in one pass; None reads a prompt whole.
        stream_every: passes between calls of ``on_tokens``.
    """

    drafter: Drafter
    verifier: Verifier = RecursiveRejection()
    sampler: Sampler = Categorical()
    cache: CachePolicy = FullCache()
    prefill_chunk: int | None = None
    stream_every: int = 8

    def __call__(
        self,
        view: View,
        prompts: Sequence[Sequence[int]],
        *,
        key: PRNGKeyArray,
        on_tokens: OnTokens | None = None,
        others: Mapping[str, View] | None = None,
    ) -> Generation:
        """See :meth:`Decoder.__call__`; ``others`` are models that the drafter may ask."""
        self._check(view, prompts)
        self.verifier.check(self.drafter.chains)
        if jax.tree.leaves(self.sampler.init(batch=1)):
            raise UserError(
                "a processor of the sampler keeps a state, which speculation cannot take back; "
                "decode with Autoregressive"
            )
        model, params = for_decoding(cast(Transformer, view.model), view.params)
        source = self.drafter.source(view, others or {})
        draft_model = None if source is None else cast(Transformer, source.model)
        draft_params = None if source is None else source.params
        static = (model, draft_model, self)
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        width = bucket(int(lengths.max()))
        capacity = bucket(width + self.max_new_tokens + self.drafter.depth + 1)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(prompts)))
        tokens = padded(prompts, width)
        state = _prefill(static, capacity, params, draft_params, tokens, lengths, keys)
        turns = self.stream_every if on_tokens is not None else self.max_new_tokens
        while not bool(jnp.all(state.done)):
            state = _decode(static, params, draft_params, state, keys, turns)
            if on_tokens is not None:
                state = _shown(state, self, on_tokens)
        return self._generation(model, draft_model, state)

    def behind(self, processors: Sequence[Processor]) -> Speculative:
        """The same with another sampler."""
        return dataclasses.replace(self, sampler=self.sampler.behind(processors))

    def _generation(
        self, model: Transformer, draft: Transformer | None, state: _State
    ) -> Generation:
        tokens, lengths = _written(state.history, self.max_new_tokens)
        inside = np.arange(self.max_new_tokens)[None] < lengths[:, None]
        cost = ledger_of(model, state.spent, state.cache)
        asked = self.drafter.spent(state.drafter)
        others = {} if asked is None else {"draft": ledger_of(cast(Transformer, draft), *asked)}
        return Generation(
            tokens=tokens,
            lengths=lengths,
            logp_model=np.where(inside, state.logp_model, 0),
            logp_behaviour=np.where(inside, state.logp_behaviour, 0),
            ledger=cost,
            others=others,
            statistics={
                "passes": np.asarray(state.passes),
                "accepted": np.asarray(state.accepted),
                **{name: np.asarray(x) for name, x in state.cache.counters().items()},
            },
        )


def _written(history: History, count: int) -> tuple[np.ndarray, np.ndarray]:
    """New tokens, zeros behind them, and how many."""
    lengths = np.asarray(history.lengths - history.prompts)
    at = np.asarray(history.prompts)[:, None] + np.arange(count)[None]
    tokens = np.take_along_axis(np.asarray(history.tokens), at, axis=1)
    return np.where(np.arange(count)[None] < lengths[:, None], tokens, 0), lengths


def _shown(state: _State, decoder: Speculative, on_tokens: OnTokens) -> _State:
    tokens, lengths = _written(state.history, decoder.max_new_tokens)
    stop = on_tokens(tokens[:, : int(lengths.max())], lengths)
    return state if stop is None else state.replace(done=state.done | jnp.asarray(stop))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    static: tuple[Transformer, Transformer | None, Speculative],
    capacity: int,
    params: PyTree,
    draft_params: PyTree,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    keys: RowKeys,
) -> _State:
    """Reads the prompts and draws the first token of each row, on which the first tree hangs."""
    model, draft, decoder = static
    batch = len(tokens)
    begun = begin(
        model, params, decoder.cache, tokens, lengths, capacity=capacity,
        chunk=decoder.prefill_chunk,
    )  # fmt: skip
    draw, _ = decoder.sampler(
        begun.logits, decoder.sampler.init(batch=batch), history=begun.history,
        keys=_at_positions(keys, begun.history, "first"),
    )  # fmt: skip
    empty = jnp.zeros((batch, decoder.max_new_tokens))
    return _State(
        cache=begun.cache,
        history=begun.history.append(draw.token, draw.possible),
        done=~draw.possible | _is_end(draw.token, decoder) | (decoder.max_new_tokens <= 1),
        drafter=decoder.drafter.begin(
            None if draft is None else Draft(draft, draft_params), tokens, lengths,
            capacity=capacity, vocabulary=model.vocab_size,
        ),
        logp_model=empty.at[:, 0].set(draw.logp_model),
        logp_behaviour=empty.at[:, 0].set(draw.logp_behaviour),
        passes=jnp.ones(batch, jnp.int32),
        accepted=jnp.zeros(batch, jnp.int32),
        spent=begun.spent,
    )  # fmt: skip


def _at_positions(keys: RowKeys, history: History, name: str) -> RowKeys:
    return jax.vmap(lambda key, at: stream(key, name, at))(keys, history.lengths)


def _is_end(tokens: Array, decoder: Speculative) -> Array:
    return jnp.isin(tokens, jnp.asarray(decoder.end_ids, jnp.int32))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode(
    static: tuple[Transformer, Transformer | None, Speculative],
    params: PyTree,
    draft_params: PyTree,
    state: _State,
    keys: RowKeys,
    turns: Int[Array, ""],
) -> _State:
    """Up to ``turns`` trees, or until every row has ended."""

    def unfinished(carry: tuple[Array, _State]) -> Bool[Array, ""]:
        return (carry[0] < turns) & ~jnp.all(carry[1].done)

    def turn(carry: tuple[Array, _State]) -> tuple[Array, _State]:
        return carry[0] + 1, _turn(static, params, draft_params, carry[1], keys)

    return jax.lax.while_loop(unfinished, turn, (jnp.int32(0), state))[1]


def _turn(
    static: tuple[Transformer, Transformer | None, Speculative],
    params: PyTree,
    draft_params: PyTree,
    state: _State,
    keys: RowKeys,
) -> _State:
    """One tree: proposed, read, judged, and what is taken of it appended."""
    model, draft_model, decoder = static
    history, running = state.history, ~state.done
    draft = None if draft_model is None else Draft(draft_model, draft_params)
    tree, drafter = decoder.drafter.propose(
        draft, state.drafter, history=history, sampler=decoder.sampler,
        keys=_at_positions(keys, history, "draft"),
    )  # fmt: skip
    tree = tree._replace(valid=tree.valid & running[:, None])
    logits, out, segments = _judged(model, params, state, tree, running)
    logp, possible = _targets(logits, tree, history, decoder.sampler)
    verdict = decoder.verifier(tree, jnp.exp(logp), keys=_at_positions(keys, history, "verify"))
    # Of what is written, nothing comes after an end token, the bound, or where nothing is possible.
    tokens = jnp.take_along_axis(tree.tokens, jnp.maximum(verdict.path, 0), axis=1)
    step = jnp.arange(tree.size + 1)[None, :]
    new = jnp.pad(tokens, ((0, 0), (0, 1)))
    new = jnp.where(step == verdict.count[:, None], verdict.token[:, None], new)
    ends = _is_end(new, decoder)
    before = jnp.pad(verdict.path + 1, ((0, 0), (1, 0)))
    taken = step <= verdict.count[:, None]
    stuck = taken & ~jnp.take_along_axis(possible, before, axis=1)
    limit = history.prompts + decoder.max_new_tokens
    kept = taken & (step < (limit - history.lengths)[:, None])
    kept &= running[:, None] & (jnp.cumsum(stuck, axis=1) == 0)
    kept &= jnp.cumsum(ends, axis=1) - ends == 0
    written = jnp.sum(kept, axis=1)
    rows = jnp.arange(len(new))[:, None]
    place = jnp.where(kept, history.lengths[:, None] + step, history.tokens.shape[1])
    at = jnp.where(kept, place - history.prompts[:, None], decoder.max_new_tokens)
    sums = jax.nn.logsumexp(logits, axis=-1)[rows, before]
    logp_model, logp_behaviour = logits[rows, before, new] - sums, logp[rows, before, new]

    def logged(buffer: Array, values: Array) -> Array:
        return buffer.at[rows, at].set(values, mode="drop")

    outcome = Outcome(tree, logits, history.last(1)[:, 0], verdict, running)
    lengths = history.lengths + written
    return _State(
        # The root and the accepted nodes are read; the last token is the next root.
        cache=out.cache.accept(before, written),
        history=history._replace(
            tokens=history.tokens.at[rows, place].set(new, mode="drop"), lengths=lengths
        ),
        done=state.done | jnp.any(kept & ends | stuck, axis=1) | (lengths >= limit),
        drafter=decoder.drafter.learn(drafter, outcome),
        logp_model=logged(state.logp_model, logp_model),
        logp_behaviour=logged(state.logp_behaviour, logp_behaviour),
        passes=state.passes + running,
        accepted=state.accepted + jnp.sum(kept & (step < verdict.count[:, None]), axis=1),
        spent=state.spent.after(out, segments, jnp.sum(segments)),
    )


def _judged(
    model: Transformer, params: PyTree, state: _State, tree: Tree, running: Bool[Array, " B"]
) -> tuple[Float[Array, "B M V"], Any, Int[Array, "B M"]]:
    """The target's logits after the root and each node, in one pass over both."""
    seen = jnp.pad(tree.ancestors(), ((0, 0), (1, 0), (1, 0)))
    seen = seen.at[:, :, 0].set(True)
    depth = jnp.sum(seen, axis=2, dtype=jnp.int32) - 1
    tokens = jnp.concatenate([state.history.last(1), tree.tokens], axis=1)
    segments = jnp.concatenate([running[:, None], tree.valid], axis=1).astype(jnp.int32)
    positions = state.history.lengths[:, None] - 1 + depth
    out: Any = read(
        model, params, state.cache.draft(seen), tokens, positions=positions, segments=segments
    )
    return logits_of(model, params, out.hidden), out, segments


def _targets(
    logits: Float[Array, "B M V"], tree: Tree, history: History, sampler: Sampler
) -> tuple[Float[Array, "B M V"], Bool[Array, "B M"]]:
    """Log-probabilities of what is written after the root and each node, and if anything can be."""
    batch, count, vocabulary = logits.shape
    histories = jax.tree.map(
        lambda root, rest: jnp.concatenate(
            [root[:, None], rest.reshape(batch, count - 1, *root.shape[1:])], axis=1
        ).reshape(batch * count, *root.shape[1:]),
        history,
        path_histories(tree, history),
    )
    flat = logits.reshape(-1, vocabulary)
    shaped, possible, _ = sampler.shape(flat, sampler.init(batch=len(flat)), history=histories)
    return sampler.logp(shaped).reshape(logits.shape), possible.reshape(batch, count)

"""How likely a text is after a prompt, read through a cache as decoding would read it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab.cache import Cache, CachePolicy
from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.core.ledger import Ledger
from tokenlab.decode.base import bucket, check_prompts, padded
from tokenlab.decode.passes import Spent, ledger_of, logits_of, prefill, read
from tokenlab.models import Transformer, for_decoding

Static = tuple[Transformer, CachePolicy, int | None, int]
# Log-probability of each token, whether it is the likeliest, and the state that predicts it.
Parts = tuple[Float[Array, "B N"], Bool[Array, "B N"], Float[Array, "B N D"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """Continuations as a model sees them through a cache.

    Attributes:
        logp: log-probability of each token after the prompt and those before it, nats; 0 behind the
            end.
        likeliest: whether it is the model's likeliest token; false behind the end. A row that is
            all true is what greedy decoding would have written.
        hidden: last hidden state from which each token is predicted.
        lengths: tokens of each continuation.
        ledger: cost of all passes.
        statistics: what the cache counted, by name, per row.
    """

    logp: Float[np.ndarray, "B N"]
    likeliest: Bool[np.ndarray, "B N"]
    hidden: Float[np.ndarray, "B N D"]
    lengths: Int[np.ndarray, " B"]
    ledger: Ledger
    statistics: dict[str, np.ndarray]

    @property
    def perplexity(self) -> float:
        """``exp(-mean logp)`` over all tokens of all rows."""
        return float(np.exp(-self.logp.sum() / self.lengths.sum()))

    @property
    def repeated(self) -> Bool[np.ndarray, " B"]:
        """Rows of which greedy decoding would have written every token."""
        return self.likeliest.sum(axis=1) == self.lengths


def score_continuation(
    view: View,
    policy: CachePolicy,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    prefill_chunk: int | None = None,
    chunk: int = 1,
) -> Scored:
    """Reads prompts into a cache, then the given continuations, and scores these.

    Args:
        view: the model and its parameters.
        policy: what is remembered.
        prompts: token ids, each at least one long.
        continuations: token ids that follow each prompt.
        prefill_chunk: prompt tokens read in one pass; None reads a prompt whole, with dense
            attention.
        chunk: tokens of a continuation read in one pass. 1 is what decoding does; tokens of one
            pass see each other whatever the policy.

    Returns:
        Log-probabilities, costs and what the cache counted.

    Raises:
        UserError: a decoder would refuse the prompts, or a continuation is missing or empty.
    """
    model, params = for_decoding(cast(Transformer, view.model), view.params)
    if len(prompts) != len(continuations) or not all(continuations):
        raise UserError("give every prompt a continuation of at least one token")
    for name, value in (("chunk", chunk), ("prefill_chunk", prefill_chunk)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    longest = max(len(continuation) for continuation in continuations)
    check_prompts(model, prompts, longest)
    check_prompts(model, continuations, 0)
    lengths, counts = (
        np.asarray([len(row) for row in rows], np.int32) for rows in (prompts, continuations)
    )
    width = bucket(int(lengths.max()))
    # All tokens but the last are read; the last is only predicted.
    read_tokens = -(-(longest - 1) // chunk) * chunk
    cache, (logp, likeliest, hidden), spent = _score(
        (model, policy, prefill_chunk, chunk), bucket(width + read_tokens), params,
        padded(prompts, width), lengths, padded(continuations, read_tokens + 1), counts,
    )  # fmt: skip
    return Scored(
        logp=np.asarray(logp)[:, :longest],
        likeliest=np.asarray(likeliest)[:, :longest],
        hidden=np.asarray(hidden)[:, :longest],
        lengths=counts,
        ledger=ledger_of(model, spent, cache),
        statistics={name: np.asarray(x) for name, x in cache.counters().items()},
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    static: Static,
    capacity: int,
    params: PyTree,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    targets: Int[Array, "B N"],
    counts: Int[Array, " B"],
) -> tuple[Cache, Parts, Spent]:
    model, policy, prefill_chunk, chunk = static
    cache = model.empty_cache(policy, batch=len(tokens), capacity=capacity)
    cache, last, spent = prefill(model, params, cache, tokens, lengths, chunk=prefill_chunk)
    first = _scored(model, params, last, targets[:, :1])

    def step(carry: tuple[Cache, Spent], start: Array) -> tuple[tuple[Cache, Spent], Any]:
        cache, spent = carry
        part = jax.lax.dynamic_slice_in_dim(targets, start, chunk + 1, axis=1)
        place = start + jnp.arange(chunk)[None]
        # The last token of a continuation is not read.
        segments = (place + 1 < counts[:, None]).astype(jnp.int32)
        out = read(
            model, params, cache, part[:, :-1], positions=lengths[:, None] + place,
            segments=segments,
        )  # fmt: skip
        found = _scored(model, params, out.hidden, part[:, 1:])
        return (out.cache, spent.after(out, segments, jnp.sum(segments))), found

    starts = jnp.arange(0, targets.shape[1] - 1, chunk)
    (cache, spent), rest = jax.lax.scan(step, (cache, spent), starts)
    there = jnp.arange(targets.shape[1])[None] < counts[:, None]
    logp, likeliest, hidden = (
        jnp.concatenate(
            [one, jnp.moveaxis(many, 0, 1).reshape(len(tokens), -1, *one.shape[2:])], axis=1
        )
        for one, many in zip(first, rest, strict=True)
    )
    return cache, (jnp.where(there, logp, 0.0), likeliest & there, hidden), spent


def _scored(
    model: Transformer, params: PyTree, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> Parts:
    logits = logits_of(model, params, hidden)
    own = jnp.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
    logp = own - jax.nn.logsumexp(logits, axis=2)
    return logp, jnp.argmax(logits, axis=2) == targets, hidden

"""Passes of a model over its cache, and what they cost."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab.cache import Cache, CachePolicy
from tokenlab.core.arrays import Array, Float, Hidden, Int
from tokenlab.core.context import View
from tokenlab.core.ledger import Ledger
from tokenlab.decode.processors import History
from tokenlab.models import Transformer


class Spent(flax.struct.PyTreeNode):
    """Work of the passes so far, cached attention aside, which a cache counts itself.

    Attributes:
        runs: tokens that went through each application of a layer.
        passes: passes of the model.
        slots: positions computed, padding included.
        tokens: tokens read.
        projected: positions whose logits were asked for.
        flops: operations that layers report beside those that every token costs.
    """

    runs: Float[Array, " R"]
    passes: Float[Array, ""]
    slots: Float[Array, ""]
    tokens: Float[Array, ""]
    projected: Float[Array, ""]
    flops: Float[Array, ""]

    def after(self, out: Any, segments: Int[Array, "B T"], projected: Array | int = 0) -> Spent:
        """With one more pass.

        Args:
            out: ``models.ModelOutput``.
            segments: of the pass.
            projected: positions whose logits are asked for.
        """
        return Spent(
            runs=self.runs + jnp.sum(out.trace.active, axis=(1, 2), dtype=jnp.float32),
            passes=self.passes + 1,
            slots=self.slots + segments.size,
            tokens=self.tokens + jnp.sum(segments > 0),
            projected=self.projected + projected,
            flops=self.flops + out.trace.flops,
        )

    def mixing(self, model: Transformer, rows: Int[Array, ""]) -> Spent:
        """With the mean embeddings that ``rows`` positions read in place of one token's."""
        return self.replace(flops=self.flops + rows * (2.0 * model.vocab_size * model.dim))

    def plus(self, other: Spent) -> Spent:
        """Both."""
        return jax.tree.map(jnp.add, self, other)


def nothing_spent(model: Transformer) -> Spent:
    """Before the first pass."""
    zero = jnp.float32(0)
    applications = model.depth.projects(model.num_layers)
    return Spent(jnp.zeros(len(applications)), zero, zero, zero, zero, zero)


def ledger(
    model: Transformer,
    spent: Spent,
    *,
    pairs: Float[np.ndarray, " L"],
    held: Float[np.ndarray, " L"],
) -> Ledger:
    """Costs in the ledger's units.

    Args:
        model: the model.
        spent: its passes.
        pairs: query-key pairs attended, per cache.
        held: entries kept at the end, per cache.
    """
    spent = jax.tree.map(lambda x: np.asarray(x, np.float64), spent)
    mixers = model.mixers()
    layers = model.depth.cached_layers(model.num_layers)
    heads = [mixers[i].heads(model.dim) for i in layers]
    widths = [2 * each.num_kv_heads * each.width for each in heads]
    projection = 2 * model.head.rows(model.vocab_size) * model.dim
    return Ledger(
        passes=float(spent.passes),
        tokens=float(spent.tokens),
        slots=float(spent.slots),
        block_tokens=float(spent.runs.sum()),
        attended_pairs=float(np.sum(pairs)),
        flops=float(model.flops(spent.runs, pairs) + spent.projected * projection + spent.flops),
        cache_entries=float(np.sum(held)),
        cache_bytes=float(np.dot(held, widths)) * jnp.dtype(model.dtype).itemsize,
    )


def ledger_of(model: Transformer, spent: Spent, cache: Cache) -> Ledger:
    """:func:`ledger` of passes over one cache, from its beginning to now."""
    pairs, held = (np.asarray(x, np.float64).sum(axis=1) for x in (cache.pairs, cache.held()))
    return ledger(model, spent, pairs=pairs, held=held)


def read(
    model: Transformer,
    params: PyTree,
    cache: Cache,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    embeddings: Hidden | None = None,
) -> Any:
    """One pass over ``cache``; gives ``models.ModelOutput``."""
    view = View(model=model, params=params)
    return view(tokens, positions=positions, segments=segments, cache=cache, embeddings=embeddings)


def logits_of(model: Transformer, params: PyTree, hidden: Hidden) -> Float[Array, "B T V"]:
    """Float32 logits."""
    logits: Any = model.apply({"params": params}, hidden, method="logits")
    return logits


def prefill(
    model: Transformer,
    params: PyTree,
    cache: Cache,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    *,
    chunk: int | None = None,
) -> tuple[Cache, Float[Array, "B 1 D"], Spent]:
    """Reads prompts, ``chunk`` tokens at a time.

    Args:
        model: the model.
        params: its parameters.
        cache: empty.
        tokens: prompts, zeros behind them.
        lengths: their lengths.
        chunk: tokens of a pass; None is all. Rows are padded to a multiple of it.

    Returns:
        The cache, the last hidden state of each prompt, and the work.
    """
    batch, width = tokens.shape
    chunk = width if chunk is None else min(chunk, width)
    tokens = jnp.pad(tokens, ((0, 0), (0, -width % chunk)))
    spent = nothing_spent(model)

    def step(cache: Cache, last: Array, spent: Spent, start: Array | int):
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(chunk)[None], part.shape)
        segments = (positions < lengths[:, None]).astype(jnp.int32)
        out = read(model, params, cache, part, positions=positions, segments=segments)
        at = (lengths - 1 - start)[:, None, None]
        here = jnp.take_along_axis(out.hidden, jnp.clip(at, 0, chunk - 1), axis=1)
        last = jnp.where((at >= 0) & (at < chunk), here, last)
        return out.cache, last, spent.after(out, segments)

    last = jnp.zeros((batch, 1, model.dim), model.dtype)
    cache, last, spent = step(cache, last, spent, 0)
    rest = jnp.arange(chunk, tokens.shape[1], chunk)
    if len(rest):
        (cache, last, spent), _ = jax.lax.scan(
            lambda carry, start: (step(*carry, start), None), (cache, last, spent), rest
        )
    return cache, last, spent.replace(projected=spent.projected + batch)


class Begun(NamedTuple):
    """Rows whose prompts are read.

    Attributes:
        cache: with the prompts in it.
        logits: of the token after each.
        history: the prompts, with room behind them.
        spent: the work.
    """

    cache: Cache
    logits: Float[Array, "B V"]
    history: History
    spent: Spent


def begin(
    model: Transformer,
    params: PyTree,
    policy: CachePolicy,
    tokens: Int[Array, "B W"],
    lengths: Int[Array, " B"],
    *,
    capacity: int,
    chunk: int | None = None,
) -> Begun:
    """Reads prompts into a new cache with room for ``capacity`` tokens a row.

    The other arguments are those of :func:`prefill`.
    """
    batch, width = tokens.shape
    cache = model.empty_cache(policy, batch=batch, capacity=capacity)
    cache, last, spent = prefill(model, params, cache, tokens, lengths, chunk=chunk)
    history = History(jnp.pad(tokens, ((0, 0), (0, capacity - width))), lengths, lengths)
    return Begun(cache, logits_of(model, params, last)[:, 0], history, spent)

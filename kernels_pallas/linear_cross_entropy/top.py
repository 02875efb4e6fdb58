"""The likeliest entries of a vocabulary, a block of it at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.linear_cross_entropy.blocks import (
    Head,
    block_of,
    indices,
    owned,
    raw_logits,
)
from kernels_pallas.linear_cross_entropy.ref import capped
from kernels_pallas.linear_cross_entropy.specs import LinearCrossEntropyConfig

# Rows of the weight that are gathered at a time, in elements.
_GATHERED = 2**22


class TopLogits(NamedTuple):
    """The highest logits of each token, falling; of equal ones the lower id is first.

    Attributes:
        logits: the logits, float32.
        ids: their entries, int32; without gradient.
    """

    logits: Float[Array, "B T K"]
    ids: Int[Array, "B T K"]


def top_logits(
    *,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    k: int,
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
    vocabulary_axes: tuple[str, ...] = (),
    config: LinearCrossEntropyConfig | None = None,
) -> TopLogits:
    """The ``k`` highest logits of each token, without logits of the whole vocabulary in memory.

    ``logits[k] = cap(hidden · weight[ids[k]] + bias[ids[k]])``, through which it is
    differentiable (reverse mode) in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: last hidden states ``[B, T, D]``.
        weight: output embedding ``[V, D]``.
        k: entries per token, at most ``V``.
        bias: logit bias ``[V]``.
        softcap: bound of the absolute logits.
        vocabulary_axes: inside ``jax.shard_map``, the mesh axes over which ``weight`` and ``bias``
            are split into equal parts; ids are those of the whole vocabulary.
        config: block sizes; ``None`` derives them from the shapes.

    Returns:
        ``[B, T, k]`` each.

    Raises:
        ValueError: ``k`` is not in ``1..V``.
    """
    batch, length, _ = hidden.shape
    vocabulary = weight.shape[0]
    parts = lax.axis_size(vocabulary_axes) if vocabulary_axes else 1
    if not 0 < k <= vocabulary * parts:
        raise ValueError(f"k is {k}; a vocabulary of {vocabulary * parts} has 1 to as many")
    size = (config or LinearCrossEntropyConfig()).block(batch * length, vocabulary)
    rows, head = hidden.reshape(batch * length, -1), Head(weight, bias)
    fixed_rows, fixed_head = jax.tree.map(lax.stop_gradient, (rows, head))
    logits, ids = _highest(fixed_rows, fixed_head, min(k, vocabulary), size, softcap)
    if vocabulary_axes:
        start = lax.axis_index(vocabulary_axes) * vocabulary
        ids = _merged(logits, ids + start, k, vocabulary_axes)
        here = ids - start
        mine = (here >= 0) & (here < vocabulary)
        logits = capped(_logits_at(rows, head, jnp.where(mine, here, 0)), softcap)
        logits = lax.psum(jnp.where(mine, logits, 0.0), vocabulary_axes)
    else:
        logits = capped(_logits_at(rows, head, ids), softcap)
    return TopLogits(logits.reshape(batch, length, k), ids.reshape(batch, length, k))


def _highest(
    rows: Float[Array, "N D"], head: Head, k: int, size: int, softcap: float | None
) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    vocabulary = head.weight.shape[0]

    def accumulate(best, index):
        block = block_of(head, index, size)
        logits = capped(raw_logits(rows, block.head), softcap)
        own = owned(block, size, vocabulary)
        if own is not None:
            logits = jnp.where(own, logits, -jnp.inf)
        ids = jnp.broadcast_to((block.start + jnp.arange(size))[None], logits.shape)
        logits, ids = (jnp.concatenate(pair, 1) for pair in zip(best, (logits, ids), strict=True))
        logits, places = lax.top_k(logits, k)
        return (logits, jnp.take_along_axis(ids, places, axis=1)), None

    count = rows.shape[0]
    start = jnp.full((count, k), -jnp.inf), jnp.zeros((count, k), jnp.int32)
    return lax.scan(accumulate, start, indices(vocabulary, size))[0]


def _merged(logits, ids, k: int, axes: tuple[str, ...]) -> Int[Array, "N K"]:
    """The ids of the highest of all parts."""
    logits, ids = (lax.all_gather(x, axes, axis=1, tiled=True) for x in (logits, ids))
    return jnp.take_along_axis(ids, lax.top_k(logits, k)[1], axis=1)


@jax.custom_vjp
def _logits_at(
    rows: Float[Array, "N D"], head: Head, ids: Int[Array, "N K"]
) -> Float[Array, "N K"]:
    """``rows[n] · weight[ids[n, k]] + bias[ids[n, k]]``, some tokens at a time."""

    def one(item):
        row, ids = item
        picked = jax.tree.map(lambda leaf: leaf[ids], head)
        return raw_logits(row[None], picked)[0]

    return lax.map(one, (rows, ids), batch_size=_batch(rows, ids))


def _batch(rows: Array, ids: Array) -> int:
    return max(1, _GATHERED // (ids.shape[1] * rows.shape[1]))


def _logits_at_forward(rows, head, ids):
    return _logits_at(rows, head, ids), (rows, head, ids)


def _logits_at_backward(residuals, cotangent):
    rows, head, ids = residuals

    def by_row(item):
        ids, by_logits = item
        return jnp.einsum(
            "k,kd->d", by_logits, head.weight[ids], preferred_element_type=jnp.float32
        )

    by_rows = lax.map(by_row, (ids, cotangent), batch_size=_batch(rows, ids))
    count, batch = rows.shape[0], min(_batch(rows, ids), rows.shape[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)

    def scatter(sums, chunk):
        # The last chunk starts early; what an earlier one had counts once.
        start = jnp.minimum(chunk * batch, count - batch)
        take = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=batch)
        fresh = start + jnp.arange(batch) >= chunk * batch
        by_logits = jnp.where(fresh[:, None], take(cotangent), 0.0)
        places = take(ids)
        more = by_logits[:, :, None] * take(rows).astype(jnp.float32)[:, None, :]
        weight = sums.weight.at[places].add(more)
        bias = None if sums.bias is None else sums.bias.at[places].add(by_logits)
        return Head(weight, bias), None

    by_head, _ = lax.scan(scatter, zeros, jnp.arange(-(-count // batch)))
    by_head = jax.tree.map(lambda sum, leaf: sum.astype(leaf.dtype), by_head, head)
    return by_rows.astype(rows.dtype), by_head, None


_logits_at.defvjp(_logits_at_forward, _logits_at_backward)

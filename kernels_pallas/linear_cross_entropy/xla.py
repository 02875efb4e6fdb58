"""Blocks of the vocabulary, one alive at a time, recomputed in the backward pass.

All tokens stay whole while the loop walks over the vocabulary. So one block of the weight's
gradient is one matrix product, with nothing to accumulate, and a batch that is sharded stays so:
the one reduction over devices is that of the finished block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.linear_cross_entropy.blocks import (
    Block,
    Head,
    add_block,
    block_of,
    indices,
    owned,
    raw_logits,
)
from kernels_pallas.linear_cross_entropy.ref import capped
from kernels_pallas.linear_cross_entropy.specs import (
    LinearCrossEntropyConfig,
    TargetLogits,
    VocabularyStatistics,
)

# Stands in for -inf, whose differences would be NaN.
_NEVER = -1e30


class _Call(NamedTuple):
    softcap: float | None
    size: int
    statistics: bool  # entropy and arg-max as well


class _Sums(NamedTuple):
    highest: Float[Array, " N"]
    total: Float[Array, " N"]
    summed: Float[Array, " N"]
    weighted: Float[Array, " N"] | None  # of logits relative to the highest
    best: Int[Array, " N"] | None


def linear_cross_entropy(
    *,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    config: LinearCrossEntropyConfig,
) -> TargetLogits:
    """See :func:`kernels_pallas.linear_cross_entropy.linear_cross_entropy`."""
    call = _Call(softcap, config.block(targets.size, weight.shape[0]), statistics=False)
    return TargetLogits(*_run(call, hidden, weight, bias, targets))


def vocabulary_statistics(
    *,
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    config: LinearCrossEntropyConfig,
) -> VocabularyStatistics:
    """See :func:`kernels_pallas.linear_cross_entropy.vocabulary_statistics`."""
    call = _Call(softcap, config.block(targets.size, weight.shape[0]), statistics=True)
    return VocabularyStatistics(*_run(call, hidden, weight, bias, targets))


def _run(call: _Call, hidden, weight, bias, targets) -> list[Array]:
    tokens = targets.size
    flat = _statistics(
        call, hidden.reshape(tokens, -1), Head(weight, bias), targets.reshape(tokens)
    )
    return [value.reshape(targets.shape) for value in flat]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(
    call: _Call, hidden: Float[Array, "N D"], head: Head, targets: Int[Array, " N"]
) -> tuple[Array | None, ...]:
    return _forward(call, hidden, head, targets)[0]


def _forward(call: _Call, hidden, head, targets):
    tokens, vocabulary = hidden.shape[0], head.weight.shape[0]

    def accumulate(sums, index):
        block = block_of(head, index, call.size)
        logits = capped(raw_logits(hidden, block.head), call.softcap)
        return _accumulate(sums, logits, block, owned(block, call.size, vocabulary)), None

    zeros = jnp.zeros(tokens, jnp.float32)
    start = _Sums(
        highest=jnp.full_like(zeros, _NEVER),
        total=zeros,
        summed=zeros,
        weighted=zeros if call.statistics else None,
        best=jnp.zeros(tokens, jnp.int32) if call.statistics else None,
    )
    sums, _ = lax.scan(accumulate, start, indices(vocabulary, call.size))
    log_sum_exp = sums.highest + jnp.log(sums.total)

    rows = jnp.take(head.weight, targets, axis=0, mode="clip").astype(jnp.float32)
    raw = jnp.sum(hidden.astype(jnp.float32) * rows, axis=1)
    if head.bias is not None:
        raw += jnp.take(head.bias, targets, mode="clip").astype(jnp.float32)
    result = (capped(raw, call.softcap), log_sum_exp, sums.summed / vocabulary)
    entropy = None
    if sums.weighted is not None:
        entropy = jnp.log(sums.total) - sums.weighted / sums.total
        result = (*result, entropy, sums.highest, sums.best)
    return result, (hidden, head, targets, log_sum_exp, entropy)


def _accumulate(sums: _Sums, logits: Float[Array, "N V"], block: Block, owned) -> _Sums:
    masked = logits if owned is None else jnp.where(owned, logits, _NEVER)
    summed = sums.summed
    summed += jnp.sum(logits if owned is None else jnp.where(owned, logits, 0.0), axis=1)
    here = jnp.max(masked, axis=1)
    higher = jnp.maximum(sums.highest, here)
    rise = higher - sums.highest
    below = masked - higher[:, None]
    total = sums.total * jnp.exp(-rise) + jnp.sum(jnp.exp(below), axis=1)
    if sums.weighted is None or sums.best is None:
        return _Sums(higher, total, summed, None, None)
    # Relative to the highest, so that large logits of little entropy do not cancel.
    weighted = jnp.exp(-rise) * (sums.weighted - rise * sums.total)
    weighted += jnp.sum(jnp.exp(below) * below, axis=1)
    first = block.start + jnp.argmax(masked, axis=1).astype(jnp.int32)
    return _Sums(higher, total, summed, weighted, jnp.where(here > sums.highest, first, sums.best))


def _backward(call: _Call, residuals, cotangents):
    hidden, head, targets, log_sum_exp, entropy = residuals
    by_target, by_log_sum_exp, by_mean = (cotangent[:, None] for cotangent in cotangents[:3])
    vocabulary = head.weight.shape[0]
    dtype = jnp.result_type(hidden, head.weight)

    def accumulate(carry, index):
        hidden_gradient, head_gradient = carry
        block = block_of(head, index, call.size)
        logits = capped(raw_logits(hidden, block.head), call.softcap)
        entries = block.start + jnp.arange(call.size)
        share = by_log_sum_exp
        if call.statistics:
            share -= cotangents[3][:, None] * (logits - (log_sum_exp - entropy)[:, None])
        gradient = share * jnp.exp(logits - log_sum_exp[:, None])
        gradient += jnp.where(entries[None, :] == targets[:, None], by_target, 0.0)
        gradient += by_mean / vocabulary
        if call.softcap is not None:
            gradient *= 1.0 - jnp.square(logits / call.softcap)
        own = owned(block, call.size, vocabulary)
        if own is not None:
            gradient = jnp.where(own, gradient, 0.0)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        hidden_gradient += product("nv,vd->nd", gradient.astype(dtype), block.head.weight)
        head_block = Head(
            weight=product("nv,nd->vd", gradient.astype(dtype), hidden),
            bias=None if head.bias is None else jnp.sum(gradient, axis=0),
        )
        return (hidden_gradient, add_block(head_gradient, head_block, block.start)), None

    zeros = jnp.zeros(hidden.shape, jnp.float32)
    (hidden_gradient, head_gradient), _ = lax.scan(
        accumulate, (zeros, jax.tree.map(jnp.zeros_like, head)), indices(vocabulary, call.size)
    )
    return hidden_gradient.astype(hidden.dtype), head_gradient, None


_statistics.defvjp(_forward, _backward)

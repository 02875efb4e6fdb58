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

from kernels_pallas.linear_cross_entropy.specs import LinearCrossEntropyConfig, TargetLogits

# Stands in for -inf, whose differences would be NaN.
_NEVER = -1e30


class _Head(NamedTuple):
    weight: Float[Array, "V D"]
    bias: Float[Array, " V"] | None


class _Block(NamedTuple):
    start: Int[Array, ""]
    first: Int[Array, ""]  # entries before it belong to the previous block
    head: _Head


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
    tokens = targets.size
    flat = _target_logits(
        softcap,
        config.block(tokens, weight.shape[0]),
        hidden.reshape(tokens, -1),
        _Head(weight, bias),
        targets.reshape(tokens),
    )
    return TargetLogits(*(value.reshape(targets.shape) for value in flat))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _target_logits(
    softcap: float | None,
    size: int,
    hidden: Float[Array, "N D"],
    head: _Head,
    targets: Int[Array, " N"],
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    return _forward(softcap, size, hidden, head, targets)[0]


def _forward(softcap, size, hidden, head, targets):
    tokens, vocabulary = hidden.shape[0], head.weight.shape[0]

    def accumulate(carry, index):
        highest, total, summed = carry
        block = _block(head, index, size)
        logits = _capped(_raw(hidden, block.head), softcap)
        owned = _owned(block, size, vocabulary)
        masked = logits if owned is None else jnp.where(owned, logits, _NEVER)
        summed += jnp.sum(logits if owned is None else jnp.where(owned, logits, 0.0), axis=1)
        higher = jnp.maximum(highest, jnp.max(masked, axis=1))
        total *= jnp.exp(highest - higher)
        total += jnp.sum(jnp.exp(masked - higher[:, None]), axis=1)
        return (higher, total, summed), None

    zeros = jnp.zeros(tokens, jnp.float32)
    (highest, total, summed), _ = lax.scan(
        accumulate, (jnp.full_like(zeros, _NEVER), zeros, zeros), _indices(vocabulary, size)
    )
    log_sum_exp = highest + jnp.log(total)

    rows = jnp.take(head.weight, targets, axis=0, mode="clip").astype(jnp.float32)
    raw = jnp.sum(hidden.astype(jnp.float32) * rows, axis=1)
    if head.bias is not None:
        raw += jnp.take(head.bias, targets, mode="clip").astype(jnp.float32)
    result = (_capped(raw, softcap), log_sum_exp, summed / vocabulary)
    return result, (hidden, head, targets, log_sum_exp)


def _backward(softcap, size, residuals, cotangents):
    hidden, head, targets, log_sum_exp = residuals
    by_target, by_log_sum_exp, by_mean = (cotangent[:, None] for cotangent in cotangents)
    vocabulary = head.weight.shape[0]
    dtype = jnp.result_type(hidden, head.weight)

    def accumulate(carry, index):
        hidden_gradient, head_gradient = carry
        block = _block(head, index, size)
        logits = _capped(_raw(hidden, block.head), softcap)
        entries = block.start + jnp.arange(size)
        gradient = by_log_sum_exp * jnp.exp(logits - log_sum_exp[:, None])
        gradient += jnp.where(entries[None, :] == targets[:, None], by_target, 0.0)
        gradient += by_mean / vocabulary
        if softcap is not None:
            gradient *= 1.0 - jnp.square(logits / softcap)
        owned = _owned(block, size, vocabulary)
        if owned is not None:
            gradient = jnp.where(owned, gradient, 0.0)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        hidden_gradient += product("nv,vd->nd", gradient.astype(dtype), block.head.weight)
        head_block = _Head(
            weight=product("nv,nd->vd", gradient.astype(dtype), hidden),
            bias=None if head.bias is None else jnp.sum(gradient, axis=0),
        )
        return (hidden_gradient, _add(head_gradient, head_block, block.start)), None

    zeros = jnp.zeros(hidden.shape, jnp.float32)
    (hidden_gradient, head_gradient), _ = lax.scan(
        accumulate, (zeros, jax.tree.map(jnp.zeros_like, head)), _indices(vocabulary, size)
    )
    return hidden_gradient.astype(hidden.dtype), head_gradient, None


_target_logits.defvjp(_forward, _backward)


def _indices(vocabulary: int, size: int) -> Int[Array, " blocks"]:
    return jnp.arange(-(-vocabulary // size))


def _block(head: _Head, index: Int[Array, ""], size: int) -> _Block:
    """Block ``index``; the last one starts early where the size does not divide the vocabulary."""
    first = index * size
    start = jnp.minimum(first, head.weight.shape[0] - size)
    entries = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), head)
    return _Block(start, first, entries)


def _owned(block: _Block, size: int, vocabulary: int):
    """Which entries no earlier block had, or ``None`` where the answer is always all."""
    if vocabulary % size == 0:
        return None
    return (block.start + jnp.arange(size) >= block.first)[None, :]


def _raw(hidden: Float[Array, "N D"], head: _Head) -> Float[Array, "N V"]:
    logits = jnp.einsum("nd,vd->nv", hidden, head.weight, preferred_element_type=jnp.float32)
    return logits if head.bias is None else logits + head.bias.astype(jnp.float32)[None, :]


def _capped(logits, softcap: float | None):
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _add(whole: _Head, part: _Head, start: Int[Array, ""]) -> _Head:
    """Adds a block; each entry is owned by one block, so low precision loses nothing here."""

    def add(whole, part):
        old = lax.dynamic_slice_in_dim(whole, start, part.shape[0])
        return lax.dynamic_update_slice_in_dim(whole, old + part.astype(whole.dtype), start, 0)

    return jax.tree.map(add, whole, part)

"""Sums over the vocabulary of any function of log-probabilities, a block of it at a time."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

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
from kernels_pallas.linear_cross_entropy.specs import LinearCrossEntropyConfig


class Projection(NamedTuple):
    """The last layer of a model, and the normaliser of its distributions.

    Attributes:
        hidden: last hidden states.
        weight: output embedding.
        log_sum_exp: of the logits, as ``linear_cross_entropy`` gives it.
        bias: logit bias.
        softcap: bound of the absolute logits.
    """

    hidden: Float[Array, "B T D"]
    weight: Float[Array, "V D"]
    log_sum_exp: Float[Array, "B T"]
    bias: Float[Array, " V"] | None = None
    softcap: float | None = None


class _Static(NamedTuple):
    function: Callable[..., Array]
    softcaps: tuple[float | None, ...]
    size: int


class _Rows(NamedTuple):
    """Of each projection, tokens flat."""

    hidden: Float[Array, "N D"]
    log_sum_exp: Float[Array, " N"]


def sum_over_vocabulary(
    function: Callable[..., Array],
    *projections: Projection,
    vocabulary_axes: tuple[str, ...] = (),
    config: LinearCrossEntropyConfig | None = None,
) -> Float[Array, "B T"]:
    """``Σ_v function(log p[v], log q[v], ...)`` of each token, with one distribution per model.

    The models may be of different widths. Differentiable (reverse mode) in all their arrays, the
    normalisers included; logits are recomputed in the backward pass.

    Args:
        function: takes one float32 array ``[B·T, block]`` of log-probabilities per projection
            and gives one. It is hashable and holds no traced array: a function of a module, or a
            frozen dataclass that can be called.
        *projections: of the same tokens and one vocabulary.
        vocabulary_axes: inside ``jax.shard_map``, the mesh axes over which weights and biases
            are split into equal parts, as in ``linear_cross_entropy``.
        config: block sizes; ``None`` derives them from the shapes.

    Returns:
        float32 ``[B, T]``.

    Raises:
        ValueError: the projections differ in tokens or vocabulary.
    """
    shapes = {(each.log_sum_exp.shape, each.weight.shape[0]) for each in projections}
    if len(shapes) != 1:
        shown = " and ".join(f"tokens {at} of a vocabulary of {v}" for at, v in sorted(shapes))
        raise ValueError(f"{shown} do not go together; compare the same tokens and vocabulary")
    ((tokens, vocabulary),) = shapes
    count = tokens[0] * tokens[1]
    size = (config or LinearCrossEntropyConfig()).block(count, vocabulary)
    static = _Static(function, tuple(each.softcap for each in projections), size)
    rows = tuple(
        _Rows(each.hidden.reshape(count, -1), each.log_sum_exp.reshape(count))
        for each in projections
    )
    out = _sum(static, rows, tuple(Head(each.weight, each.bias) for each in projections))
    return (lax.psum(out, vocabulary_axes) if vocabulary_axes else out).reshape(tokens)


def kl_divergence(
    p: Projection,
    q: Projection,
    *,
    vocabulary_axes: tuple[str, ...] = (),
    config: LinearCrossEntropyConfig | None = None,
) -> Float[Array, "B T"]:
    """``KL(p || q) = Σ_v p[v] (log p[v] - log q[v])`` of each token in nats, whole vocabulary.

    Args:
        p: where the expectation is taken.
        q: what it is compared with.
        vocabulary_axes: as in :func:`sum_over_vocabulary`.
        config: as there.
    """
    return sum_over_vocabulary(
        _relative_entropy, p, q, vocabulary_axes=vocabulary_axes, config=config
    )


def _relative_entropy(log_p: Array, log_q: Array) -> Array:
    return jnp.exp(log_p) * (log_p - log_q)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(static: _Static, rows: tuple[_Rows, ...], heads: tuple[Head, ...]) -> Float[Array, " N"]:
    def accumulate(total, index):
        blocks, own = _blocks(static, heads, index)
        return total + _part(static, own, rows, tuple(block.head for block in blocks)), None

    start = jnp.zeros(rows[0].log_sum_exp.shape, jnp.float32)
    return lax.scan(accumulate, start, _indices(static, heads))[0]


def _forward(static: _Static, rows, heads):
    return _sum(static, rows, heads), (rows, heads)


def _backward(static: _Static, residuals, cotangent):
    rows, heads = residuals

    def accumulate(carry, index):
        by_rows, by_heads = carry
        blocks, own = _blocks(static, heads, index)
        part = functools.partial(_part, static, own)
        _, pull_back = jax.vjp(part, rows, tuple(block.head for block in blocks))
        more_rows, by_blocks = pull_back(cotangent)
        by_rows = jax.tree.map(lambda sum, more: sum + more.astype(sum.dtype), by_rows, more_rows)
        by_heads = tuple(
            add_block(whole, by_block, block.start)
            for whole, by_block, block in zip(by_heads, by_blocks, blocks, strict=True)
        )
        return (by_rows, by_heads), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), rows)
    start = zeros, jax.tree.map(jnp.zeros_like, heads)
    (by_rows, by_heads), _ = lax.scan(accumulate, start, _indices(static, heads))
    return jax.tree.map(lambda sum, x: sum.astype(x.dtype), by_rows, rows), by_heads


_sum.defvjp(_forward, _backward)


def _part(
    static: _Static,
    own: Bool[Array, "1 V"] | None,
    rows: tuple[_Rows, ...],
    heads: tuple[Head, ...],
) -> Float[Array, " N"]:
    """The sum over one block."""
    logps = [
        capped(raw_logits(row.hidden, head), cap) - row.log_sum_exp[:, None]
        for row, head, cap in zip(rows, heads, static.softcaps, strict=True)
    ]
    return jnp.sum(static.function(*logps), axis=1, where=own, dtype=jnp.float32)


def _blocks(
    static: _Static, heads: tuple[Head, ...], index: Int[Array, ""]
) -> tuple[tuple[Block, ...], Bool[Array, "1 V"] | None]:
    """Block ``index`` of every head, and which of its entries count."""
    blocks = tuple(block_of(head, index, static.size) for head in heads)
    return blocks, owned(blocks[0], static.size, heads[0].weight.shape[0])


def _indices(static: _Static, heads: tuple[Head, ...]) -> Int[Array, " blocks"]:
    return indices(heads[0].weight.shape[0], static.size)

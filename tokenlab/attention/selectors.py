"""Members of the prefill attention family: how blocks of keys are estimated."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from tokenlab.attention.prefill import PrefillAttention, blocked, last_scores, pooled
from tokenlab.core.arrays import Array, Float, Int, Segments

_NEVER = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowBlocks(PrefillAttention):
    """The nearest blocks, and the one of the first token: a window with a sink.

    Scores fall by one per block of distance, so a ``CountBudget`` of n is a window of n blocks
    before the span.

    Reference: Guangxuan Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
    2023, arXiv:2309.17453.

    Differences from the paper: whole blocks; positions are those of the text.

    Attributes:
        block: queries and keys in a block.
        span: tokens in a span, a multiple of ``block``.
        budget: how many blocks of earlier spans are looked at.
    """

    causal: ClassVar[bool] = True

    def scores(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        segments: Segments,
        order: Int[Array, "B H T"] | None,
        scale: float,
    ) -> Float[Array, "#B A Q N"]:
        """Minus the distance in blocks."""
        del k, segments, order, scale
        index = jnp.arange(-(-q.shape[1] // self.block))
        return (index[None, :] - index[:, None]).astype(jnp.float32)[None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanPooledBlocks(PrefillAttention):
    """Blocks by the product of their mean query and mean key: ``scale · mean(q) · mean(k)``.

    Reference: Lai, Lu, Yao, Zhu, Zhou, "FlexPrefill: A Context-Aware Sparse Attention Mechanism
    for Efficient Long-Sequence Inference", 2025, arXiv:2502.20766, its query-aware pattern.

    Differences from the paper: in every head, without the test that chooses between patterns.

    Attributes:
        block: queries and keys in a block.
        span: tokens in a span, a multiple of ``block``.
        budget: how many blocks of earlier spans are looked at.
    """

    causal: ClassVar[bool] = False

    def scores(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        segments: Segments,
        order: Int[Array, "B H T"] | None,
        scale: float,
    ) -> Float[Array, "#B A Q N"]:
        """Products of means over real tokens."""
        real = (segments > 0)[:, None]
        keys, real_keys = jnp.repeat(k.swapaxes(1, 2), q.shape[2] // k.shape[2], axis=1), real
        if order is not None:
            keys = jnp.take_along_axis(keys, order[..., None], axis=2)
            real_keys = jnp.take_along_axis(jnp.broadcast_to(real, order.shape), order, axis=2)
        queries = pooled(q.swapaxes(1, 2), real, self.block)
        return jnp.einsum("bhqe,bhne->bhqn", queries, pooled(keys, real_keys, self.block)) * scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class PermutedBlocks(MeanPooledBlocks):
    """Mean-pooled blocks of keys that are sorted by importance inside each span.

    The last ``block`` queries of a row give every key the mean of ``softmax(scale · q · k)``,
    taken over all complete spans. Each complete span is sorted by it, the highest first, so that
    heavy keys share blocks and the light ones are left out; what is behind the last complete span
    stays where it is. Attention does not depend on the order of its keys, and the queries keep
    theirs, so nothing is put back.

    Reference: Wang, Wang, Zhang, Tan, Zhou, Liu, Lian, Liu, Song, Qiu, "Sparser Block-Sparse
    Attention via Token Permutation", 2025, arXiv:2510.21270.

    Differences from the paper: means leave padding out, where the released code pools zeros into
    the last block; a threshold of 1 keeps all, where rounding could drop a whole row there.

    Attributes:
        block: queries and keys in a block.
        span: tokens in a span, a multiple of ``block``; the paper's segment.
        budget: how many blocks of earlier spans are looked at.
    """

    causal: ClassVar[bool] = False

    def key_order(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        segments: Segments,
        scale: float,
    ) -> Int[Array, "B H T"]:
        """Index of the key in each slot."""
        length = q.shape[1]
        lengths = jnp.sum(segments > 0, axis=1)
        scores, index = last_scores(q, k, segments, count=self.block, scale=scale)
        complete = jnp.arange(length)[None] < (lengths // self.span * self.span)[:, None]
        seen = jnp.where(complete[:, None, None], scores, _NEVER)
        # The softmax, with its division left to the sum over queries.
        weights = jnp.exp(seen - jnp.max(seen, axis=-1, keepdims=True))
        share = jnp.where((index >= 0)[:, None], 1.0 / jnp.sum(weights, axis=-1), 0.0)
        importance = jnp.einsum("bhct,bhc->bht", weights, share)
        importance = jnp.where(complete[:, None], importance, 0.0)
        # Equal keys keep their order, so what is not complete is not moved.
        inside = jnp.argsort(-blocked(importance, self.span, 2), axis=-1, stable=True)
        order = inside + jnp.arange(inside.shape[2])[None, None, :, None] * self.span
        return order.reshape(*order.shape[:2], -1)[..., :length]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash(PrefillAttention):
    """Blocks by what the last queries give to their column and to their diagonal.

    With ``P`` the attention of the last ``block`` queries, a block of keys has the mass
    ``Σ P[q, t]`` of its own tokens plus that of all pairs as far apart as it is from the block
    of queries.

    Reference: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via
    Dynamic Sparse Attention", 2024, arXiv:2407.02490, its vertical-slash pattern.

    Differences from the paper: lines are as wide as a block, and one budget is spent on the sum
    of both, where the paper takes a number of single columns and one of diagonals; every head
    has this pattern.

    Attributes:
        block: queries and keys in a block.
        span: tokens in a span, a multiple of ``block``.
        budget: how many blocks of earlier spans are looked at.
    """

    causal: ClassVar[bool] = False

    def scores(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        segments: Segments,
        order: Int[Array, "B H T"] | None,
        scale: float,
    ) -> Float[Array, "#B A Q N"]:
        """Logarithm of the mass of columns and diagonals."""
        del order
        scores, index = last_scores(q, k, segments, count=self.block, scale=scale)
        number = jnp.arange(q.shape[1])
        behind = index[:, :, None] - number[None, None]  # of the key, and as an index of distance
        visible = (behind >= 0)[:, None]
        weights = jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, _NEVER)), 0.0)
        column = jnp.sum(weights, axis=2)
        far = jnp.maximum(behind, 0)[:, None]
        by_distance = jnp.take_along_axis(weights, jnp.broadcast_to(far, weights.shape), axis=3)
        diagonal = jnp.sum(jnp.where(visible, by_distance, 0.0), axis=2)
        columns, diagonals = (
            jnp.sum(blocked(x, self.block, 2), axis=3) for x in (column, diagonal)
        )
        blocks = jnp.arange(columns.shape[2])
        apart = jnp.maximum(blocks[:, None] - blocks[None, :], 0)
        mass = columns[:, :, None] + diagonals[:, :, apart]
        return jnp.log(jnp.maximum(mass, jnp.finfo(jnp.float32).tiny))

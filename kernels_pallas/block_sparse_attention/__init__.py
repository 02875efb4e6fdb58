"""Attention that computes only the blocks a mask rule, or a list at run time, can show."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention import blocks as block_lists
from kernels_pallas.block_sparse_attention import gpu, ref, tpu, xla
from kernels_pallas.block_sparse_attention.masks import (
    Bidirectional,
    Branching,
    Causal,
    IndexRule,
    MaskRule,
    RangeRule,
    SinkWindow,
    SlidingWindow,
    Strided,
    UnorderedRule,
)
from kernels_pallas.block_sparse_attention.specs import NOTHING, BlockSparseAttentionConfig
from kernels_pallas.common.dispatch import Operation

_OPERATION = Operation.of(
    "block_sparse_attention",
    ref=ref.block_sparse_attention,
    xla=xla.block_sparse_attention,
    tpu=tpu.block_sparse_attention,
    tpu_supports=tpu.supports,
    xla_supports=xla.supports,
    gpu=gpu.block_sparse_attention,
    gpu_supports=gpu.supports,
)


def block_sparse_attention(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    rule: MaskRule,
    scale: float,
    softcap: float | None = None,
    blocks: Int[Array, "B Q N"] | None = None,
    block_shape: tuple[int, int] = (128, 128),
    impl: Literal["ref", "xla", "tpu", "gpu"] | None = None,
    config: BlockSparseAttentionConfig | None = None,
) -> Float[Array, "B T H E"]:
    """Softmax attention under a mask rule.

    ``out[t] = Σ_s p[t, s] · v[s]`` with ``p[t] = softmax over visible s of
    cap(scale · q[t] · k[s])`` and ``cap(x) = softcap · tanh(x / softcap)``. A query that sees no
    key gives 0, with zero gradient.

    Differentiable (reverse mode) in ``q``, ``k`` and ``v``. Softmax is float32; matrix products
    take the dtype of the inputs and accumulate in float32.

    Args:
        q: queries ``[B, T, H, E]``.
        k: keys ``[B, S, K, E]``; ``H`` is a multiple of ``K``, and query heads ``h`` with the
            same ``h // (H / K)`` share a key head, which is not repeated in memory.
        v: values ``[B, S, K, E]``.
        q_positions: positions of the queries ``[B, T]``.
        kv_positions: positions of the keys ``[B, S]``.
        q_segments: segments of the queries ``[B, T]``; 0 is padding.
        kv_segments: segments of the keys ``[B, S]``.
        rule: who sees whom.
        scale: factor of the scores, usually ``E ** -0.5``.
        softcap: bound of the absolute scores.
        blocks: for each block of queries, the blocks of keys that it looks at, ``[B, Q, N]``, in
            any order and filled up with -1; the rule still decides token by token. Then nothing
            is asked of the order of keys. ``None`` takes the blocks from the rule.
        block_shape: queries and keys in a block of ``blocks``; the last ones may be ragged.
        impl: ``"ref"`` (all scores), ``"xla"`` (one pair of blocks at a time, only those
            that may see each other, scores recomputed in the backward pass), ``"tpu"`` and
            ``"gpu"`` (the same, as kernels; the latter for Hopper, in 16-bit floats), or ``None``
            for the best that can run. Where the rule skips blocks, all but ``"ref"`` need queries
            that are the keys, in the order that ``MaskRule.block_map`` describes; a batch row that
            breaks it gives NaN, never a wrong number, and is a case for ``blocks`` or ``"ref"``.
        config: block sizes; ``None`` derives them from the shapes.

    Returns:
        ``[B, T, H, E]`` in the dtype of ``q``.

    Raises:
        ValueError: ``impl`` cannot run, ``H`` is not a multiple of ``K``, or ``blocks`` has
            another number of rows than there are blocks of queries; the message has the reason.

    Reference: Tri Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
    Partitioning", 2023, arXiv:2307.08691.

    Differences from the paper: pairs of blocks are visited in any order in both passes, none
    that the rule cannot show; softcap, segments, windows and lists of blocks are additions.
    """
    return partial_attention(
        q=q,
        k=k,
        v=v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segments=q_segments,
        kv_segments=kv_segments,
        rule=rule,
        scale=scale,
        softcap=softcap,
        blocks=blocks,
        block_shape=block_shape,
        impl=impl,
        config=config,
    )[0]


def partial_attention(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B S K E"],
    v: Float[Array, "B S K E"],
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    rule: MaskRule,
    scale: float,
    softcap: float | None = None,
    blocks: Int[Array, "B Q N"] | None = None,
    block_shape: tuple[int, int] = (128, 128),
    impl: Literal["ref", "xla", "tpu", "gpu"] | None = None,
    config: BlockSparseAttentionConfig | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Attention over some of the keys, with what :func:`merge_partial` needs.

    ``log_sum_exp[t] = log Σ_s exp(cap(scale · q[t] · k[s]))`` over visible ``s``. Differentiable
    through both results.

    Args:
        q: this and all others are those of :func:`block_sparse_attention`.
        k: keys.
        v: values.
        q_positions: positions of the queries.
        kv_positions: positions of the keys.
        q_segments: segments of the queries.
        kv_segments: segments of the keys.
        rule: who sees whom.
        scale: factor of the scores.
        softcap: bound of the absolute scores.
        blocks: lists of blocks of keys.
        block_shape: sizes of those blocks.
        impl: implementation.
        config: block sizes.

    Returns:
        The result ``[B, T, H, E]`` and its log-sum-exp ``[B, T, H]`` in float32, which is -1e30
        for a query that sees no key.

    Raises:
        ValueError: as :func:`block_sparse_attention`.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    if blocks is not None and blocks.shape[1] != block_lists.count(q.shape[1], block_shape[0]):
        raise ValueError(
            f"blocks has {blocks.shape[1]} rows; {q.shape[1]} queries are"
            f" {block_lists.count(q.shape[1], block_shape[0])} blocks of {block_shape[0]}"
        )
    return _OPERATION(
        impl,
        q=q,
        k=k,
        v=v,
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segments=q_segments,
        kv_segments=kv_segments,
        rule=rule,
        scale=scale,
        softcap=softcap,
        blocks=blocks,
        block_shape=block_shape,
        config=config or BlockSparseAttentionConfig(),
    )


def merge_partial(
    outs: Float[Array, "N B T H E"], log_sum_exps: Float[Array, "N B T H"]
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Attention over all keys, from results over disjoint sets of them.

    ``out = Σ_n softmax_n(log_sum_exps)[n] · outs[n]``.

    Args:
        outs: results ``[N, B, T, H, E]`` of :func:`partial_attention`.
        log_sum_exps: their log-sum-exps ``[N, B, T, H]``.

    Returns:
        The result in the dtype of ``outs``, and its log-sum-exp.
    """
    weights = jax.nn.softmax(log_sum_exps, axis=0)[..., None]
    out = jnp.sum(weights * outs.astype(jnp.float32), axis=0)
    return out.astype(outs.dtype), jax.nn.logsumexp(log_sum_exps, axis=0)


__all__ = [
    "NOTHING",
    "Bidirectional",
    "BlockSparseAttentionConfig",
    "Branching",
    "Causal",
    "IndexRule",
    "MaskRule",
    "RangeRule",
    "SinkWindow",
    "SlidingWindow",
    "Strided",
    "UnorderedRule",
    "block_sparse_attention",
    "merge_partial",
    "partial_attention",
]

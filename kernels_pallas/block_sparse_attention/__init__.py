"""Attention that computes only the blocks a mask rule can show."""

from typing import Literal

from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention import ref, xla
from kernels_pallas.block_sparse_attention.masks import (
    Bidirectional,
    Causal,
    MaskRule,
    SlidingWindow,
)
from kernels_pallas.block_sparse_attention.specs import BlockSparseAttentionConfig
from kernels_pallas.common.dispatch import Implementation, Operation, anything

_REF = Implementation(name="ref", run=ref.block_sparse_attention, supports=anything)
_XLA = Implementation(name="xla", run=xla.block_sparse_attention, supports=xla.supports)
_OPERATION = Operation(name="block_sparse_attention", order={"cpu": (_XLA, _REF)})


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
    impl: Literal["ref", "xla"] | None = None,
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
        impl: ``"ref"`` (all scores), ``"xla"`` (one pair of blocks at a time, only those
            that may see each other, scores recomputed in the backward pass), or ``None`` for
            the best that can run. Where the rule skips blocks, ``"xla"`` needs queries that
            are the keys, in the order that ``MaskRule.block_map`` describes; a batch row that
            breaks it gives NaN, never a wrong number, and is a case for ``"ref"``.
        config: block sizes; ``None`` derives them from the shapes.

    Returns:
        ``[B, T, H, E]`` in the dtype of ``q``.

    Raises:
        ValueError: ``impl`` cannot run, or ``H`` is not a multiple of ``K``; the message has the
            reason.

    Reference: Tri Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
    Partitioning", 2023, arXiv:2307.08691.

    Differences from the paper: pairs of blocks are visited in any order in both passes, none
    that the rule cannot show; softcap, segments and windows are additions.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
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
        config=config or BlockSparseAttentionConfig(),
    )


__all__ = [
    "Bidirectional",
    "BlockSparseAttentionConfig",
    "Causal",
    "MaskRule",
    "SlidingWindow",
    "block_sparse_attention",
]

"""Attention of a few queries over a long cache, all of it or what is selected; and what to select.

One row of a cache is ``S`` slots in order. They lie in one piece, ``k[b, head, slot]``, or in
pages of a pool that a table puts in order. Everything else speaks of slots: positions, segments,
lengths, selections. A slot may hold any token, so a ring is a cache whose positions wrap around.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_sparse_attention import NOTHING, Causal, MaskRule, merge_partial
from kernels_pallas.common.dispatch import Operation
from kernels_pallas.decode_attention import ref, tpu, xla
from kernels_pallas.decode_attention.specs import DecodeAttentionConfig

_ATTENTION = Operation.of(
    "decode_attention",
    ref=ref.decode_attention,
    xla=xla.decode_attention,
    tpu=tpu.decode_attention,
    tpu_supports=tpu.supports,
)
_SCORES = Operation.of(
    "token_scores",
    ref=ref.token_scores,
    xla=xla.token_scores,
    tpu=tpu.token_scores,
    tpu_supports=tpu.supports_scores,
)


def decode_attention(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    v: Float[Array, "P K Y E"],
    q_positions: Int[Array, "B T"],
    scale: float,
    q_segments: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    pages: Int[Array, "B N"] | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    selected: Int[Array, "B L M"] | None = None,
    unit: int = 1,
    rule: MaskRule | None = None,
    softcap: float | None = None,
    impl: Literal["ref", "xla", "tpu"] | None = None,
    config: DecodeAttentionConfig | None = None,
) -> Float[Array, "B T H E"]:
    """Softmax attention of a few queries over the slots of a cache.

    ``out[t] = Σ_s p[t, s] · v[s]`` with ``p[t] = softmax over seen s of cap(scale · q[t] · k[s])``
    and ``cap(x) = softcap · tanh(x / softcap)``. A slot is seen if it is below the length, in a
    page, at a position of at least 0, in a segment other than 0, selected, and shown by the rule
    and the mask. What unseen slots hold, NaN included, changes nothing. A query that sees nothing
    gives 0.

    Softmax is float32; matrix products take the dtype of the inputs and accumulate in float32.
    ``"ref"`` and ``"xla"`` are differentiable (reverse mode) in ``q``, ``k`` and ``v``;
    ``"tpu"`` is forward only and raises when it is differentiated.

    Args:
        q: queries ``[B, T, H, E]``; causal among each other by their positions.
        k: keys ``[B, K, S, E]``, or with ``pages`` a pool of them ``[P, K, Y, E]``; ``H`` is a
            multiple of ``K``, and query heads ``h`` with the same ``h // (H / K)`` share a key
            head, which is not repeated in memory.
        v: values, likewise.
        q_positions: positions of the queries ``[B, T]``.
        scale: factor of the scores, usually ``E ** -0.5``.
        q_segments: segments of the queries ``[B, T]``, 0 for padding; ``None`` is 1.
        kv_positions: positions of the slots ``[B, S]``, below 0 for an empty one; ``None`` is
            the number of the slot.
        kv_segments: segments of the slots ``[B, S]``, 0 for an empty one; ``None`` is 1.
        lengths: filled slots of each row ``[B]``, the first ones; ``None`` is all.
        pages: for each row its pages in order ``[B, N]``, -1 (or what is no page) for none; then
            ``S = N · Y``. Rows may share pages.
        mask: what the rule shows and yet is not seen is false here, ``[B, T, S]``: the branches
            of a tree of drafts.
        selected: units of slots to read ``[B, K, M]``, or ``[B, 1, M]`` for all heads alike, in
            any order. Unit ``u`` is the slots from ``u · unit`` to before ``(u + 1) · unit``. -1
            and whatever is no unit are passed over; a repeated unit counts once.
        unit: slots of a selected unit: 1 for tokens, ``Y`` for pages.
        rule: who sees whom; ``None`` is causal.
        softcap: bound of the absolute scores.
        impl: ``"ref"`` (all scores), ``"xla"`` (blocks of slots, those that nobody sees passed
            over), ``"tpu"`` (the same as a kernel that copies from HBM only units of which
            something is seen; see :mod:`kernels_pallas.decode_attention.tpu` for the bytes), or
            ``None`` for the best that can run.
        config: block sizes; ``None`` derives them from the shapes.

    Returns:
        ``[B, T, H, E]`` in the dtype of ``q``.

    Raises:
        ValueError: ``impl`` cannot run, or shapes contradict each other; the message has the
            reason.
        NotImplementedError: ``impl="tpu"`` is differentiated.

    Reference: Tri Dao, Daniel Haziza, Francisco Massa, Grigory Sizov, "Flash-Decoding for
    long-context inference", 2023 (splitting over keys); Woosuk Kwon et al., "Efficient Memory
    Management for Large Language Model Serving with PagedAttention", 2023, arXiv:2309.06180
    (pages).

    Differences from the papers: explicit positions and segments, softcap, and selections of
    tokens or pages, for all heads or each.
    """
    return partial_decode_attention(
        q=q,
        k=k,
        v=v,
        q_positions=q_positions,
        scale=scale,
        q_segments=q_segments,
        kv_positions=kv_positions,
        kv_segments=kv_segments,
        lengths=lengths,
        pages=pages,
        mask=mask,
        selected=selected,
        unit=unit,
        rule=rule,
        softcap=softcap,
        impl=impl,
        config=config,
    )[0]


def partial_decode_attention(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    v: Float[Array, "P K Y E"],
    q_positions: Int[Array, "B T"],
    scale: float,
    q_segments: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    pages: Int[Array, "B N"] | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    selected: Int[Array, "B L M"] | None = None,
    unit: int = 1,
    rule: MaskRule | None = None,
    softcap: float | None = None,
    impl: Literal["ref", "xla", "tpu"] | None = None,
    config: DecodeAttentionConfig | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Attention over some of the keys, with what :func:`merge_partial` needs.

    ``log_sum_exp[t] = log Σ_s exp(cap(scale · q[t] · k[s]))`` over seen ``s``.

    Args:
        q: this and all others are those of :func:`decode_attention`.
        k: keys.
        v: values.
        q_positions: positions of the queries.
        scale: factor of the scores.
        q_segments: segments of the queries.
        kv_positions: positions of the slots.
        kv_segments: segments of the slots.
        lengths: filled slots.
        pages: page table.
        mask: what else is not seen.
        selected: units to read.
        unit: slots of a unit.
        rule: who sees whom.
        softcap: bound of the absolute scores.
        impl: implementation.
        config: block sizes.

    Returns:
        The result ``[B, T, H, E]`` and its log-sum-exp ``[B, T, H]`` in float32, which is -1e30
        for a query that sees nothing.

    Raises:
        ValueError: as :func:`decode_attention`.
        NotImplementedError: likewise.
    """
    if v.shape != k.shape:
        raise ValueError(f"values {v.shape} and keys {k.shape} differ in shape")
    if selected is not None and selected.shape[1] not in (1, k.shape[1]):
        raise ValueError(
            f"selected has {selected.shape[1]} lists a row; give 1, or {k.shape[1]} as key heads"
        )
    if unit < 1:
        raise ValueError(f"unit is {unit}; a selected unit has at least 1 slot")
    return _ATTENTION(
        impl,
        q=q,
        k=k,
        v=v,
        shown=_shown(
            q, k, q_positions, q_segments, kv_positions, kv_segments, lengths, pages, mask, rule
        ),
        pages=_pages(k, pages),
        selected=None if selected is None else selected.astype(jnp.int32),
        unit=unit,
        scale=scale,
        softcap=softcap,
        config=config or DecodeAttentionConfig(),
    )


def token_scores(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    q_positions: Int[Array, "B T"],
    scale: float,
    q_segments: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    pages: Int[Array, "B N"] | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    rule: MaskRule | None = None,
    softcap: float | None = None,
    per_head: bool = False,
    impl: Literal["ref", "xla", "tpu"] | None = None,
    config: DecodeAttentionConfig | None = None,
) -> Float[Array, "B S"] | Float[Array, "B K S"]:
    """Soft votes of the query heads for the slots: what ``jax.lax.top_k`` selects by.

    ``vote[s] = Σ_h Σ_t softmax over seen s of cap(scale · q[t, h] · k[s])``. A head has one vote,
    however large its scores are. Softmax and sums are float32. A slot that no query sees has
    -1e30, below every vote, so that ``top_k`` takes it only after all that are seen.

    Slots that are no candidates (a sink, a recent window) are left out by ``kv_segments`` of 0.
    The keys may also be those of clusters or pages. Differentiability is that of
    :func:`decode_attention`.

    Args:
        q: probes ``[B, T, H, E]``; TokenSelect averages a chunk's queries to one.
        k: this and the others up to ``pages`` are those of :func:`decode_attention`.
        q_positions: positions of the probes.
        scale: factor of the scores: ``E ** -0.5``, or 1 as in TokenSelect's released kernel.
        q_segments: segments of the probes.
        kv_positions: positions of the slots.
        kv_segments: segments of the slots.
        lengths: filled slots.
        pages: page table.
        mask: what else is not seen.
        rule: who sees whom; ``None`` is causal.
        softcap: bound of the absolute scores.
        per_head: votes for each key/value head, of its own query heads, not of all together.
        impl: implementation.
        config: block sizes.

    Returns:
        Votes ``[B, S]``, or ``[B, K, S]`` if ``per_head``, in float32.

    Raises:
        ValueError: as :func:`decode_attention`.
        NotImplementedError: likewise.

    Reference: Wei Wu et al., "TokenSelect: Efficient Long-Context Inference and Length
    Extrapolation for LLMs via Dynamic Token-Level KV Cache Selection", 2024, arXiv:2411.02886
    (soft vote).

    Differences from the paper: softmax is float32; ``scale`` is free; query heads vote with the
    key head of their group, ``h // (H / K)``.
    """
    votes = _SCORES(
        impl,
        q=q,
        k=k,
        shown=_shown(
            q, k, q_positions, q_segments, kv_positions, kv_segments, lengths, pages, mask, rule
        ),
        pages=_pages(k, pages),
        scale=scale,
        softcap=softcap,
        config=config or DecodeAttentionConfig(),
    )
    # Not a sum of -1e30.
    return votes if per_head else jnp.maximum(jnp.sum(votes, axis=1), NOTHING)


def _shown(
    q: Float[Array, "B T H E"],
    k: Float[Array, "P K Y E"],
    q_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B T"] | None,
    kv_positions: Int[Array, "B S"] | None,
    kv_segments: Int[Array, "B S"] | None,
    lengths: Int[Array, " B"] | None,
    pages: Int[Array, "B N"] | None,
    mask: Bool[Array, "B T S"] | None,
    rule: MaskRule | None,
) -> Bool[Array, "B T S"]:
    """What each query sees, selections aside: small beside the keys, as queries are few."""
    batch, page = q.shape[0], k.shape[2]
    if q.shape[2] % k.shape[1]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[1]} key heads")
    if pages is None and k.shape[0] != batch:
        raise ValueError(f"{k.shape[0]} rows of keys for {batch} rows of queries; or give pages")
    slots = page if pages is None else pages.shape[1] * page
    for name, given in (("kv_positions", kv_positions), ("kv_segments", kv_segments)):
        if given is not None and given.shape != (batch, slots):
            raise ValueError(f"{name} is {given.shape} for {batch} rows of {slots} slots")
    if mask is not None and mask.shape != (*q_positions.shape, slots):
        raise ValueError(f"mask is {mask.shape} for {q_positions.shape} queries, {slots} slots")
    number = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None], (batch, slots))
    positions = number if kv_positions is None else kv_positions
    segments = jnp.ones_like(number) if kv_segments is None else kv_segments
    own = jnp.ones_like(q_positions) if q_segments is None else q_segments
    filled = (positions >= 0) & (segments != 0)
    if lengths is not None:
        filled &= number < lengths[:, None]
    if pages is not None:
        filled &= jnp.repeat((pages >= 0) & (pages < k.shape[0]), page, axis=1)
    sees = (rule or Causal())(
        q_positions[:, :, None], positions[:, None], own[:, :, None], segments[:, None]
    )
    sees &= filled[:, None]
    return sees if mask is None else sees & mask


def _pages(k: Float[Array, "P K Y E"], pages: Int[Array, "B N"] | None) -> Int[Array, "B N"] | None:
    """-1 for what is no page."""
    if pages is None:
        return None
    return jnp.where(pages < k.shape[0], pages, -1).astype(jnp.int32)


__all__ = [
    "NOTHING",
    "DecodeAttentionConfig",
    "decode_attention",
    "merge_partial",
    "partial_decode_attention",
    "token_scores",
]

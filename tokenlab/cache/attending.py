"""Attention of the tokens of one pass: over older ones, and over each other."""

from __future__ import annotations

import functools
from typing import Literal

import jax.numpy as jnp

from kernels_pallas.block_sparse_attention import MaskRule, partial_attention
from kernels_pallas.decode_attention import merge_partial, partial_decode_attention
from tokenlab.cache.base import CacheView, Entries, Heads
from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.per_device import per_device

Impl = Literal["ref", "xla", "tpu", "gpu"]
Partial = tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]

_HEADS, _ROWS = ("batch", None, "heads", None), ("batch", None)
_POOL = ("batch", "heads", None, None)
_AXES = (
    {name: _HEADS for name in ("q", "k", "v")}
    | {name: _ROWS for name in ("q_positions", "kv_positions", "q_segments", "kv_segments")}
    | {"mask": ("batch", None, None), "selected": ("batch", None, None), "pages": _ROWS}
)


def merged(parts: list[Partial]) -> Float[Array, "B T H E"]:
    """One softmax over all parts."""
    if len(parts) == 1:
        return parts[0][0]
    outs, log_sum_exps = (jnp.stack(part) for part in zip(*parts, strict=True))
    return merge_partial(outs, log_sum_exps)[0]


def over_each_other(
    new: Entries,
    seen: Bool[Array, "B T T"] | None,
    heads: Heads,
    rule: MaskRule,
    impl: Impl | None,
    asks: Bool[Array, "B T"] | None,
) -> tuple[Partial, Float[Array, " B"]]:
    """The tokens of a pass over themselves, and the pairs."""
    valid = (new.segments > 0).astype(jnp.int32)
    asking = valid if asks is None else valid * asks
    if new.q.shape[1] == 1:
        return _over_itself(new, heads), asking[:, 0].astype(jnp.float32)
    where = {"q_positions": new.positions, "q_segments": valid}
    if seen is None:
        attend = functools.partial(
            partial_attention, rule=rule, scale=heads.scale, softcap=heads.softcap, impl=impl
        )
        part = per_device(
            attend, axes=_AXES, out=(_HEADS, _HEADS[:3]), q=new.q, k=new.k, v=new.v, **where,
            kv_positions=new.positions, kv_segments=valid,
        )  # fmt: skip
        mask = _admitted(rule, new.positions, asking, new.positions, valid)
        return part, jnp.sum(mask, axis=(1, 2), dtype=jnp.float32)
    view = CacheView(new.q, new.k.swapaxes(1, 2), new.v.swapaxes(1, 2), new.positions, valid)
    return over_view(view, new._replace(segments=asking), heads, rule, impl, mask=seen)


def _over_itself(new: Entries, heads: Heads) -> Partial:
    """One token of each row: its value, and its score as the log-sum-exp."""
    groups = heads.num_heads // heads.num_kv_heads
    k, v = (jnp.repeat(x, groups, axis=2) for x in (new.k, new.v))
    score = heads.scale * jnp.sum(new.q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1)
    if heads.softcap is not None:
        score = heads.softcap * jnp.tanh(score / heads.softcap)
    return v.astype(new.q.dtype), score


def over_view(
    view: CacheView,
    new: Entries,
    heads: Heads,
    rule: MaskRule,
    impl: Impl | None,
    mask: Bool[Array, "B T S"] | None = None,
) -> tuple[Partial, Float[Array, " B"]]:
    """The tokens of a pass over older ones, and the pairs, a mean over key heads."""
    q_segments = (new.segments > 0).astype(jnp.int32)
    if view.positions.ndim == 3:
        return _by_heads(view, new, q_segments, heads, rule, impl)
    arrays = {
        "q": view.q, "k": view.k, "v": view.v, "q_positions": new.positions,
        "kv_positions": view.positions, "q_segments": q_segments, "kv_segments": view.segments,
        "pages": view.pages, "selected": view.selected, "mask": mask,
    }  # fmt: skip
    shown = _admitted(rule, new.positions, q_segments, view.positions, view.segments)
    if mask is not None:
        shown &= mask
    attend = functools.partial(
        partial_decode_attention, rule=rule, scale=heads.scale, softcap=heads.softcap,
        impl=None if impl == "gpu" else impl,
    )  # fmt: skip
    pool = _POOL if view.pages is None else (None, *_POOL[1:])
    part = per_device(
        attend,
        axes=_AXES | {"k": pool, "v": pool},
        out=(_HEADS, _HEADS[:3]),
        **{name: array for name, array in arrays.items() if array is not None},
    )
    return part, _count(shown, view.selected)


def _count(shown: Bool[Array, "B T S"], selected: Int[Array, "B L M"] | None) -> Float[Array, " B"]:
    """Pairs of a row: what is shown, of what is selected where something is."""
    if selected is None:
        return jnp.sum(shown, axis=(1, 2), dtype=jnp.float32)
    readers = jnp.sum(shown, axis=1, dtype=jnp.float32)[:, None]
    readers = jnp.broadcast_to(readers, (*selected.shape[:2], shown.shape[2]))
    read = jnp.take_along_axis(readers, jnp.maximum(selected, 0), axis=2)
    return jnp.mean(jnp.sum(jnp.where(selected >= 0, read, 0), axis=2), axis=1)


def _admitted(
    rule: MaskRule,
    q_positions: Int[Array, "B T"],
    q_segments: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    kv_segments: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    return rule(
        q_positions[:, :, None], kv_positions[:, None], q_segments[:, :, None], kv_segments[:, None]
    )


def _by_heads(
    view: CacheView,
    new: Entries,
    q_segments: Int[Array, "B T"],
    heads: Heads,
    rule: MaskRule,
    impl: Impl | None,
) -> tuple[Partial, Float[Array, " B"]]:
    """Key heads with entries of their own, as rows of their own."""
    batch, length = q_segments.shape
    count, groups = heads.num_kv_heads, heads.num_heads // heads.num_kv_heads

    def rows(x: Array) -> Array:
        return x.reshape(batch * count, *x.shape[2:])

    def queries(x: Array) -> Array:
        return rows(jnp.repeat(x[:, None], count, axis=1))

    q = view.q.reshape(batch, length, count, groups, -1)
    q, k, v = rows(jnp.moveaxis(q, 2, 1)), rows(view.k)[:, None], rows(view.v)[:, None]
    if view.bias is not None:
        q, k, v = _with_bias(q, k, v, rows(view.bias)[:, None], heads)
    flat = CacheView(q, k, v, rows(view.positions), rows(view.segments))
    several = new._replace(positions=queries(new.positions), segments=queries(q_segments))
    (out, log_sum_exp), pairs = over_view(flat, several, heads, rule, impl)

    def whole(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(batch, count, length, groups, *x.shape[3:]), 1, 2)
        return x.reshape(batch, length, count * groups, *x.shape[4:])

    part = whole(out[..., : view.v.shape[-1]]), whole(log_sum_exp)
    return part, jnp.mean(pairs.reshape(batch, count), axis=1)


def _with_bias(
    q: Float[Array, "B T G E"],
    k: Float[Array, "B 1 S E"],
    v: Float[Array, "B 1 S E"],
    bias: Float[Array, "B 1 S"],
    heads: Heads,
) -> tuple[Float[Array, "B T G F"], Float[Array, "B 1 S F"], Float[Array, "B 1 S F"]]:
    """``scale · (q · k) + bias`` as a product with one more column."""
    if heads.softcap is not None:
        raise ValueError("scores with a soft-cap take no bias")
    one = jnp.full((*q.shape[:-1], 1), 1 / heads.scale)
    q = jnp.concatenate([q.astype(jnp.float32), one], axis=-1)
    k = jnp.concatenate([k.astype(jnp.float32), bias[..., None]], axis=-1)
    v = jnp.concatenate([v.astype(jnp.float32), jnp.zeros_like(bias)[..., None]], axis=-1)
    return q, k, v

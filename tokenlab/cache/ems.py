"""Caches of a fixed size per head: evict, merge, or both."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_sparse_attention import Causal
from kernels_pallas.decode_attention import NOTHING
from tokenlab.cache.base import CachePolicy, CacheView, Entries, Heads, Reading, Room
from tokenlab.cache.choosing import compacted, mask_of
from tokenlab.cache.clusters import directions
from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.attention_mass import attention_mass, attention_rows
from tokenlab.core.errors import UserError


class Kept(flax.struct.PyTreeNode):
    """Entries of each head and the attention that they got.

    Attributes:
        k: keys.
        v: values.
        positions: position of each entry, -1 where there is none.
        mass: attention from all queries so far, a mean over the query heads of a key head.
        rows: attention from each of the newest queries, oldest first.
        row_positions: positions of those queries, -1 where there is none.
        counts: tokens that each entry stands for.
        dropped: tokens that no entry stands for.
    """

    k: Float[Array, "B K S E"]
    v: Float[Array, "B K S E"]
    positions: Int[Array, "B K S"]
    mass: Float[Array, "B K S"]
    rows: Float[Array, "B K L S"]
    row_positions: Int[Array, "B L"]
    counts: Float[Array, "B K S"]
    dropped: Float[Array, "B K"]

    def take(self, places: Int[Array, "B K M"]) -> Kept:
        """The entries in these slots; -1 is an empty one."""
        there, at = places >= 0, jnp.maximum(places, 0)

        def taken(x: Array) -> Array:
            return jnp.take_along_axis(x, at, axis=2) * there

        return self.replace(
            k=jnp.take_along_axis(self.k, at[..., None], axis=2),
            v=jnp.take_along_axis(self.v, at[..., None], axis=2),
            positions=jnp.where(there, jnp.take_along_axis(self.positions, at, axis=2), -1),
            mass=taken(self.mass),
            rows=jnp.take_along_axis(self.rows, at[:, :, None], axis=3) * there[:, :, None],
            counts=taken(self.counts),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMS(CachePolicy):
    """Keeps a fixed number of entries per key head: evicts, and merges what is redundant.

    With ``A[i, j]`` the attention of query i to entry j, ``global[j] = Σ_i A[i, j]`` and
    ``local[j] = Σ over the last `window` queries``, an entry's score is
    ``s = max(global · mean(local) / mean(global), local)``. When a head holds more than ``budget``
    entries, the newest ``window`` tokens stay, and so do the best others, ``budget - slack`` in
    all, which become centres of classes. Of the rest, by s, those inside the leading share
    ``relevant`` of its mass join the centre with the highest
    ``max(cos(k, k'), 0) · max(cos(v, v'), 0)``, if that is at least ``redundant``; all others join
    class 0, which is thrown away. A class becomes one entry at its centre's position: the key's
    direction is the mean of its members' directions, its length that of their lengths, the value
    that of their values, each weighted by s; scores add up.

    Nothing is merged with ``redundant=2``, which leaves eviction. With ``score="global"`` that is
    H2O, with ``score="local"`` SnapKV (at every compression).

    Reference: Yingxin Li, Ye Li, Yuan Meng, Xinzhu Ma, Zihan Geng, Shutao Xia, Zhi Wang, "EMS:
    Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local
    Importance", 2024, arXiv:2412.08521. Zhenyu Zhang et al., "H2O: Heavy-Hitter Oracle for
    Efficient Generative Inference of Large Language Models", 2023, arXiv:2306.14048. Yuhong Li et
    al., "SnapKV: LLM Knows What You are Looking for Before Generation", 2024, arXiv:2404.14469.

    Differences from the paper: no code is public, so ``window``, ``pooling``, ``relevant``,
    ``redundant``, ``slack``, the mean over grouped query heads and what is carried from one
    compression to the next are reconstructions. The cosines are cut off at 0, for the product of
    two negative ones says nothing of redundancy. Keys are merged as they are after rotation.

    Attributes:
        budget: most entries of a key head between two passes.
        window: newest tokens, always kept whole, whose queries make the local score.
        slack: entries fewer than the budget that a compression leaves.
        relevant: share of the mass of what is not kept that may be merged.
        redundant: least similarity to be merged.
        pooling: width, odd, of a maximum of s over neighbours; 1 is none.
        score: what s is made of.
        log_count_bias: whether an entry that stands for n tokens has log n added to its scores; the
            paper has not.
    """

    budget: int = 288
    window: int = 32
    slack: int = 32
    relevant: float = 0.98
    redundant: float = 0.6
    pooling: int = 7
    score: Literal["both", "global", "local"] = "both"
    log_count_bias: bool = False

    def __post_init__(self) -> None:
        if self.window < 1 or self.slack < 0 or self.budget <= self.window + self.slack:
            raise UserError(
                f"EMS has a budget of {self.budget} entries for a window of {self.window} and a "
                f"slack of {self.slack}; give more than their sum"
            )
        if self.pooling < 1 or self.pooling % 2 == 0:
            raise UserError(f"EMS.pooling is {self.pooling}; a width is odd, 1 for none")

    def init(self, room: Room, heads: Heads) -> Kept:
        """Empty slots.

        Raises:
            UserError: a bias is asked for where scores have a soft-cap.
        """
        if self.log_count_bias and heads.softcap is not None:
            raise UserError(
                "EMS.log_count_bias needs scores without a soft-cap; turn one of both off"
            )
        shape = (room.batch, heads.num_kv_heads, min(self.budget, room.capacity))
        zero = jnp.zeros(shape, jnp.float32)
        return Kept(
            k=jnp.zeros((*shape, heads.width), room.dtype),
            v=jnp.zeros((*shape, heads.width), room.dtype),
            positions=jnp.full(shape, -1, jnp.int32),
            mass=zero,
            rows=jnp.zeros((*shape[:2], self.window, shape[2]), jnp.float32),
            row_positions=jnp.full((room.batch, self.window), -1, jnp.int32),
            counts=zero,
            dropped=zero[..., 0],
        )

    def read(self, state: Kept, new: Entries, *, heads: Heads) -> Reading:
        """Every entry of a head, with the bias where it is on."""
        filled = (state.positions >= 0).astype(jnp.int32)
        view = CacheView(new.q, state.k, state.v, state.positions, filled, bias=self._bias(state))
        return Reading((view,), None, state)

    def _bias(self, state: Kept) -> Float[Array, "B K S"] | None:
        return jnp.log(jnp.maximum(state.counts, 1)) if self.log_count_bias else None

    def append(self, state: Kept, new: Entries, *, heads: Heads) -> Kept:
        """Adds entries and the attention that they give; compresses rows that exceed the budget."""
        slots = state.positions.shape[2]
        joined = self._with_attention(_joined(state, new), new, heads)
        if slots < self.budget:  # a slot for every token of the longest row
            return joined.take(compacted(joined.positions >= 0, slots))
        over = jnp.max(jnp.sum(joined.positions >= 0, axis=2), axis=1) > slots

        def compressed() -> Kept:
            full = joined.take(compacted(joined.positions >= 0, joined.positions.shape[2]))
            return jax.tree.map(
                lambda a, b: jnp.where(over.reshape(-1, *[1] * (a.ndim - 1)), a, b),
                self._compressed(full), full,
            )  # fmt: skip

        joined = jax.lax.cond(jnp.any(over), compressed, lambda: joined)
        return joined.take(compacted(joined.positions >= 0, slots))

    def _with_attention(self, joined: Kept, new: Entries, heads: Heads) -> Kept:
        valid = (new.segments > 0).astype(jnp.int32)
        count = jnp.sum(valid, axis=1)
        shared: dict[str, Any] = {
            "k": joined.k, "kv_positions": joined.positions,
            "kv_segments": (joined.positions >= 0).astype(jnp.int32), "rule": Causal(),
            "scale": heads.scale, "softcap": heads.softcap, "bias": self._bias(joined),
        }  # fmt: skip
        mass = attention_mass(q=new.q, q_positions=new.positions, q_segments=valid, **shared)
        recent = min(self.window, new.positions.shape[1])
        ours = jnp.minimum(count, recent)
        at = jnp.clip((count - ours)[:, None] + jnp.arange(recent)[None], 0, valid.shape[1] - 1)
        there = jnp.arange(recent)[None] < ours[:, None]
        positions = jnp.where(there, jnp.take_along_axis(new.positions, at, axis=1), -1)
        rows = attention_rows(
            q=jnp.take_along_axis(new.q, at[..., None, None], axis=1),
            q_positions=positions, q_segments=there.astype(jnp.int32), **shared,
        )  # fmt: skip
        # The newest rows: those that were there, less as many as come.
        last = ours[:, None] + jnp.arange(self.window)[None]
        rows = jnp.concatenate([joined.rows, jnp.mean(rows, axis=2)], axis=2)
        positions = jnp.concatenate([joined.row_positions, positions], axis=1)
        return joined.replace(
            mass=joined.mass + jnp.mean(mass, axis=2),
            rows=jnp.take_along_axis(rows, last[:, None, :, None], axis=2),
            row_positions=jnp.take_along_axis(positions, last, axis=1),
        )

    def scores(self, state: Kept) -> Float[Array, "B K S"]:
        """``s`` of each entry; 0 where there is none."""
        valid = state.positions >= 0
        whole, near = state.mass, jnp.sum(state.rows, axis=2)
        totals = [jnp.sum(x, axis=2, keepdims=True) for x in (whole, near)]
        aligned = whole * totals[1] / jnp.where(totals[0] > 0, totals[0], 1.0)
        scores = {"both": jnp.maximum(aligned, near), "global": whole, "local": near}[self.score]
        scores = jnp.where(valid, scores, 0.0)
        if self.pooling == 1:
            return scores
        width = (1, 1, self.pooling)
        pooled = jax.lax.reduce_window(scores, 0.0, jax.lax.max, width, (1, 1, 1), "SAME")
        return jnp.where(valid, pooled, 0.0)

    def _compressed(self, full: Kept) -> Kept:
        """``budget - slack`` entries of each head; the others are empty."""
        valid, scores = full.positions >= 0, self.scores(full)
        newest = jnp.max(full.positions, axis=(1, 2), keepdims=True)
        others = valid & (full.positions <= newest - self.window)
        count = min(self.budget - self.slack - self.window, valid.shape[2])
        best, centres = jax.lax.top_k(jnp.where(others, scores, NOTHING), count)
        chosen = jnp.where(best > NOTHING / 10, centres, -1)
        rest = others & ~mask_of(chosen, valid.shape[2])
        similarity, of = _redundancy(full, chosen)
        joins = rest & _leading(scores, rest, self.relevant) & (similarity >= self.redundant)
        merged = _merged(full, jnp.where(joins, of, count), chosen, scores)
        lost = jnp.sum(jnp.where(rest & ~joins, full.counts, 0.0), axis=2)
        return merged.replace(
            positions=jnp.where(rest, -1, full.positions), dropped=full.dropped + lost
        )

    def truncate(self, state: Kept, lengths: Int[Array, " B"]) -> Kept:
        """Without later entries and queries; what these gave and what merged is not undone."""
        kept = state.positions < lengths[:, None, None]
        rows = (state.row_positions < lengths[:, None])[:, None, :, None]
        return state.replace(
            positions=jnp.where(kept, state.positions, -1),
            counts=jnp.where(kept, state.counts, 0.0),
            rows=jnp.where(rows & kept[:, :, None], state.rows, 0.0),
            mass=jnp.where(kept, state.mass, 0.0),
        )

    def held(self, state: Kept) -> Float[Array, " B"]:
        """At most ``budget``."""
        return jnp.mean(jnp.sum(state.positions >= 0, axis=2, dtype=jnp.float32), axis=1)

    def counters(self, state: Kept) -> dict[str, Float[Array, " B"]]:
        """Tokens that nothing stands for any more, and those that were merged; means over heads."""
        merged = jnp.sum(jnp.maximum(state.counts - 1, 0), axis=2)
        return {
            "cache_tokens_dropped": jnp.mean(state.dropped, axis=1),
            "cache_tokens_merged": jnp.mean(merged, axis=1),
        }


def _joined(state: Kept, new: Entries) -> Kept:
    """With the new entries behind the old ones."""
    heads, length = state.k.shape[1], new.positions.shape[1]
    valid = jnp.broadcast_to((new.segments > 0)[:, None], (len(new.k), heads, length))
    positions = jnp.where(valid, new.positions[:, None], -1)
    pad = ((0, 0), (0, 0), (0, length))
    k, v = (
        jnp.concatenate([old, x.swapaxes(1, 2).astype(old.dtype)], axis=2)
        for old, x in ((state.k, new.k), (state.v, new.v))
    )
    return state.replace(
        k=k,
        v=v,
        positions=jnp.concatenate([state.positions, positions], axis=2),
        mass=jnp.pad(state.mass, pad),
        rows=jnp.pad(state.rows, ((0, 0), *pad)),
        counts=jnp.concatenate([state.counts, valid.astype(jnp.float32)], axis=2),
    )


def _leading(
    scores: Float[Array, "B K S"], among: Bool[Array, "B K S"], share: float
) -> Bool[Array, "B K S"]:
    """Those that by descending score begin within the leading ``share`` of the mass."""
    mass = jnp.where(among, scores, 0.0)
    ordered = -jnp.sort(-mass, axis=2)
    before = jnp.cumsum(ordered, axis=2) - ordered
    inside = before < share * jnp.sum(mass, axis=2, keepdims=True)
    # Equal scores are inside together.
    least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=2, keepdims=True)
    return among & (mass >= least)


def _redundancy(
    full: Kept, centres: Int[Array, "B K C"]
) -> tuple[Float[Array, "B K S"], Int[Array, "B K S"]]:
    """The highest similarity of each entry to a centre, and that centre's number."""

    def cosines(x: Array) -> Array:
        x = directions(x)[0]
        y = jnp.take_along_axis(x, jnp.maximum(centres, 0)[..., None], axis=2)
        products = jnp.einsum("bkse,bkce->bksc", x, y, precision=jax.lax.Precision.HIGHEST)
        return jnp.maximum(products, 0.0)

    both = jnp.where((centres >= 0)[:, :, None], cosines(full.k) * cosines(full.v), -1.0)
    return jnp.max(both, axis=3), jnp.argmax(both, axis=3).astype(jnp.int32)


def _merged(
    full: Kept,
    of: Int[Array, "B K S"],
    centres: Int[Array, "B K C"],
    scores: Float[Array, "B K S"],
) -> Kept:
    """Classes summed into their centres; ``of = C`` is the class that is thrown away."""
    count = centres.shape[2]
    b, h = jnp.arange(len(of))[:, None, None], jnp.arange(of.shape[1])[None, :, None]
    own = jnp.where(centres < 0, of.shape[2], centres)
    of = of.at[b, h, own].set(jnp.arange(count, dtype=jnp.int32)[None, None], mode="drop")
    weight = jnp.maximum(scores, 1e-20)[..., None]
    direction, norm = directions(full.k)
    parts = {
        "weight": weight,
        "direction": weight * direction,
        "norm": weight * norm,
        "value": weight * full.v.astype(jnp.float32),
        "members": jnp.ones_like(weight),
        "mass": full.mass[..., None],
        "counts": full.counts[..., None],
        "rows": jnp.moveaxis(full.rows, 2, 3),
    }
    classes = (of[..., None] == jnp.arange(count)[None, None, None]).astype(jnp.float32)
    joined = jnp.concatenate(list(parts.values()), axis=-1)
    sums = jnp.einsum("bksc,bksf->bkcf", classes, joined, precision=jax.lax.Precision.HIGHEST)
    # Every member sees its class; only centres keep what they see.
    at = jnp.clip(of, 0, count - 1)[..., None]
    ends = np.cumsum([x.shape[-1] for x in parts.values()])[:-1]
    total = dict(
        zip(parts, jnp.split(jnp.take_along_axis(sums, at, axis=2), ends, -1), strict=True)
    )
    share = jnp.maximum(total["weight"], 1e-20)
    is_centre = mask_of(centres, of.shape[2])[..., None]
    # A class of one is left as it is, to the bit.
    grown = is_centre & (total["members"] > 1)
    key = directions(total["direction"])[0] * total["norm"] / share
    return full.replace(
        k=jnp.where(grown, key.astype(full.k.dtype), full.k),
        v=jnp.where(grown, (total["value"] / share).astype(full.v.dtype), full.v),
        mass=jnp.where(grown, total["mass"], parts["mass"])[..., 0],
        counts=jnp.where(grown, total["counts"], parts["counts"])[..., 0],
        rows=jnp.moveaxis(jnp.where(grown, total["rows"], parts["rows"]), 3, 2),
    )

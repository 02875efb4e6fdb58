"""Caches of every layout as `decode_attention` takes them, and the attention over them in loops.

Rows: a full one, a ragged one, an empty one. Whatever no query sees is NaN, in the pool too.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels_pallas.block_sparse_attention import NOTHING, Causal, SlidingWindow

BATCH = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of a call and what loops say of it, in float64."""

    arrays: dict[str, Any]
    options: dict[str, Any]
    out: np.ndarray
    log_sum_exp: np.ndarray
    votes: np.ndarray
    seen: np.ndarray

    @property
    def for_scores(self) -> dict[str, Any]:
        """Arguments of `token_scores`."""
        both = self.arrays | self.options
        return {key: x for key, x in both.items() if key not in ("v", "selected", "unit")}


def case(
    layout="contiguous",
    *,
    dtype="float32",
    queries=1,
    heads=4,
    kv_heads=2,
    width=8,
    slots=48,
    page=16,
    lists=None,
    unit=1,
    count=11,
    softcap=None,
    window=None,
    tree=False,
    seed=0,
):
    """Layouts: contiguous, ring, segments, paged. Lists: None, "shared", "heads"."""
    rng = np.random.default_rng(seed)
    filled = np.array([slots, max(1, slots * 2 // 3 - 1), 0])
    if layout == "ring":
        filled[0] = slots + slots // 3
    q_positions = np.maximum(filled[:, None] - queries, 0) + np.arange(queries)[None]
    arrays, positions, held = _laid_out(rng, layout, filled, slots, page, queries)
    segments = arrays.get("kv_segments", np.ones_like(positions))
    q_segments = arrays.get("q_segments", np.ones_like(q_positions))
    pages = arrays.get("pages")
    ahead = q_positions[:, :, None] - positions[:, None]
    shown = held[:, None] & (ahead >= 0) & (ahead < (window or np.inf))
    shown &= (q_segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    if tree:
        arrays["mask"] = rng.random(shown.shape) < 0.7
        shown &= arrays["mask"]
    seen = np.repeat(shown[:, None], kv_heads, axis=1)
    if lists is not None:
        arrays["selected"] = _selected(
            rng, 1 if lists == "shared" else kv_heads, slots, unit, count
        )
        seen = seen & _chosen(arrays["selected"], slots, unit)[:, :, None]
    q, k, v, rows = _vectors(rng, dtype, queries, heads, kv_heads, width, slots, page, pages, seen)
    scale = width**-0.5
    found = _loops(q, *rows, seen, scale, softcap)
    rule = Causal() if window is None else SlidingWindow(size=window)
    whole = {key: jnp.asarray(x, jnp.int32) for key, x in arrays.items() if key != "mask"}
    if tree:
        whole["mask"] = jnp.asarray(arrays["mask"])
    whole |= {"q": q, "k": k, "v": v, "q_positions": jnp.asarray(q_positions, jnp.int32)}
    options = {"scale": scale, "softcap": softcap, "rule": rule, "unit": unit}
    votes = _votes(q, rows[0], np.repeat(shown[:, None], kv_heads, axis=1), scale, softcap)
    return Case(
        arrays=whole, options=options, out=found[0], log_sum_exp=found[1], votes=votes, seen=seen
    )


def _laid_out(rng, layout, filled, slots, page, queries):
    """Arguments that say what lies where; positions of the slots; those that hold something."""
    number = np.broadcast_to(np.arange(slots), (BATCH, slots))
    held = number < filled[:, None]
    if layout == "ring":
        last = filled[:, None] - 1 - (filled[:, None] - 1 - number) % slots
        positions = np.where((last >= 0) & (filled[:, None] > 0), last, -1)
        return {"kv_positions": positions}, positions, positions >= 0
    arrays = {"lengths": filled}
    if layout == "segments":
        segments = rng.integers(0, 3, number.shape)
        arrays |= {"kv_segments": segments, "q_segments": rng.integers(0, 3, (BATCH, queries))}
        held &= segments > 0
    if layout == "paged":
        pages = rng.permutation(BATCH * slots // page + 2)[: BATCH * slots // page]
        pages = pages.reshape(BATCH, -1)
        pages[0, 1:2] = -1
        pages[np.arange(pages.shape[1])[None] * page >= filled[:, None]] = -1
        held &= np.repeat(pages >= 0, page, axis=1)
        arrays["pages"] = pages
    return arrays, number, held


def _selected(rng, lists, slots, unit, count):
    """Any order, holes, repetition and what is no unit; one list is empty."""
    units = slots // unit
    selected = np.full((BATCH, lists, count + 3), -1)
    for row in selected.reshape(-1, count + 3)[:-1]:
        some = rng.permutation(units)[:count]
        row[: len(some)] = some
        row[-3:] = some[0], units + 7, -5
        rng.shuffle(row)
    return selected


def _chosen(selected, slots, unit):
    """`[B, L, S]`."""
    chosen = np.zeros((*selected.shape[:2], slots), bool)
    for b, head, i in np.ndindex(selected.shape):
        if 0 <= selected[b, head, i] < slots // unit:
            start = selected[b, head, i] * unit
            chosen[b, head, start : start + unit] = True
    return chosen


def _vectors(rng, dtype, queries, heads, kv_heads, width, slots, page, pages, seen):
    """Queries; keys and values as they are given, NaN where unseen; and by rows, for loops."""
    q = jnp.asarray(rng.normal(size=(BATCH, queries, heads, width)), dtype)
    rows = [
        np.array(jnp.asarray(rng.normal(size=(BATCH, kv_heads, slots, width)), dtype), np.float64)
        for _ in "kv"
    ]
    pools = []
    for row in rows:
        dark = np.where(seen.any(axis=2)[..., None], row, np.nan)
        if pages is None:
            pools.append(jnp.asarray(dark, dtype))
            continue
        pool = np.full((BATCH * slots // page + 2, kv_heads, page, width), np.nan)
        for b, n in np.ndindex(pages.shape):
            if pages[b, n] >= 0:
                pool[pages[b, n]] = dark[b, :, n * page : (n + 1) * page]
        pools.append(jnp.asarray(pool, dtype))
    return q, *pools, rows


def _scores(q, k, b, t, h, keys, scale, softcap):
    products = k[b, h * k.shape[1] // q.shape[2], keys] @ np.asarray(q, np.float64)[b, t, h] * scale
    return products if softcap is None else softcap * np.tanh(products / softcap)


def _loops(q, k, v, seen, scale, softcap):
    out, log_sum_exp = np.zeros(q.shape), np.full(q.shape[:3], NOTHING)
    for b, t, h in np.ndindex(q.shape[:3]):
        head = h * k.shape[1] // q.shape[2]
        keys = np.flatnonzero(seen[b, head, t])
        if len(keys):
            scores = _scores(q, k, b, t, h, keys, scale, softcap)
            log_sum_exp[b, t, h] = np.log(np.sum(np.exp(scores)))
            out[b, t, h] = np.exp(scores - log_sum_exp[b, t, h]) @ v[b, head, keys]
    return out, log_sum_exp


def _votes(q, k, shown, scale, softcap):
    votes = np.where(shown.any(axis=2), 0.0, NOTHING)
    for b, t, h in np.ndindex(q.shape[:3]):
        head = h * k.shape[1] // q.shape[2]
        keys = np.flatnonzero(shown[b, head, t])
        if len(keys):
            weights = np.exp(_scores(q, k, b, t, h, keys, scale, softcap))
            votes[b, head, keys] += weights / weights.sum()
    return votes


# One of each thing that can differ.
CASES = {
    "contiguous": {"softcap": 0.7},
    "one-head-each": {"kv_heads": 4},
    "four-heads-each": {"kv_heads": 1, "queries": 3},
    "ring": {"layout": "ring", "queries": 2},
    "ring-window": {"layout": "ring", "window": 20, "queries": 2},
    "segments": {"layout": "segments", "queries": 3},
    "paged": {"layout": "paged", "softcap": 0.7},
    "paged-tree": {"layout": "paged", "queries": 4, "tree": True, "page": 8},
    "tokens": {"lists": "heads", "queries": 2},
    "shared-tokens": {"lists": "shared", "layout": "paged"},
    "ring-tokens": {"lists": "heads", "layout": "ring"},
    "pages": {"lists": "heads", "layout": "paged", "unit": 16, "count": 2},
    "parts-of-pages": {"lists": "shared", "layout": "paged", "unit": 8, "count": 3},
    "units-of-a-row": {"lists": "heads", "unit": 8, "count": 4, "queries": 2},
}

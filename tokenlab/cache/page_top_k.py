"""Retrieval of pages by a bound of their scores: what finer retrieval is compared with."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention import NOTHING
from tokenlab.cache.base import Entries, Heads, Reading, Room
from tokenlab.cache.choosing import best
from tokenlab.cache.retrieval import Reads, Retrieval, Store
from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.errors import UserError


class Pages(flax.struct.PyTreeNode):
    """Tokens, and the range of the keys of each page.

    Attributes:
        store: all tokens.
        reads: what was chosen.
        low: least key of a page, by column.
        high: greatest.
    """

    store: Store
    reads: Reads
    low: Float[Array, "B K N E"]
    high: Float[Array, "B K N E"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageTopK(Retrieval):
    """Reads the pages whose keys may score highest.

    ``bound[h, n] = Σ_e max(q[h, e] · low[n, e], q[h, e] · high[n, e])`` is at least every score of
    page n. A key head takes the pages with the highest mean, over its query heads and the tokens of
    the pass, of ``softmax_n(scale · bound)``. Rows that the budget covers are read whole.

    Reference: Jiaming Tang, Yilong Zhao, Kan Zhu, Guangxuan Xiao, Baris Kasikci, Song Han, "Quest:
    Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024, arXiv:2406.10774.

    Differences from the paper: with grouped queries, heads that share keys choose together; sinks
    and a window of tokens are always read, which with 0 and 1 page come close to the paper's.

    Attributes:
        budget: earlier tokens that a query reads in a layer: sinks, window and whole pages.
        page: tokens of a page.
        sinks: first tokens, always read.
        window: newest tokens, always read.
    """

    budget: int = 1024
    page: int = 16
    sinks: int = 0
    window: int = 64

    def __post_init__(self) -> None:
        rest = self.budget - self.sinks - self.window
        if min(self.sinks, self.window) < 0 or self.page < 1 or rest < 1 or rest % self.page:
            raise UserError(
                f"PageTopK has a budget of {self.budget} tokens for {self.sinks} sinks, a window "
                f"of {self.window} and pages of {self.page}; leave a multiple of the page, not 0"
            )

    def init(self, room: Room, heads: Heads) -> Pages:
        """An empty cache."""
        shape = (room.batch, heads.num_kv_heads, -(-room.capacity // self.page), heads.width)
        return Pages(
            store=Store.empty(room, heads, keys_away=self.offload, values_away=self.offload),
            reads=Reads.none(room, heads.num_kv_heads),
            low=jnp.full(shape, jnp.inf, room.dtype),
            high=jnp.full(shape, -jnp.inf, room.dtype),
        )

    def read(self, state: Pages, new: Entries, *, heads: Heads) -> Reading:
        """Sinks, chosen pages and window."""
        store, most = state.store, self.budget - self.sinks - self.window
        number = jnp.arange(store.positions.shape[1])[None]
        always = (number < self.sinks) | (number >= (store.lengths - self.window)[:, None])
        always &= store.filled
        candidates = store.filled & ~always
        covered = jnp.sum(candidates, axis=1) <= most
        there = jnp.any(new.segments > 0, axis=1) & ~covered
        chosen = self._chosen(state, new, candidates, heads)
        state = state.replace(reads=state.reads.then(chosen, there=there, anew=there))
        chosen = jnp.where(covered[:, None, None], candidates[:, None], chosen)
        view = store.view(new.q, always[:, None] | chosen, most=self.budget)
        return Reading((view,), None, state)

    def _chosen(
        self, state: Pages, new: Entries, candidates: Bool[Array, "B S"], heads: Heads
    ) -> Bool[Array, "B K S"]:
        slots = candidates.shape[1]
        missing = -slots % self.page
        pages = jnp.pad(candidates, ((0, 0), (0, missing)))
        pages = jnp.any(pages.reshape(len(pages), -1, self.page), axis=2)[:, None]
        bounds = page_bounds(new.q, state.low, state.high)
        bounds = jnp.where(pages[:, None, :, None], heads.scale * bounds, NOTHING)
        votes = jnp.where((new.segments > 0)[..., None, None, None], jax.nn.softmax(bounds), 0)
        votes = jnp.where(pages, jnp.sum(votes, axis=(1, 3)), NOTHING)
        count = (self.budget - self.sinks - self.window) // self.page
        taken = jnp.repeat(best(votes, count, most=count), self.page, axis=2)[..., :slots]
        return taken & candidates[:, None]

    def append(self, state: Pages, new: Entries, *, heads: Heads) -> Pages:
        """Writes tokens and widens the ranges of their pages."""
        return self._widened(state.replace(store=state.store.write(new)), new.k, new.positions,
            new.segments > 0)  # fmt: skip

    def _widened(
        self,
        state: Pages,
        keys: Float[Array, "B T K E"],
        positions: Int[Array, "B T"],
        real: Bool[Array, "B T"],
    ) -> Pages:
        count = state.low.shape[2]
        page = jnp.where(real, positions // self.page, count)[:, None]
        b, k = jnp.arange(len(page))[:, None, None], jnp.arange(keys.shape[2])[None, :, None]
        keys = keys.swapaxes(1, 2).astype(state.low.dtype)
        return state.replace(
            low=state.low.at[b, k, page].min(keys, mode="drop"),
            high=state.high.at[b, k, page].max(keys, mode="drop"),
        )

    def truncate(self, state: Pages, lengths: Int[Array, " B"]) -> Pages:
        """Exact: the ranges are those of the tokens that are left."""
        store = state.store.before(lengths)
        empty = state.replace(
            store=store,
            reads=state.reads.before(lengths),
            low=jnp.full_like(state.low, jnp.inf),
            high=jnp.full_like(state.high, -jnp.inf),
        )
        keys = store.keys_here().swapaxes(1, 2)
        return self._widened(empty, keys, store.positions, store.filled)


def page_bounds(
    q: Float[Array, "B T H E"], low: Float[Array, "B K N E"], high: Float[Array, "B K N E"]
) -> Float[Array, "B T K G N"]:
    """Upper bounds of ``q · k`` over the keys of each page; 0 for an empty one."""
    batch, length, _, width = q.shape
    q = q.astype(jnp.float32).reshape(batch, length, low.shape[1], -1, width)
    low, high = (jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32) for x in (low, high))
    upper, lower = (
        jnp.einsum("btkge,bkne->btkgn", part, x, precision=jax.lax.Precision.HIGHEST)
        for part, x in ((jnp.maximum(q, 0), high), (jnp.minimum(q, 0), low))
    )
    return upper + lower

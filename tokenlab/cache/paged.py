"""Pages of one pool, shared by all rows and copied when written."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp

from tokenlab.cache.base import CachePolicy, CacheView, Entries, Heads, Reading, Room, zeros_behind
from tokenlab.cache.full import written as in_slots
from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.errors import UserError


class Pool(flax.struct.PyTreeNode):
    """Pages, and the rows' tables of them. Slot i of a row is for its position i.

    Attributes:
        k: keys of all pages.
        v: values.
        table: pages of each row in order, -1 where it has none.
        positions: position of the entry in each slot of a row, -1 where it has none.
        dropped: tokens of each row for which there was no page.
    """

    k: Float[Array, "P K Y E"]
    v: Float[Array, "P K Y E"]
    table: Int[Array, "B N"]
    positions: Int[Array, "B S"]
    dropped: Float[Array, " B"]

    @property
    def references(self) -> Int[Array, " P"]:
        """How many rows have each page in their table; 0 is a free page."""
        return _counted(self.table, len(self.k))


class _Wanted(NamedTuple):
    """Pages that rows have in hand, ``[B, M]``: what is there, and what they need.

    Attributes:
        pages: what the table has, -1 for none.
        touched: those that are written to.
        anew: those that need a free page.
        free: the free page that each of these gets, -1 where none is left.
    """

    pages: Int[Array, "B M"]
    touched: Bool[Array, "B M"]
    anew: Bool[Array, "B M"]
    free: Int[Array, "B M"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache(CachePolicy):
    """Keeps every token, in pages that rows take from one pool as they grow.

    A fork copies tables only; a page that several rows have is copied by those that write to it,
    but for the last of them. Truncation and insertion give pages back. Where the pool runs out, the
    tokens for which there is no page are left out, later rows first, and the row goes on without
    them: it attends to what it has, other rows are as if it were not there, and
    ``cache_tokens_dropped`` counts them (``Generation.statistics``).

    Reference: Woosuk Kwon, Zhuohan Li, Siyuan Zhuang, Ying Sheng, Lianmin Zheng, Cody Hao Yu,
    Joseph E. Gonzalez, Hao Zhang, Ion Stoica, "Efficient Memory Management for Large Language Model
    Serving with PagedAttention", 2023, arXiv:2309.06180.

    Differences from the paper: every layer has a pool and tables of its own; nothing is swapped out
    or computed again.

    Attributes:
        page: tokens of a page.
        pages: pages of the pool; None is as many as all rows need at their longest.
    """

    page: int = 16
    pages: int | None = None

    def __post_init__(self) -> None:
        if self.page < 1 or (self.pages is not None and self.pages < 1):
            raise UserError(
                f"PagedCache has pages of {self.page} tokens and a pool of {self.pages}; "
                "use 1 or more of both"
            )

    def init(self, room: Room, heads: Heads) -> Pool:
        """A pool of free pages.

        Raises:
            UserError: the pool holds no longest row, or no page for every row.
        """
        longest = -(-room.capacity // self.page)
        pages = room.batch * longest if self.pages is None else self.pages
        if pages < max(longest, room.batch):
            raise UserError(
                f"PagedCache has a pool of {pages} pages of {self.page} tokens for {room.batch} "
                f"rows of up to {room.capacity}; one row alone takes {longest} pages, and each "
                "row at least 1"
            )
        shape = (pages, heads.num_kv_heads, self.page, heads.width)
        return Pool(
            k=jnp.zeros(shape, room.dtype),
            v=jnp.zeros(shape, room.dtype),
            table=jnp.full((room.batch, longest), -1, jnp.int32),
            positions=jnp.full((room.batch, longest * self.page), -1, jnp.int32),
            dropped=jnp.zeros(room.batch, jnp.float32),
        )

    def read(self, state: Pool, new: Entries, *, heads: Heads) -> Reading:
        """Every entry, through the table."""
        filled = (state.positions >= 0).astype(jnp.int32)
        view = CacheView(new.q, state.k, state.v, state.positions, filled, pages=state.table)
        return Reading((view,), None, state)

    def append(self, state: Pool, new: Entries, *, heads: Heads) -> Pool:
        """Takes pages as needed, copies shared ones, and writes."""
        real = (new.segments > 0) & (new.positions < state.positions.shape[1])
        number = jnp.where(real, new.positions // self.page, -1)
        length, count = number.shape[1], state.table.shape[1]
        first = jnp.min(jnp.where(real, number, count), axis=1)
        # Positions of a pass follow each other: more pages than these it cannot touch.
        most = min((length + self.page - 2) // self.page + 1, count)
        ids = first[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
        place = jnp.where(number < 0, -1, number - first[:, None])
        wanted = _wanted(state, ids, jnp.any(place[:, :, None] == jnp.arange(most)[None, None], 1))
        state, target = _provided(state, ids, wanted, behind=new.k)
        at = jnp.take_along_axis(target, jnp.clip(place, 0, most - 1), axis=1)
        written = real & (place >= 0) & (at >= 0)
        rows, pages = jnp.arange(len(at))[:, None], at.reshape(-1)
        slots = jnp.where(written, new.positions, state.positions.shape[1])
        within = jnp.where(written, new.positions % self.page, self.page).reshape(-1, 1)

        def with_new(pool: Array, entries: Array) -> Array:
            return in_slots(pool, entries.reshape(-1, 1, *entries.shape[2:]), within, pages)

        return state.replace(
            k=with_new(state.k, new.k),
            v=with_new(state.v, new.v),
            positions=state.positions.at[rows, slots].set(new.positions, mode="drop"),
            dropped=state.dropped + jnp.sum(real & ~written, axis=1),
        )

    def truncate(self, state: Pool, lengths: Int[Array, " B"]) -> Pool:
        """Exact; pages without an entry are free again."""
        begins = self.page * jnp.arange(state.table.shape[1])[None]
        return state.replace(
            table=jnp.where(begins < lengths[:, None], state.table, -1),
            positions=jnp.where(state.positions < lengths[:, None], state.positions, -1),
        )

    def held(self, state: Pool) -> Float[Array, " B"]:
        """The entries of a row."""
        return jnp.sum(state.positions >= 0, axis=1, dtype=jnp.float32)

    def fork(self, state: Pool, rows: Int[Array, " N"]) -> Pool:
        """Copies tables; pages are shared until they are written to."""
        return state.replace(
            table=state.table[rows], positions=state.positions[rows], dropped=state.dropped[rows]
        )

    def insert(self, state: Pool, rows: Int[Array, " N"], other: Pool) -> Pool:
        """Frees the pages of ``rows`` and copies those of the other pool into free ones."""
        state = state.replace(table=state.table.at[rows].set(-1))
        there = other.table >= 0
        free = _free(there, state.references)
        source = jnp.maximum(other.table, 0).reshape(-1)
        target = jnp.where(free < 0, len(state.k), free).reshape(-1)
        kept = jnp.repeat(free >= 0, self.page, axis=1)
        lost = jnp.sum((other.positions >= 0) & ~kept, axis=1)
        return Pool(
            k=state.k.at[target].set(other.k[source], mode="drop"),
            v=state.v.at[target].set(other.v[source], mode="drop"),
            table=state.table.at[rows].set(free),
            positions=state.positions.at[rows].set(jnp.where(kept, other.positions, -1)),
            dropped=state.dropped.at[rows].set(other.dropped + lost),
        )

    def counters(self, state: Pool) -> dict[str, Float[Array, " B"]]:
        """Tokens for which there was no page."""
        return {"cache_tokens_dropped": state.dropped}


def _counted(pages: Int[Array, "B M"], count: int) -> Int[Array, " P"]:
    """How often each page is named; -1 is none."""
    at = jnp.where(pages < 0, count, pages).reshape(-1)
    return jnp.zeros(count, jnp.int32).at[at].add(1, mode="drop")


def _free(wanted: Bool[Array, "B M"], references: Int[Array, " P"]) -> Int[Array, "B M"]:
    """A free page for each that is wanted, in order, while there are some; else -1."""
    free = jnp.argsort(references > 0, stable=True).astype(jnp.int32)
    rank = jnp.cumsum(wanted.reshape(-1)).reshape(wanted.shape) - 1
    there = wanted & (rank < jnp.sum(references == 0))
    return jnp.where(there, free[jnp.clip(rank, 0, len(free) - 1)], -1)


def _wanted(state: Pool, ids: Int[Array, "B M"], touched: Bool[Array, "B M"]) -> _Wanted:
    """What is written to, and which of it has to be a new page."""
    count = state.table.shape[1]
    pages = jnp.take_along_axis(state.table, jnp.minimum(ids, count - 1), axis=1)
    pages = jnp.where(ids < count, pages, -1)
    references = state.references
    # Of all that write to a page, the last need not copy it if nobody else has it.
    writers = jnp.where(touched & (pages >= 0), pages, len(references)).reshape(-1)
    order = jnp.argsort(writers, stable=True)
    ordered = writers[order]
    rank = jnp.arange(len(ordered)) - jnp.searchsorted(ordered, ordered)
    rank = rank[jnp.argsort(order)].reshape(pages.shape)
    shared = rank < references[jnp.maximum(pages, 0)] - 1
    anew = touched & ((pages < 0) | shared)
    return _Wanted(pages, touched, anew, _free(anew, references))


def _provided(
    state: Pool, ids: Int[Array, "B M"], wanted: _Wanted, *, behind: Float[Array, "B T K E"]
) -> tuple[Pool, Int[Array, "B M"]]:
    """With new pages in the tables and shared ones copied; and where to write, -1 for nowhere.

    Pages are copied when ``behind`` is known, and by then the pool has been read.
    """
    count, references = len(state.k), state.references
    pages, got = wanted.pages, wanted.free >= 0
    left = references - _counted(jnp.where(got, pages, -1), count)
    # A page that a row could not copy for want of room is nobody's to write to.
    alone = (pages >= 0) & (left[jnp.maximum(pages, 0)] == 1)
    target = jnp.where(got, wanted.free, jnp.where(~wanted.anew & alone, pages, -1))
    target = jnp.where(wanted.touched, target, -1)
    source = jnp.maximum(pages, 0).reshape(-1)
    copy = jnp.where(got & (pages >= 0), wanted.free, count).reshape(-1)
    nothing = zeros_behind(behind[0, 0, 0, 0]).astype(state.k.dtype)

    def copied(pool: Array) -> Array:
        flat = pool.reshape(count, -1)
        return flat.at[copy].set(flat[source] + nothing, mode="drop").reshape(pool.shape)

    rows = jnp.arange(len(ids))[:, None]
    at = jnp.where(got, ids, state.table.shape[1])
    state = state.replace(
        k=copied(state.k),
        v=copied(state.v),
        table=state.table.at[rows, at].set(wanted.free, mode="drop"),
    )
    return state, target

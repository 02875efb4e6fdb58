"""Retrieval at semantic boundaries, of clusters of the prompt and segments of what was written."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from tokenlab.cache.base import Entries, Heads, Reading, Room
from tokenlab.cache.clusters import spherical_k_means
from tokenlab.cache.retrieval import Reads, Retrieval, Store
from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.errors import UserError


class Units(flax.struct.PyTreeNode):
    """Tokens, and the units in which they are retrieved.

    Attributes:
        store: all tokens.
        reads: what was retrieved.
        of: unit of each token, -1 where there is none.
        starts: position at which the segment of a token began; its own, for a token of the prompt.
        sums: sum of the keys of each unit, float32.
        sizes: tokens of each unit.
        used: units in use.
        open: tokens of the segment that is being written, 0 where the next token begins one.
        last: query of the newest token, float32.
    """

    store: Store
    reads: Reads
    of: Int[Array, "B K S"]
    starts: Int[Array, "B S"]
    sums: Float[Array, "B K U E"]
    sizes: Float[Array, "B K U"]
    used: Int[Array, " B"]
    open: Int[Array, " B"]
    last: Float[Array, "B H E"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LouisKV(Retrieval):
    """Retrieves units of tokens, and only where the direction of the queries jumps.

    ``r[t] = mean_h cos(q[t - 1, h], q[t, h])``; a pass with ``r[t] < jump``, and the first one,
    retrieves anew, and every other reads what was read before. Units of a prompt are k-means
    clusters of a key head's keys, units of written text the segments between jumps. A unit's score
    is ``mean over the query heads of a key head of softmax_u(scale · q · centroid[u])``; units are
    taken in this order until the budget is full, the last of them in part. Sinks and the newest
    segments are always read, and attention over all of it is exact. Rows that the budget covers
    are read whole.

    Reference: Wenbo Wu, Qingyi Si, Xiurui Pan, Ye Wang, Jie Zhang, "LouisKV: Efficient KV Cache
    Retrieval for Long Input-Output Sequences", 2025, arXiv:2510.11292.

    Differences from the paper: no code is public, so the number of iterations, the cosine
    assignment, the bound of a segment, the softmax over units and the sizes of sinks and window are
    reconstructions. The newest tokens of a prompt are read too while the window has room. A pass of
    more than ``segment`` tokens is taken for a part of the prompt. Where the table of units is full
    (twice as many as the row has tokens over ``cluster``), the newest unit grows.

    Attributes:
        budget: earlier tokens that a query reads in a layer, sinks and window among them.
        sinks: first tokens, always read.
        window: newest tokens, always read, in whole segments.
        jump: similarity of two queries below which is a boundary; -1 retrieves once, more than 1
            at every pass.
        cluster: tokens of the prompt per cluster, on average.
        segment: most tokens of a segment.
        iterations: of k-means.
        centre_keys: whether clusters are those of keys less their mean.
        turned: whether ``r`` compares queries as they are after rotation.
    """

    budget: int = 1024
    sinks: int = 16
    window: int = 256
    jump: float = 0.7
    cluster: int = 16
    segment: int = 64
    iterations: int = 10
    centre_keys: bool = False
    turned: bool = False

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 0 or self.budget <= self.sinks + self.window:
            raise UserError(
                f"LouisKV has a budget of {self.budget} tokens for {self.sinks} sinks and a window "
                f"of {self.window}; give more than their sum"
            )
        if min(self.cluster, self.segment, self.iterations) < 1:
            raise UserError("LouisKV.cluster, .segment and .iterations must be at least 1")

    def init(self, room: Room, heads: Heads) -> Units:
        """An empty cache."""
        lists, rows = heads.num_kv_heads, room.batch
        units = 2 * -(-room.capacity // self.cluster)
        zero = jnp.zeros(rows, jnp.int32)
        return Units(
            store=Store.empty(room, heads, keys_away=self.offload, values_away=self.offload),
            reads=Reads.none(room, lists),
            of=jnp.full((rows, lists, room.capacity), -1, jnp.int32),
            starts=jnp.zeros((rows, room.capacity), jnp.int32),
            sums=jnp.zeros((rows, lists, units, heads.width), jnp.float32),
            sizes=jnp.zeros((rows, lists, units), jnp.float32),
            used=zero,
            open=zero,
            last=jnp.zeros((rows, heads.num_heads, heads.width), jnp.float32),
        )

    def read(self, state: Units, new: Entries, *, heads: Heads) -> Reading:
        """Sinks, retrieved units and the newest segments."""
        store, most = state.store, self.budget - self.sinks - self.window
        always = store.filled & self._always(state)
        candidates = store.filled & ~always
        covered = jnp.sum(candidates, axis=1) <= most
        there = jnp.any(new.segments > 0, axis=1) & ~covered
        jumps = jnp.any(self._similarity(state, new, heads) < self.jump, axis=1)
        anew = there & (jumps | (state.reads.selections == 0))
        chosen = jax.lax.cond(
            jnp.any(anew),
            lambda: _retrieved(state, new, candidates, most, heads),
            lambda: state.reads.chosen,
        )
        state = state.replace(reads=state.reads.then(chosen, there=there, anew=anew))
        taken = jnp.where(covered[:, None, None], candidates[:, None], state.reads.chosen)
        chosen = always[:, None] | (taken & candidates[:, None])
        return Reading((store.view(new.q, chosen, most=self.budget),), None, state)

    def _always(self, state: Units) -> Bool[Array, "B S"]:
        number = jnp.arange(state.starts.shape[1])[None]
        return (number < self.sinks) | (
            state.starts >= (state.store.lengths - self.window)[:, None]
        )

    def _similarity(self, state: Units, new: Entries, heads: Heads) -> Float[Array, "B T"]:
        """``r``; 1 for padding."""
        q = self._signal(new, heads)
        before = jnp.concatenate([state.last[:, None], q[:, :-1]], axis=1)
        norms = jnp.sqrt(jnp.sum(q * q, axis=-1) * jnp.sum(before * before, axis=-1))
        cosines = jnp.sum(q * before, axis=-1) / jnp.where(norms > 0, norms, 1.0)
        similarity = jnp.clip(jnp.mean(cosines, axis=-1), -1.0, 1.0)
        return jnp.where(new.segments > 0, similarity, 1.0)

    def _signal(self, new: Entries, heads: Heads) -> Float[Array, "B T H E"]:
        q = new.q if self.turned else heads.rotate(new.q, positions=-new.positions)
        return q.astype(jnp.float32)

    def append(self, state: Units, new: Entries, *, heads: Heads) -> Units:
        """Clusters a long pass; a short one goes on with the newest segment, or begins others."""
        length, units = new.positions.shape[1], state.sizes.shape[2]
        real = new.segments > 0
        if length > self.segment:
            count = -(-jnp.sum(real, axis=1, dtype=jnp.int32) // self.cluster)
            of = spherical_k_means(
                new.k.swapaxes(1, 2), valid=real, counts=count, most=-(-length // self.cluster),
                iterations=self.iterations, centred=self.centre_keys,
            ).of  # fmt: skip
            of = jnp.where(of < 0, -1, jnp.minimum(of + state.used[:, None, None], units - 1))
            used = jnp.minimum(state.used + count, units)
            starts, open_ = new.positions, jnp.where(count > 0, 0, state.open)
        else:
            similarity = self._similarity(state, new, heads)
            of, starts, used, open_ = _segmented(
                state, new, similarity < self.jump, self.segment, units
            )
            of = jnp.broadcast_to(of[:, None], (len(of), heads.num_kv_heads, length))
        count = jnp.sum(real, axis=1, dtype=jnp.int32)
        newest = jnp.maximum(count - 1, 0)[:, None, None, None]
        last = jnp.take_along_axis(self._signal(new, heads), newest, axis=1)[:, 0]
        rows = jnp.arange(len(of))[:, None]
        slots = jnp.where(real, new.positions, state.of.shape[2])
        state = state.replace(
            store=state.store.write(new),
            of=state.of.at[rows[..., None], jnp.arange(of.shape[1])[None, :, None], slots[:, None]]
            .set(of, mode="drop"),
            starts=state.starts.at[rows, slots].set(starts, mode="drop"),
            used=used,
            open=open_,
            last=jnp.where((count > 0)[:, None, None], last, state.last),
        )  # fmt: skip
        return _with_keys(state, of, new.k.swapaxes(1, 2))

    def truncate(self, state: Units, lengths: Int[Array, " B"]) -> Units:
        """Units lose the tokens that go; the next token begins a segment and retrieves."""
        cut = state.store.lengths > lengths
        number = jnp.arange(state.starts.shape[1])[None]
        kept = (number < lengths[:, None])[:, None]
        of = jnp.where(kept, state.of, -1)
        empty = state.replace(
            store=state.store.before(lengths),
            reads=state.reads.before(lengths),
            of=of,
            sums=jnp.zeros_like(state.sums),
            sizes=jnp.zeros_like(state.sizes),
        )
        again = _with_keys(empty, of, state.store.keys_here())

        def cut_or(after: Array, before: Array) -> Array:
            return jnp.where(cut.reshape(-1, *[1] * (after.ndim - 1)), after, before)

        return again.replace(
            sums=cut_or(again.sums, state.sums),
            sizes=cut_or(again.sizes, state.sizes),
            used=cut_or(jnp.max(of, axis=(1, 2)) + 1, state.used),
            open=cut_or(jnp.zeros_like(state.open), state.open),
            last=cut_or(jnp.zeros_like(state.last), state.last),
        )


def _retrieved(
    state: Units, new: Entries, candidates: Bool[Array, "B S"], most: int, heads: Heads
) -> Bool[Array, "B K S"]:
    """Tokens of the best units, ``most`` of each key head."""
    of = jnp.where(candidates[:, None] & (state.of >= 0), state.of, state.sizes.shape[2])
    b, k = jnp.arange(len(of))[:, None, None], jnp.arange(heads.num_kv_heads)[None, :, None]
    sizes = jnp.zeros(state.sizes.shape, jnp.int32).at[b, k, of].add(1, mode="drop")
    there = sizes > 0
    centroids = state.sums / jnp.maximum(state.sizes, 1)[..., None]
    batch, length = new.positions.shape
    q = new.q.astype(jnp.float32).reshape(batch, length, heads.num_kv_heads, -1, heads.width)
    scores = heads.scale * jnp.einsum(
        "btkge,bkue->btkgu", q, centroids, precision=jax.lax.Precision.HIGHEST
    )
    if heads.softcap is not None:
        scores = heads.softcap * jnp.tanh(scores / heads.softcap)
    scores = jnp.where(there[:, None, :, None], scores, -1e30)
    votes = jnp.where((new.segments > 0)[..., None, None, None], jax.nn.softmax(scores), 0)
    votes = jnp.where(there, jnp.sum(votes, axis=(1, 3)), -1.0)
    _, order = jax.lax.top_k(votes, votes.shape[-1])
    ordered = jnp.take_along_axis(sizes, order, axis=2)
    before = jnp.cumsum(ordered, axis=2) - ordered
    before = jnp.zeros_like(before).at[b, k, order].set(before)
    before, after = (
        jnp.take_along_axis(x, jnp.minimum(of, sizes.shape[2] - 1), axis=2)
        for x in (before, before + sizes)
    )
    inside = of < sizes.shape[2]
    # Of the one unit that does not fit, the first tokens are taken.
    parted = inside & (before < most) & (after > most)
    within = jnp.cumsum(parted, axis=2) - 1
    return inside & ((after <= most) | (parted & (before + within < most)))


def _segmented(
    state: Units, new: Entries, jumps: Bool[Array, "B T"], bound: int, units: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, " B"], Int[Array, " B"]]:
    """Unit and start of each token, units in use, and tokens of the newest segment."""

    def step(carry: tuple[Array, Array], token: tuple[Array, Array, Array]):
        (used, open_), (real, jump, position) = carry, token
        full = used >= units
        begins = real & ~full & ((open_ == 0) | (open_ >= bound) | jump)
        used = used + begins
        open_ = jnp.where(begins, 1, open_ + real)
        start = jnp.where(full, position, position - open_ + 1)
        return (used, open_), (jnp.where(real, used - 1, -1), start)

    tokens = (
        (new.segments > 0).swapaxes(0, 1), jumps.swapaxes(0, 1), new.positions.swapaxes(0, 1),
    )  # fmt: skip
    (used, open_), (of, starts) = jax.lax.scan(step, (state.used, state.open), tokens)
    return of.swapaxes(0, 1), starts.swapaxes(0, 1), used, open_


def _with_keys(state: Units, of: Int[Array, "B K T"], keys: Float[Array, "B K T E"]) -> Units:
    """Adds keys to the sums of their units."""
    b, k = jnp.arange(len(of))[:, None, None], jnp.arange(of.shape[1])[None, :, None]
    at = jnp.where(of < 0, state.sizes.shape[2], of)
    return state.replace(
        sums=state.sums.at[b, k, at].add(keys.astype(jnp.float32), mode="drop"),
        sizes=state.sizes.at[b, k, at].add(1.0, mode="drop"),
    )

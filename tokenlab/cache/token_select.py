"""Token-level selection by a soft vote of the heads."""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas.decode_attention import NOTHING, token_scores
from tokenlab.cache.base import CacheView, Entries, Heads, Reading, Room
from tokenlab.cache.choosing import best, compacted
from tokenlab.cache.retrieval import Reads, Retrieval, Store
from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.errors import UserError


class Selected(flax.struct.PyTreeNode):
    """Tokens with keys as they were before rotation.

    Attributes:
        store: all tokens.
        reads: what was chosen, by all heads alike.
        probe: the query by which it was chosen.
    """

    store: Store
    reads: Reads
    probe: Float[Array, "B H E"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSelect(Retrieval):
    """Reads the first tokens, the newest, and those that the heads vote for.

    With n tokens in the row, those of the pass among them, candidates are the slots from ``sinks``
    to before ``n - window``. The pass's queries, turned as at positions ``window, window + 1, ...``
    and averaged to one ``q``, meet unturned keys, so that all candidates are equally far away:
    ``vote[j] = Σ_h softmax_j(c · q[h] · k[j, h // g])``, and a head has one vote however large its
    scores. What is read is numbered from 0 in order and turned by that number, so that no distance
    exceeds ``budget``. Rows of up to ``budget`` tokens are read whole.

    A pass of one token whose ``q`` has a cosine of at least ``reuse`` with that of the last
    selection takes its tokens again; sinks and window are always those of now.

    With ``offload``, values lie in host memory; keys stay, as a vote reads all of them.

    Reference: Wei Wu, Zhuoshi Pan, Chao Wang, Liyi Chen, Yunchu Bai, Tianfu Wang, Kun Fu, Zheng
    Wang, Hui Xiong, "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for
    LLMs via Dynamic Token-Level KV Cache Selection", 2024, arXiv:2411.02886.

    Differences from the paper: softmax of the votes is float32; query head h votes with the key
    head of its group, ``h // g`` (the released kernel takes ``h % K``); a prompt that is read whole
    is read densely.

    Attributes:
        budget: tokens that a query reads in a layer: sinks, chosen ones and the window, which has
            the tokens of the pass in it.
        sinks: first tokens, always read.
        window: newest tokens, always read; a pass has at most so many.
        reuse: cosine from which a selection is taken again, or None for never.
        scale: ``"one"`` votes with c = 1 as released, ``"attention"`` with the scores' own factor.
        smooth: width, odd, of a maximum over neighbouring votes; 1 is none.
    """

    budget: int = 2688
    sinks: int = 128
    window: int = 512
    reuse: float | None = None
    scale: Literal["one", "attention"] = "one"
    smooth: int = 1

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1 or self.budget <= self.sinks + self.window:
            raise UserError(
                f"TokenSelect has a budget of {self.budget} tokens for {self.sinks} sinks and a "
                f"window of {self.window}; give more than their sum"
            )
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise UserError(f"TokenSelect.smooth is {self.smooth}; a width is odd, 1 for none")

    @property
    def rotated(self) -> bool:
        """Positions are given after selection."""
        return False

    def init(self, room: Room, heads: Heads) -> Selected:
        """An empty cache."""
        return Selected(
            store=Store.empty(room, heads, keys_away=False, values_away=self.offload),
            reads=Reads.none(room, lists=1),
            probe=jnp.zeros((room.batch, heads.num_heads, heads.width), jnp.float32),
        )

    def read(self, state: Selected, new: Entries, *, heads: Heads) -> Reading:
        """Sinks, chosen tokens and window, turned by their place among what is read.

        Raises:
            UserError: the pass is longer than the window.
        """
        length = new.positions.shape[1]
        if length > self.window:
            raise UserError(
                f"TokenSelect reads {length} tokens at once and its window is {self.window}; "
                "use a smaller prefill_chunk, or a larger window"
            )
        store, real = state.store, jnp.sum(new.segments > 0, axis=1, dtype=jnp.int32)
        until = store.lengths + real
        whole = until <= self.budget
        number = jnp.arange(store.positions.shape[1])[None]
        recent = store.filled & (number >= (until - self.window)[:, None])
        always = recent | (store.filled & (number < self.sinks))
        candidates = store.filled & ~always
        state = self._choose(state, new, real, candidates, there=(real > 0) & ~whole, heads=heads)
        chosen = always | (state.reads.chosen[:, 0] & candidates) | (store.filled & whole[:, None])
        return self._shown(state, new, chosen, whole, heads)

    def _choose(
        self,
        state: Selected,
        new: Entries,
        real: Int[Array, " B"],
        candidates: Bool[Array, "B S"],
        *,
        there: Bool[Array, " B"],
        heads: Heads,
    ) -> Selected:
        probe = self._probe(new, real, heads)
        votes = self.votes(probe, state.store.keys, candidates, heads)
        votes = jnp.where(candidates, _widened(votes, self.smooth), NOTHING)
        most = self.budget - self.sinks - self.window
        anew = there
        if self.reuse is not None and new.positions.shape[1] == 1:
            alike = _cosine(probe, state.probe) >= self.reuse
            anew &= ~(alike & (state.reads.selections > 0))
        chosen = best(votes, most, most=most)[:, None]
        return state.replace(
            reads=state.reads.then(chosen, there=there, anew=anew),
            probe=jnp.where(anew[:, None, None], probe, state.probe),
        )

    def votes(
        self,
        probe: Float[Array, "B H E"],
        keys: Float[Array, "B K S E"],
        candidates: Bool[Array, "B S"],
        heads: Heads,
    ) -> Float[Array, "B S"]:
        """By which candidates are selected; what others have is not read."""
        return token_scores(
            q=probe[:, None],
            k=keys,
            q_positions=jnp.full((len(probe), 1), keys.shape[2], jnp.int32),
            kv_segments=candidates.astype(jnp.int32),
            scale=1.0 if self.scale == "one" else heads.scale,
            softcap=None if self.scale == "one" else heads.softcap,
        )

    def _probe(self, new: Entries, real: Int[Array, " B"], heads: Heads) -> Float[Array, "B H E"]:
        at = self.window + jnp.arange(new.positions.shape[1], dtype=jnp.int32)
        q = heads.rotate(new.q, positions=jnp.broadcast_to(at[None], new.positions.shape))
        q = jnp.where((new.segments > 0)[..., None, None], q, 0).astype(jnp.float32)
        return jnp.sum(q, axis=1) / jnp.maximum(real, 1)[:, None, None]

    def _shown(
        self,
        state: Selected,
        new: Entries,
        chosen: Bool[Array, "B S"],
        whole: Bool[Array, " B"],
        heads: Heads,
    ) -> Reading:
        store = state.store
        places = compacted(chosen, min(self.budget, chosen.shape[1]))
        k, v = store.gather(places[:, None])
        there, rank = places >= 0, jnp.arange(places.shape[1], dtype=jnp.int32)[None]
        positions = jnp.take_along_axis(store.positions, jnp.maximum(places, 0), axis=1)
        place = jnp.where(whole[:, None], positions, rank)
        k = heads.rotate(k.swapaxes(1, 2), positions=place).swapaxes(1, 2)
        behind = jnp.sum(there, axis=1, dtype=jnp.int32)[:, None]
        own = behind + jnp.arange(new.positions.shape[1], dtype=jnp.int32)[None]
        own = jnp.where(whole[:, None], new.positions, own)
        q = heads.rotate(new.q, positions=own)
        view = CacheView(q, k, v, positions, there.astype(jnp.int32))
        return Reading((view,), own, state)

    def append(self, state: Selected, new: Entries, *, heads: Heads) -> Selected:
        """Writes keys as they are before rotation."""
        return state.replace(store=state.store.write(new))

    def truncate(self, state: Selected, lengths: Int[Array, " B"]) -> Selected:
        """Exact: everything before ``lengths`` is there."""
        return state.replace(store=state.store.before(lengths), reads=state.reads.before(lengths))


def _cosine(a: Float[Array, "B H E"], b: Float[Array, "B H E"]) -> Float[Array, " B"]:
    """Of both with their heads in a row."""
    norms = jnp.sqrt(jnp.sum(a * a, axis=(1, 2)) * jnp.sum(b * b, axis=(1, 2)))
    cosine = jnp.sum(a * b, axis=(1, 2)) / jnp.where(norms > 0, norms, 1.0)
    return jnp.clip(cosine, -1.0, 1.0)


def _widened(votes: Float[Array, "B S"], width: int) -> Float[Array, "B S"]:
    """The maximum over ``width`` neighbours."""
    if width == 1:
        return votes
    return jax.lax.reduce_window(votes, NOTHING, jax.lax.max, (1, width), (1, 1), "SAME")

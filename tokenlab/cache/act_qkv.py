"""Block retrieval by a query of the unusual tokens, and budgets by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_attention import SlidingWindow
from kernels_pallas.decode_attention import NOTHING
from tokenlab.cache.base import CacheView, Entries, Heads, Reading, Room
from tokenlab.cache.choosing import best
from tokenlab.cache.probes import Moments, layer_budgets, probe_weights
from tokenlab.cache.retrieval import Reads, Retrieval, Store
from tokenlab.core.arrays import Array, Bool, Float, Int
from tokenlab.core.attention_mass import attention_mass
from tokenlab.core.errors import UserError

_REPRESENTATIVES, _QUESTION = 4, 4


class Blocks(flax.struct.PyTreeNode):
    """Tokens, and the blocks that have left the window.

    Attributes:
        store: all tokens, keys as they were before rotation.
        reads: what was retrieved.
        mass: attention that each token got from later ones within the window, of each query head.
        representatives: of each block and query head, float32.
        known: blocks that have representatives.
        moments: of the queries so far.
        entropies: normalised entropies of the newest scores in decoding, around a ring.
        measured: entropies so far.
        quota: blocks that a token of decoding reads in this layer.
        question: queries of the question's tokens, float32.
    """

    store: Store
    reads: Reads
    mass: Float[Array, "B H S"]
    representatives: Float[Array, "B H N E"]
    known: Int[Array, " B"]
    moments: Moments
    entropies: Float[Array, "B R"]
    measured: Int[Array, " B"]
    quota: Int[Array, " B"]
    question: Float[Array, "B Q H E"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActQKV(Retrieval):
    """Retrieves blocks by the queries that are unlike those before them.

    With ``u[t]`` the queries of token t of a pass, all heads in a row, turned as at position
    ``window``, and z and s2 the running mean and variance of each column, a token's activation bias
    is ``A[t] = mean_i (u[t, i] - z[i])^2 / (s2[i] + mean(s2) / 100)``, and the probe is
    ``Σ_t A[t] u[t] / Σ_t A[t]``. Tokens behind the window lie in blocks. A block's representative
    is, per query head, the mean unturned key of its four tokens that got the most attention while
    they were in the window; its score is the cosine with the probe. A pass reads the first tokens,
    the best blocks and what does not fill a block yet, all as if ``window`` positions away, and the
    window as usual, under one softmax.

    In decoding, layers share their blocks by how even their scores are: with ``mu[l]`` the mean
    over the last ``history`` tokens of ``entropy(softmax(scores / temperature)) / log(blocks)``,
    and R what is left of ``blocks`` times the layers, layer l reads
    ``clip(round(R · mu[l] / Σ_{j >= l} mu[j]), least, 2 · blocks)``.

    Reference: Qingfa Xiao, Jiachuan Wang, Haoyang Li, Cheng Deng, Jiaqi Tang, Shuangyin Li, Yongqi
    Zhang, Jun Wang, Lei Chen, "Activation-aware Probe-Query: Effective Key-Value Retrieval for
    Long-Context LLMs Inference", 2025, arXiv:2502.13542.

    Differences from the released code, whose mechanism this is: statistics are those of a layer and
    of a row, where one set serves all layers there; from the second pass on they are used, where
    the first thousand weigh all tokens alike there; with ``warm`` passes or fewer behind it a pass
    is measured by its own statistics. Representatives are float32.

    Attributes:
        budget: tokens that a query reads in a layer on average: sinks, blocks, window, and one
            block more of tokens that do not fill one.
        sinks: first tokens, always read.
        window: newest tokens, always read; a pass has at most so many.
        block: tokens of a block.
        warm: passes before the running statistics are used.
        history: tokens after which layers differ; those that count.
        temperature: of the entropies; at 1 they hardly differ.
        least: fewest blocks of a layer; None is two thirds of the average.
        question: first position of a question in the prompt and the one after its last, or None.
            Passes of several tokens then add ``emphasis`` times the cosine with the mean of its
            four most attended queries.
        emphasis: weight of the question.
    """

    budget: int = 2080
    sinks: int = 64
    window: int = 512
    block: int = 32
    warm: int = 1
    history: int = 100
    temperature: float = 1.0
    least: int | None = None
    question: tuple[int, int] | None = None
    emphasis: float = 4.0

    def __post_init__(self) -> None:
        rest = self.budget - self.sinks - self.window - self.block
        if self.sinks < 0 or self.window < 1 or self.block < 1 or rest < 1 or rest % self.block:
            raise UserError(
                f"ActQKV has a budget of {self.budget} tokens for {self.sinks} sinks, a window of "
                f"{self.window} and blocks of {self.block}; beside one block for the rest, leave a "
                "multiple of the block, not 0"
            )
        if self.history < 1 or self.temperature <= 0:
            raise UserError("ActQKV.history must be at least 1 and .temperature above 0")
        if self.least is not None and not 0 <= self.least <= self.blocks:
            raise UserError(
                f"ActQKV.least is {self.least} blocks of {self.blocks} on average; use 0 to that"
            )
        if self.question is not None and not 0 <= self.question[0] < self.question[1]:
            raise UserError(f"ActQKV.question is {self.question}; give its begin and its end")

    @property
    def blocks(self) -> int:
        """Blocks that a layer reads on average."""
        return (self.budget - self.sinks - self.window) // self.block - 1

    @property
    def rotated(self) -> bool:
        """Blocks are met by unturned keys."""
        return False

    def init(self, room: Room, heads: Heads) -> Blocks:
        """An empty cache."""
        rows, count = room.batch, heads.num_heads
        start, end = self.question or (0, 0)
        wide = (rows, count, -(-room.capacity // self.block), heads.width)
        zero = jnp.zeros(rows, jnp.int32)
        return Blocks(
            store=Store.empty(room, heads, keys_away=self.offload, values_away=self.offload),
            reads=Reads.none(room, lists=1),
            mass=jnp.zeros((rows, count, room.capacity), jnp.float32),
            representatives=jnp.zeros(wide, jnp.float32),
            known=zero,
            moments=Moments.none(rows, count * heads.width),
            entropies=jnp.zeros((rows, self.history), jnp.float32),
            measured=zero,
            quota=jnp.full(rows, self.blocks, jnp.int32),
            question=jnp.zeros((rows, end - start, count, heads.width), jnp.float32),
        )

    def read(self, state: Blocks, new: Entries, *, heads: Heads) -> Reading:
        """Sinks, blocks and the rest, one ``window`` away; and the window.

        Raises:
            UserError: the pass is longer than the window.
        """
        length = new.positions.shape[1]
        if length > self.window:
            raise UserError(
                f"ActQKV reads {length} tokens at once and its window is {self.window}; "
                "use a smaller prefill_chunk, or a larger window"
            )
        store = state.store
        real = jnp.sum(new.segments > 0, axis=1, dtype=jnp.int32)
        far = self._far(new.q, heads)
        scores = self._scores(state, far, new.segments > 0, length)
        there = jnp.arange(scores.shape[1])[None] < state.known[:, None]
        quota = state.quota if length == 1 else jnp.full_like(state.quota, self.blocks)
        taken = best(jnp.where(there, scores, NOTHING), quota, most=2 * self.blocks)
        reading = (real > 0) & (state.known > quota)
        slots = self._slots_of(taken, store.positions.shape[1])
        reads = state.reads.then(slots[:, None], there=reading, anew=reading)
        state = state.replace(reads=reads)
        if length == 1:
            state = self._measured(state, scores, there, real)
        number = jnp.arange(store.positions.shape[1])[None]
        near_from = (store.lengths + real - self.window)[:, None]
        rest = number >= (self.sinks + state.known * self.block)[:, None]
        away = ((number < self.sinks) | slots | rest) & (number < near_from) & store.filled
        most = self.sinks + (2 * self.blocks + 1) * self.block + length
        views = (
            store.view(far, away[:, None], most=most),
            self._window_view(store, new, near_from, heads),
        )
        return Reading(views, None, state)

    def _far(self, q: Float[Array, "B T H E"], heads: Heads) -> Float[Array, "B T H E"]:
        return heads.rotate(q, positions=jnp.full(q.shape[:2], self.window, jnp.int32))

    def weights(
        self, u: Float[Array, "B T D"], valid: Bool[Array, "B T"], moments: Moments
    ) -> Float[Array, "B T"]:
        """Of the queries of a pass in its probe; 0 for padding."""
        return probe_weights(u, valid, moments, warm=self.warm)

    def _scores(
        self,
        state: Blocks,
        far: Float[Array, "B T H E"],
        valid: Bool[Array, "B T"],
        length: int,
    ) -> Float[Array, "B N"]:
        u = far.astype(jnp.float32).reshape(*far.shape[:2], -1)
        weights = self.weights(u, valid, state.moments)
        probe = jnp.sum(weights[..., None] * u, axis=1)
        scores = _cosines(probe, state.representatives)
        if self.question is None or length == 1:
            return scores
        start, end = self.question
        mass = jnp.moveaxis(state.mass[:, :, start:end], 1, 2)
        _, most = jax.lax.top_k(jnp.moveaxis(mass, 1, 2), min(_QUESTION, end - start))
        asked = jnp.moveaxis(state.question, 1, 2)
        asked = jnp.take_along_axis(asked, most[..., None], axis=2).mean(axis=2)
        also = _cosines(asked.reshape(len(asked), -1), state.representatives)
        seen = (state.store.lengths >= end)[:, None]
        return scores + jnp.where(seen, self.emphasis * also, 0.0)

    def _slots_of(self, blocks: Bool[Array, "B N"], slots: int) -> Bool[Array, "B S"]:
        tokens = jnp.repeat(blocks, self.block, axis=1)
        return jnp.pad(tokens, ((0, 0), (self.sinks, 0)))[:, :slots]

    def _measured(
        self,
        state: Blocks,
        scores: Float[Array, "B N"],
        there: Bool[Array, "B N"],
        real: Int[Array, " B"],
    ) -> Blocks:
        """With the entropy of a token's scores."""
        logp = jax.nn.log_softmax(jnp.where(there, scores / self.temperature, -1e30))
        entropy = -jnp.sum(jnp.where(there, jnp.exp(logp) * logp, 0.0), axis=1)
        entropy /= jnp.log(jnp.maximum(state.known, 2).astype(jnp.float32))
        counts = (real > 0) & (state.known > 1)
        at = jnp.where(counts, state.measured % self.history, self.history)
        rows = jnp.arange(len(at))
        return state.replace(
            entropies=state.entropies.at[rows, at].set(entropy, mode="drop"),
            measured=state.measured + counts,
        )

    def _window_view(
        self, store: Store, new: Entries, near_from: Int[Array, "B 1"], heads: Heads
    ) -> CacheView:
        k, v, positions = self._window(store, heads)
        near = (positions >= 0) & (positions >= near_from)
        q = heads.rotate(new.q, positions=new.positions)
        return CacheView(q, k, v, positions, near.astype(jnp.int32))

    def _window(self, store: Store, heads: Heads) -> tuple[Array, Array, Array]:
        """The newest keys, turned, with their values and positions, -1 where there is none."""
        size = min(self.window, store.positions.shape[1])
        slots = store.lengths[:, None] - size + jnp.arange(size, dtype=jnp.int32)[None]
        k, v = store.gather(slots[:, None])
        k = heads.rotate(k.swapaxes(1, 2), positions=jnp.maximum(slots, 0)).swapaxes(1, 2)
        positions = jnp.take_along_axis(store.positions, jnp.maximum(slots, 0), axis=1)
        return k, v, jnp.where(slots >= 0, positions, -1)

    def append(self, state: Blocks, new: Entries, *, heads: Heads) -> Blocks:
        """Writes tokens, counts the attention in the window, and represents blocks behind it."""
        valid = new.segments > 0
        state = self._with_mass(state, new, heads)
        far = self._far(new.q, heads).astype(jnp.float32)
        u = far.reshape(*far.shape[:2], -1)
        state = state.replace(store=state.store.write(new), moments=state.moments.then(u, valid))
        if self.question is not None:
            at = jnp.where(valid, new.positions - self.question[0], -1)
            at = jnp.where(at < 0, state.question.shape[1], at)
            rows = jnp.arange(len(at))[:, None]
            state = state.replace(question=state.question.at[rows, at].set(far, mode="drop"))
        return self._represented(state, new.positions.shape[1])

    def _with_mass(self, state: Blocks, new: Entries, heads: Heads) -> Blocks:
        old, _, positions = self._window(state.store, heads)
        valid = new.segments > 0
        q, k = (heads.rotate(x, positions=new.positions) for x in (new.q, new.k))
        keys = jnp.concatenate([old, k.swapaxes(1, 2).astype(old.dtype)], axis=2)
        positions = jnp.concatenate([positions, jnp.where(valid, new.positions, -1)], axis=1)
        mass = attention_mass(
            q=q, k=keys, q_positions=new.positions, q_segments=valid.astype(jnp.int32),
            kv_positions=positions[:, None],
            kv_segments=(positions >= 0)[:, None].astype(jnp.int32),
            rule=SlidingWindow(size=self.window), scale=heads.scale, softcap=heads.softcap,
        ).reshape(len(q), heads.num_heads, -1)  # fmt: skip
        slots = jnp.where(positions < 0, state.mass.shape[2], positions)[:, None]
        b, h = jnp.arange(len(q))[:, None, None], jnp.arange(heads.num_heads)[None, :, None]
        return state.replace(mass=state.mass.at[b, h, slots].add(mass, mode="drop"))

    def _represented(self, state: Blocks, length: int) -> Blocks:
        """With representatives of the blocks that have left the window."""
        store, count = state.store, state.representatives.shape[2]
        most = min(length // self.block + 2, count)
        ids = state.known[:, None] + jnp.arange(most, dtype=jnp.int32)[None]
        slots = self.sinks + ids[..., None] * self.block + jnp.arange(self.block)[None, None]
        slots = jnp.minimum(slots, store.positions.shape[1] - 1).reshape(len(ids), -1)
        keys, _ = store.gather(slots[:, None])
        groups = state.mass.shape[1] // keys.shape[1]
        keys = jnp.repeat(keys.astype(jnp.float32), groups, axis=1)
        keys = keys.reshape(*keys.shape[:2], most, self.block, keys.shape[3])
        mass = jnp.take_along_axis(state.mass, slots[:, None], axis=2).reshape(keys.shape[:-1])
        _, top = jax.lax.top_k(mass, min(_REPRESENTATIVES, self.block))
        found = jnp.take_along_axis(keys, top[..., None], axis=3).mean(axis=3)
        known = jnp.maximum(store.lengths - self.window - self.sinks, 0) // self.block
        known = jnp.maximum(known, state.known)
        at = jnp.where(ids < known[:, None], ids, count)[:, None]
        b, h = jnp.arange(len(at))[:, None, None], jnp.arange(found.shape[1])[None, :, None]
        return state.replace(
            representatives=state.representatives.at[b, h, at].set(found, mode="drop"),
            known=known,
        )

    def truncate(self, state: Blocks, lengths: Int[Array, " B"]) -> Blocks:
        """Blocks that the window reaches again are represented anew; statistics stay."""
        known = jnp.maximum(lengths - self.window - self.sinks, 0) // self.block
        kept = (jnp.arange(state.mass.shape[2])[None] < lengths[:, None])[:, None]
        return state.replace(
            store=state.store.before(lengths),
            reads=state.reads.before(lengths),
            mass=jnp.where(kept, state.mass, 0.0),
            known=jnp.minimum(state.known, known),
        )

    def counters(self, state: Blocks) -> dict[str, Float[Array, " B"]]:
        """And the blocks that this layer reads beyond the average: how far layers differ."""
        beyond = jnp.maximum(state.quota - self.blocks, 0).astype(jnp.float32)
        return super().counters(state) | {"cache_blocks_beyond_average": beyond}

    def after_pass(self, states: tuple[Any, ...]) -> tuple[Any, ...]:
        """Shares the blocks among the layers once each has measured ``history`` entropies."""
        mu = jnp.stack([jnp.mean(state.entropies, axis=1) for state in states])
        ready = jnp.all(jnp.stack([s.measured >= self.history for s in states]), axis=0)
        least = 2 * self.blocks // 3 if self.least is None else self.least
        shares = layer_budgets(
            mu, total=self.blocks * len(states), least=least, most=2 * self.blocks
        )
        shares = jnp.where(ready[None], shares, self.blocks)
        return tuple(
            state.replace(quota=share) for state, share in zip(states, shares, strict=True)
        )


def _cosines(
    probe: Float[Array, "B D"], representatives: Float[Array, "B H N E"]
) -> Float[Array, "B N"]:
    """All heads in a row; 0 where one of both is 0."""
    q = probe.reshape(len(probe), representatives.shape[1], -1)
    products = jnp.einsum("bhe,bhne->bn", q, representatives, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(representatives**2, axis=(1, 3)) * jnp.sum(probe**2, axis=1)[:, None]
    return products / jnp.sqrt(jnp.where(norms > 0, norms, 1.0))

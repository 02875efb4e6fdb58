"""Depth-wise batching: passes of a looped stack that tokens of any recursion share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.cache import LoopedCache, Room
from tokenlab.core.arrays import Array, Bool, Float, Int, PRNGKeyArray
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.core.reports import REPORTS, gathered
from tokenlab.decode.autoregressive import Autoregressive, Run, State
from tokenlab.decode.feeds import entering
from tokenlab.decode.passes import Spent, logits_of
from tokenlab.decode.rows import Rows
from tokenlab.depth.recursive import Recursive
from tokenlab.models import Transformer, for_decoding

Static = tuple[Transformer, "DepthBatched"]
_OUT = 2**31 - 1  # in the place of a recursion: the loop is left


class _InFlight(flax.struct.PyTreeNode):
    """The while loop's carry.

    Attributes:
        cache: what was read, by layer.
        rows: what was written.
        logits: of the next token of the rows that are ``fresh``.
        fresh: rows whose prompt has just been read.
        stream: of each row's last token, as it left its last recursion.
        recursion: that comes next for it, ``_OUT`` where none does.
        gate: of what that makes of it.
        spent: the work.
    """

    cache: LoopedCache
    rows: Rows
    logits: Float[Array, "B V"]
    fresh: Bool[Array, " B"]
    stream: Float[Array, "B D"]
    recursion: Int[Array, " B"]
    gate: Float[Array, " B"]
    spent: Spent


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthBatched(Autoregressive):
    """Decodes a looped model; a token that leaves the loop early makes room for another row's.

    The recursions of a loop have the same parameters, so tokens of different recursions can be in
    one pass. Of ``slots`` rows in flight, ``batch`` at a time go through the loop once, each in its
    own recursion and against the keys of that; where so many have left the loop, they are
    written, and their next tokens enter. With ``slots`` of at least ``2 * batch - 1``, one of the
    two has always a whole batch to do while prompts wait, and a token costs the recursions that it
    goes through and no more. What is written is what ``Autoregressive`` writes.

    Models loop by ``Recursive`` or ``MixtureOfRecursions``, in cycles and with keys of each
    recursion. The rows that have written least come first.

    Reference: Bae, Kim, Bayat, Kim, Ha, Schuster, Fisch, Harutyunyan, Ji, Courville, Yun,
    "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level
    Computation", 2025, arXiv:2507.10524 (continuous depth-wise batching).

    Differences from the paper: written and entering tokens are batched as those of the loop are.

    Attributes:
        batch: rows of a pass; ``slots`` is twice as many unless it is given.
    """

    batch: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise UserError(f"batch {self.batch} must be at least 1")

    def _run(self, view: View, prompts: Sequence[Sequence[int]], key: PRNGKeyArray) -> Run:
        model = for_decoding(cast(Transformer, view.model), view.params)[0]
        if not isinstance(model.depth, Recursive):
            raise UserError(
                f"DepthBatched decodes loops of Recursive or MixtureOfRecursions, and this model "
                f"has depth={type(model.depth).__name__}; use Autoregressive()"
            )
        if reason := model.depth.apart():
            raise UserError(f"{reason}, so DepthBatched cannot decode them; use Autoregressive()")
        return _DepthRun(self, view, prompts, key)


class _DepthRun(Run):
    """With the rows of all recursions in one cache."""

    def _slots(self, decoder: Autoregressive) -> int:
        return decoder.slots or 2 * cast(DepthBatched, decoder).batch

    def _begin_all(self, requests: Sequence[int | None]) -> _InFlight:
        begun = self._begin(requests)
        static, room = cast(Static, self.static), (len(requests), self.sizes[1])
        return _insert(_empty(static, begun, *room), jnp.arange(len(requests)), begun)

    def _advance(self, steps: int) -> _InFlight:
        turns = steps * len(self.owners)  # Of which each writes a token at least.
        static = cast(Static, self.static)
        return _decode(static, self.params, self.state, turns, bool(self.waiting))

    def _insert(self, slot: int, begun: State) -> _InFlight:
        return _insert(self.state, jnp.asarray([slot]), begun)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _empty(static: Static, like: State, batch: int, capacity: int) -> _InFlight:
    """Room for rows like those of ``like``."""
    model, decoder = static
    names = model.depth.names(model.num_layers)
    ends, inside = len(names.first), len(names.loop)
    layers = ends + inside + len(names.last)
    order = (
        *((i, 0) for i in range(ends)),
        *((ends + i, r) for r in range(model.depth.recursions) for i in range(inside)),
        *((i, 0) for i in range(ends + inside, layers)),
    )
    heads = (model.mixers()[0].heads(model.dim),) * layers
    cache = LoopedCache.empty(
        decoder.cache, Room(batch, capacity, model.dtype), heads=heads, order=order
    )
    return _InFlight(
        cache=cache,
        rows=jax.tree.map(jnp.zeros_like, like.rows),
        logits=jnp.zeros_like(like.logits),
        fresh=jnp.zeros(batch, bool),
        stream=jnp.zeros((batch, model.dim), model.dtype),
        recursion=jnp.zeros(batch, jnp.int32),
        gate=jnp.zeros(batch),
        spent=jax.tree.map(jnp.zeros_like, like.spent),
    )


@functools.partial(jax.jit, donate_argnums=0)
def _insert(state: _InFlight, rows: Int[Array, " N"], other: State) -> _InFlight:
    """``other`` in the place of ``rows``, out of the loop and ready to be written."""
    return state.replace(
        cache=state.cache.insert(rows, other.cache),
        rows=state.rows.put(rows, other.rows),
        logits=state.logits.at[rows].set(other.logits),
        fresh=state.fresh.at[rows].set(True),
        recursion=state.recursion.at[rows].set(_OUT),
        spent=state.spent.plus(other.spent),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    static: Static,
    params: PyTree,
    state: _InFlight,
    turns: Int[Array, ""],
    wait: Bool[Array, ""],
) -> _InFlight:
    """Writes batches of tokens until every row has ended, or one where another waits."""
    stages = _Stages(static, params, len(state.fresh))

    def unfinished(carry: tuple[Array, _InFlight]) -> Bool[Array, ""]:
        done = carry[1].rows.done
        return (carry[0] < turns) & ~jnp.all(done) & ~(wait & jnp.any(done))

    def turn(carry: tuple[Array, _InFlight]) -> tuple[Array, _InFlight]:
        looped = jax.lax.while_loop(stages.busy, stages.loop, carry[1])
        return carry[0] + 1, stages.write(looped)

    return jax.lax.while_loop(unfinished, turn, (jnp.int32(0), state))[1]


class _Lanes(flax.struct.PyTreeNode):
    """The rows of one pass.

    Attributes:
        at: their numbers; those behind the last that takes part mean nothing.
        there: which take part.
        target: their numbers, where to write what comes of them.
    """

    at: Int[Array, " N"]
    there: Bool[Array, " N"]
    target: Int[Array, " N"]


class _Stages:
    """The three parts of a looped stack on some of the rows; lives while they are traced."""

    def __init__(self, static: Static, params: PyTree, slots: int) -> None:
        self.model, self.decoder = static
        self.params, self.slots = params, slots
        self.program = cast(Recursive, self.model.depth)
        self.names = self.program.names(self.model.num_layers)
        self.batch = min(self.decoder.batch, slots)

    def busy(self, state: _InFlight) -> Bool[Array, ""]:
        """Whether the loop is to run before tokens are written."""
        inside, outside = self._inside(state), self._outside(state)
        return jnp.any(inside) & (jnp.sum(outside) < self.batch)

    def loop(self, state: _InFlight) -> _InFlight:
        """Once through the loop for a batch of rows, each in its recursion."""
        lanes = self._lanes(state, self._inside(state))
        recursion = jnp.where(lanes.there, state.recursion[lanes.at], 0)
        x = state.stream[lanes.at][:, None]
        y, state = self._run(self.names.loop, len(self.names.first), x, recursion, lanes, state)
        x = self.program.joined(x, y, gate=state.gate[lanes.at])
        return self._moved(state, lanes, x, recursion + 1)

    def write(self, state: _InFlight) -> _InFlight:
        """A token for a batch of rows that are out of the loop; the next ones enter it."""
        lanes, names = self._lanes(state, self._outside(state)), self.names
        fresh, outside = state.fresh[lanes.at], jnp.zeros(self.batch, jnp.int32)
        ends = len(names.first) + len(names.loop)
        behind = lanes.replace(there=lanes.there & ~fresh)
        x, state = self._run(
            names.last, ends, state.stream[lanes.at][:, None], outside, behind, state
        )
        norm = View(model=self.model.norm, params=self.params.get("norm", {}))
        logits = logits_of(self.model, self.params, norm(x))[:, 0]
        logits = jnp.where(fresh[:, None], state.logits[lanes.at], logits)
        rows, fed, running = state.rows.take(lanes.at).drawn(self.decoder.rules, logits)
        going = lanes.there & running & ~rows.done
        state = state.replace(
            rows=state.rows.put(lanes.target, rows), fresh=state.fresh.at[lanes.target].set(False)
        )
        embeddings, mixed = entering(self.model, self.params, fed)
        view: Any = View(model=self.model, params=self.params)
        position = jnp.maximum(rows.history.lengths - 1, 0)[:, None]
        x = view(
            fed.draw.token[:, None], positions=position, embeddings=embeddings, method="entering"
        )
        read = lanes.replace(there=going)
        x, state = self._run(names.first, 0, x, outside, read, state)
        spent = state.spent.replace(
            passes=state.spent.passes + 1,
            slots=state.spent.slots + self.batch,
            tokens=state.spent.tokens + jnp.sum(going),
            projected=state.spent.projected + jnp.sum(behind.there),
        )
        state = state.replace(spent=spent.mixing(self.model, jnp.sum(going & mixed)))
        return self._moved(state, read, x, outside)

    def _inside(self, state: _InFlight) -> Bool[Array, " B"]:
        return ~state.rows.done & (state.recursion < self.program.recursions)

    def _outside(self, state: _InFlight) -> Bool[Array, " B"]:
        return ~state.rows.done & (state.recursion >= self.program.recursions)

    def _lanes(self, state: _InFlight, ready: Bool[Array, " B"]) -> _Lanes:
        """A batch of the rows that are ready."""
        history = state.rows.history
        written = jnp.where(ready, history.lengths - history.prompts, _OUT)
        at = jnp.argsort(written, stable=True)[: self.batch].astype(jnp.int32)
        there = ready[at]
        return _Lanes(at=at, there=there, target=jnp.where(there, at, self.slots))

    def _moved(
        self, state: _InFlight, lanes: _Lanes, x: Float[Array, "B 1 D"], recursion: Int[Array, " B"]
    ) -> _InFlight:
        """With the streams of the lanes, which come to ``recursion`` next unless they leave."""
        params = self.params.get("depth", {})
        enters, gate = self.program.enters(params, x, recursion=recursion, active=lanes.there)
        return state.replace(
            stream=state.stream.at[lanes.target].set(x[:, 0], mode="drop"),
            recursion=state.recursion.at[lanes.target].set(
                jnp.where(enters, recursion, _OUT), mode="drop"
            ),
            gate=state.gate.at[lanes.target].set(gate, mode="drop"),
        )

    def _run(
        self,
        names: list[str],
        first: int,
        x: Float[Array, "B 1 D"],
        recursion: Int[Array, " B"],
        lanes: _Lanes,
        state: _InFlight,
    ) -> tuple[Float[Array, "B 1 D"], _InFlight]:
        """The lanes through layers ``names``, the first of which is layer ``first`` of the cache.

        Args:
            names: of the layers.
            first: the number of the first.
            x: the streams.
            recursion: of each lane, 0 outside of the loop.
            lanes: the rows.
            state: before the pass.
        """
        segments = lanes.there.astype(jnp.int32)[:, None]
        positions = jnp.maximum(state.rows.history.lengths[lanes.at] - 1, 0)[:, None]
        cache, spent = state.cache, state.spent
        for number, name in enumerate(names, first):
            view = View(model=self.model.block, params=self.params[name])
            own = cache.lanes(number, lanes.at, recursion)
            (x, own), reports = view(
                x, positions=positions, segments=segments, cache=own, mutable=(REPORTS,)
            )
            cache = cache.rejoined(number, lanes.at, recursion, own)
            runs = jnp.asarray([i for i, (mine, _) in enumerate(cache.order) if mine == number])
            spent = spent.replace(
                runs=spent.runs.at[runs[recursion]].add(segments[:, 0]),
                flops=spent.flops + gathered(reports).flops,
            )
        return x, state.replace(cache=cache, spent=spent)

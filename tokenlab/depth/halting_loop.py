"""A loop that each token leaves when a halting rule says so."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Bool, Float, Hidden, Positions, Segments
from tokenlab.core.parameters import dense_init, parameter
from tokenlab.core.weighted import Weighted
from tokenlab.depth.base import DepthProgram, DepthTrace
from tokenlab.depth.halting import Halting, OnlineHalting
from tokenlab.depth.loop_keys import KeySharing, LoopKeys
from tokenlab.depth.recursive import Loop, Parts, SharedLayers
from tokenlab.routing import Route

Inject = Literal["none", "add", "concat"]
Readout = Literal["mixture", "expected_loss", "straight_through", "gated", "hard"]


class _Went(NamedTuple):
    """What a pass through the loop leaves to be traced.

    Attributes:
        states: the stream before the loop and behind each recursion.
        chances: of each depth.
        routes: tokens that entered each recursion; empty where all did.
        streams: the stream behind the last layers for each depth, or None.
    """

    states: list[Hidden]
    chances: Float[Array, "B T M"]
    routes: list[Route]
    streams: Float[Array, "M B T D"] | None = None


class HaltingLoop(Loop):
    """A core of shared layers, which each token leaves after as many recursions as it is given.

    ``h_0`` is the stream behind ``prelude`` layers, ``h_d = R(h_{d-1}; h_0)`` for d up to
    ``recursions``, and ``coda`` layers follow. ``halting`` gives chances q(d) of each depth, and
    ``readout`` says what comes of them; under the first two every token goes through all of them:

    - ``mixture``: the coda reads ``sum_d q(d) h_d``.
    - ``expected_loss``: the coda runs on each ``h_d``; ``trace.streams`` has the results, of which
      ``objectives.ExpectedNextToken`` takes ``sum_d q(d) loss_d``. The output is their mixture.
    - ``straight_through``: a depth is drawn from q and the token stays as it is from there on;
      the output is its state, the gradient that of the mixture. Not in training, as ``hard``.
    - ``gated``: a token stops by the rule of ``halting``, and ``h_0 + q(d) h_d`` of its depth d
      leaves the loop, in training as in decoding. With ``TokenChoice`` this is the token-choice
      form of Mixture-of-Recursions.
    - ``hard``: a token stops by the rule of ``halting``. This is the causal twin of the others,
      which evaluates and decodes.

    A token that has stopped is not computed any more and stays visible: with ``keys="hybrid"`` it
    shows deeper tokens the keys and values of the last recursion that it entered.

    ``trace.aux["depth"]`` is the mean over tokens of E[d] / M, to be added with
    ``AuxiliaryTerm(name="depth", coefficient=0.1)``. ``trace.figures`` has ``halting``, the chances
    [M, B, T] (of depths that a token did not enter, from the state that it stopped with), and
    ``recursions`` [1, B, T]: those expected in a soft pass, those entered in a hard one.

    Reference: "Understanding Dynamic Compute Allocation in Recurrent Transformers", 2026,
    arXiv:2602.08864 (ANIRA).

    Differences from the paper: its equations were not at hand, so loss, heads and readouts are the
    usual ones. A depth is drawn by inverting the cumulative chances, as Gumbel's trick would draw
    it, and its gradient is that of the chances without a temperature.

    Attributes:
        halting: gives the chances, and the hard rule.
        recursions: most recursions M.
        prelude: layers before the loop.
        coda: layers behind it.
        inject: how ``h_0`` enters each recursion: not, added to its input, or beside it through a
            projection.
        readout: what leaves the loop.
        keys: whose keys and values a recursion reads.
    """

    halting: Halting = OnlineHalting()
    recursions: int = 8
    prelude: int = 1
    coda: int = 1
    inject: Inject = "add"
    readout: Readout = "mixture"
    keys: KeySharing = "hybrid"

    @nn.nowrap
    def causal_twin(self) -> DepthProgram:
        """The same under the hard rule; itself where it trains by that."""
        return self if self.readout == "gated" else self.clone(readout="hard")

    @nn.nowrap
    def _parts(self, num_layers: int) -> Parts:
        by = f"prelude {self.prelude} and coda {self.coda}"
        return self._divided(num_layers, first=self.prelude, last=self.coda, by=by)

    def _loop(
        self,
        layers: list[nn.Module],
        x: Hidden,
        keys: LoopKeys,
        *,
        positions: Positions,
        segments: Segments,
        train: bool,
    ) -> tuple[Hidden, _Went]:
        """All recursions on all tokens, or on those that have not stopped."""
        decide = self.halting.copy(parent=self, name="decision")
        inject, level = self._injection(x), None
        if self.readout == "straight_through" and train:
            level = jax.random.uniform(self.make_rng("routes"), x.shape[:2])
        freezes = self.readout in ("straight_through", "gated", "hard")
        where = {"positions": positions, "segments": segments, "train": train}
        valid = segments > 0
        going, states, routes = valid, [x], []
        for depth in range(1, self.recursions + 1):
            entering = inject(states[-1])
            if freezes:
                ones = jnp.ones(x.shape[:2])
                routes.append(Route.of(going, ones, capacity=x.shape[1], aux={}))
            if freezes and depth > 1:
                route = routes[-1]
                y = self._routed(layers, entering, route, keys, depth - 1, **where)
                # Added to nothing, so that no bit of a state is lost.
                y = route.scatter_add(jnp.where(route.kept[..., None], 0, states[-1]), y)
            else:
                y, after = self._run(layers, entering, keys.given(depth - 1, None), **where)
                keys.left(depth - 1, after)
            states.append(y)
            if freezes and depth < self.recursions:
                chances = decide(states, depths=self.recursions, valid=valid)
                stop = decide.stopped(chances, depth=depth)
                if level is not None:
                    stop = decide.drawn(chances, depth=depth, level=level)
                going &= ~stop
        went = _Went(states, decide(states, depths=self.recursions, valid=valid), routes)
        return self._read(went, soft=level is not None or not freezes), went

    def _injection(self, start: Hidden) -> Any:
        """What enters a recursion, from the stream so far."""
        if self.inject == "none":
            return lambda h: h
        if self.inject == "add":
            return lambda h: h + start
        width = start.shape[-1]
        kernel = parameter(self, "inject", dense_init, (2 * width, width), ("mlp", "embed"))
        return lambda h: jnp.concatenate([h, start], axis=-1) @ kernel.astype(h.dtype)

    @nn.nowrap
    def _read(self, went: _Went, *, soft: bool) -> Hidden:
        """What leaves the loop: a mixture of the states, or the last."""
        if not soft and self.readout != "gated":
            return went.states[-1]
        weights = went.chances
        if not went.routes:
            return _mixed(weights, jnp.stack(went.states[1:]))
        taken = jax.nn.one_hot(self._entered(went.routes) - 1, self.recursions)
        if self.readout == "gated":
            gate = jnp.sum(taken * weights, axis=-1, keepdims=True)
            return went.states[0] + (gate * went.states[-1]).astype(went.states[0].dtype)
        straight = taken + weights - jax.lax.stop_gradient(weights)
        return _mixed(straight, jnp.stack(went.states[1:]))

    @nn.nowrap
    def _entered(self, routes: list[Route]) -> Array:
        return jnp.sum(jnp.stack([route.kept for route in routes]), axis=0)

    def _behind(
        self,
        layers: list[nn.Module],
        x: Hidden,
        went: _Went,
        given: list[Any],
        *,
        positions: Positions,
        segments: Segments,
        train: bool,
    ) -> tuple[Hidden, _Went, list[Any]]:
        """The coda, for ``expected_loss`` on the state of every depth."""
        where = {"positions": positions, "segments": segments}
        if self.readout != "expected_loss" or any(one is not None for one in given):
            return super()._behind(layers, x, went, given, **where, train=train)
        depths = self.recursions
        folded = jnp.concatenate(went.states[1:])
        tiled = {name: jnp.tile(of, (depths, 1)) for name, of in where.items()}
        y, _ = self._run(layers, folded, given, **tiled, train=train)
        streams = y.reshape(depths, *x.shape)
        return _mixed(went.chances, streams), went._replace(streams=streams), given

    def _trace(self, valid: Bool[Array, "B T"], went: _Went, layers: SharedLayers) -> DepthTrace:
        """And the chances, what they cost, and the streams of all depths."""
        trace = super()._trace(valid, went.routes, layers)
        depths = jnp.arange(1, self.recursions + 1, dtype=jnp.float32)
        spent = jnp.where(valid, jnp.einsum("btm,m->bt", went.chances, depths), 0)
        cost = Weighted.of(spent / self.recursions, valid.astype(jnp.float32))
        if went.routes:
            spent = self._entered(went.routes).astype(jnp.float32)
        halting = jnp.where(valid[None], jnp.moveaxis(went.chances, -1, 0), 0)
        return dataclasses.replace(
            trace,
            aux={"depth": cost},
            figures={"halting": halting, "recursions": spent[None]},
            streams=went.streams,
        )


def _mixed(weights: Float[Array, "B T M"], streams: Float[Array, "M B T D"]) -> Hidden:
    """``sum_d weights(d) streams(d)``, summed in float32."""
    factors = jnp.moveaxis(weights, -1, 0)[..., None]
    return jnp.sum(factors * streams.astype(jnp.float32), axis=0).astype(streams.dtype)

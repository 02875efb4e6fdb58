"""Mixture-of-Recursions: a shared block, run as often on each token as a router decides."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from tokenlab.cache import Cache
from tokenlab.core.arrays import Hidden, Positions, Segments
from tokenlab.core.weighted import Weighted
from tokenlab.depth.base import DepthProgram, DepthTrace, Layers
from tokenlab.depth.recursive import Recursive, trace_of
from tokenlab.routing import ExpertChoiceRouter, Route, Router


class MixtureOfRecursions(Recursive):
    """Recursion r runs only on the tokens that its router keeps of those recursion r - 1 kept.

    ``H[I_r] += g_r * F(H[I_r])`` with ``I_0`` all tokens, ``|I_r| = max(1, floor(c_r S))`` and
    ``c_r = (N - r + 1) / N``. F is the shared layers with their own residual stream; its attention
    is causal among ``I_r``, at the tokens' own positions. Tokens not kept are left as they are.

    ``trace.aux`` has each router's auxiliary losses, one entry per recursion; add them with
    ``AuxiliaryTerm(name="membership", coefficient=1e-3)``.

    Reference: Bae, Kim, Bayat, Kim, Ha, Schuster, Fisch, Harutyunyan, Ji, Courville, Yun,
    "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level
    Computation", 2025, arXiv:2507.10524.

    Differences from the paper: the capacity of a padded row is that of its tokens, padding left
    out; recursion-wise keys and values only; no capacity warm-up; no cache yet.

    Attributes:
        router: of each recursion, with parameters of its own.
    """

    router: Router = ExpertChoiceRouter()

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        block: Layers,
        *,
        num_layers: int,
        positions: Positions,
        segments: Segments,
        cache: Cache | None = None,
        train: bool = False,
    ) -> tuple[Hidden, DepthTrace, Cache | None]:
        """Runs the ends on all tokens and the loop on those that are kept."""
        layers = self._layers(block, num_layers)
        where = {"positions": positions, "segments": segments}
        x = self._run(layers.first, x, **where, train=train)
        valid = segments > 0
        kept, routes = valid, []
        tokens = jnp.sum(valid, axis=1)
        for r in range(self.recursions):
            share, whole = self.recursions - r, self.recursions
            route = self.router.copy(parent=self, name=f"router_{r}")(
                x,
                active=kept,
                capacity=max(1, x.shape[1] * share // whole),
                limit=jnp.minimum(tokens, jnp.maximum(1, tokens * share // whole)),
            )
            x = self._recursion(layers.loop, x, route, **where, train=train)
            kept = route.kept
            routes.append(route)
        x = self._run(layers.last, x, **where, train=train)
        trace = trace_of(valid, [route.kept for route in routes], layers)
        aux = _stacked([route.aux for route in routes])
        return x, dataclasses.replace(trace, aux=aux), None

    @nn.nowrap
    def causal_twin(self) -> DepthProgram:
        """The same with the router's causal twin."""
        return self.clone(router=self.router.causal_twin())

    def _recursion(
        self,
        layers: list[nn.Module],
        x: Hidden,
        route: Route,
        *,
        positions: Positions,
        segments: Segments,
        train: bool,
    ) -> Hidden:
        """Gathers the kept tokens, runs the layers on them, adds the gated result back."""
        picked = route.gather(x)
        at = jnp.take_along_axis(positions, route.index, axis=1)
        of = jnp.take_along_axis(segments, route.index, axis=1)
        of = jnp.where(route.valid(), of, 0)
        y = self._run(layers, picked, positions=at, segments=of, train=train)
        return route.scatter_add(x, y)


def _stacked(parts: list[dict[str, Weighted]]) -> dict[str, Weighted]:
    """One sum per recursion under each name."""
    return {
        name: Weighted(
            total=jnp.stack([part[name].total for part in parts]),
            weight=jnp.stack([part[name].weight for part in parts]),
        )
        for name in parts[0]
    }

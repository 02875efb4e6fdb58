"""Mixture-of-Recursions: a shared block, run as often on each token as a router decides."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int, Positions, Segments
from tokenlab.core.weighted import Weighted
from tokenlab.depth.base import DepthProgram, DepthTrace
from tokenlab.depth.loop_keys import LoopKeys
from tokenlab.depth.recursive import Recursive, SharedLayers
from tokenlab.routing import ExpertChoiceRouter, Route, Router


class MixtureOfRecursions(Recursive):
    """Recursion r runs only on the tokens that its router keeps of those recursion r - 1 kept.

    ``H[I_r] += g_r * F(H[I_r])`` with ``I_0`` all tokens, ``|I_r| = max(1, floor(c_r S))`` and
    ``c_r = (N - r + 1) / N``. F is the shared layers with their own residual stream; its attention
    is causal at the tokens' own positions: with ``keys="recursion_wise"`` among ``I_r``, otherwise
    over ``I_1``, which is all tokens in training. Tokens not kept are left as they are.

    Decoders run the causal twin. A token is appended to the caches of the recursions that it
    enters, so those have holes; with ``"hybrid"`` every recursion keeps all of ``I_1``, under the
    keys that it would read. A step of most decoders computes all recursions of all rows and throws
    away what was not entered; one of ``decode.DepthBatched`` computes what is entered. The ledger
    counts that.

    ``trace.aux`` has each router's auxiliary losses, one entry per recursion; add them with
    ``AuxiliaryTerm(name="membership", coefficient=1e-3)``.

    Reference: Bae, Kim, Bayat, Kim, Ha, Schuster, Fisch, Harutyunyan, Ji, Courville, Yun,
    "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level
    Computation", 2025, arXiv:2507.10524.

    Differences from the paper: the capacity of a padded row is that of its tokens, padding left
    out; no capacity warm-up. ``"hybrid"`` keeps a cache of each recursion, as many entries as at
    full depth: in one cache that is overwritten, decoding would read keys of deeper recursions
    than training did. ``"shared"`` computes the queries of routed tokens alone, where the released
    code computes all and masks.

    Attributes:
        router: of each recursion, with parameters of its own.
    """

    router: Router = ExpertChoiceRouter()

    @nn.nowrap
    def causal_twin(self) -> DepthProgram:
        """The same with the router's causal twin."""
        return self.clone(router=self.router.causal_twin())

    @nn.nowrap
    def enters(
        self,
        params: PyTree,
        x: Float[Array, "B 1 D"],
        *,
        recursion: Int[Array, " B"],
        active: Bool[Array, " B"],
    ) -> tuple[Bool[Array, " B"], Float[Array, " B"]]:
        """As its router says, which has to be causal."""
        active, _ = super().enters(params, x, recursion=recursion, active=active)
        assert self.router.causal, "a program of its causal twin"
        routers = [params[f"router_{r}"] for r in range(self.recursions)]
        own = jax.tree.map(
            lambda *leaves: jnp.stack(leaves)[jnp.minimum(recursion, self.recursions - 1)], *routers
        )

        def asked(mine: PyTree, x: Array, active: Array, share: Array) -> tuple[Array, Array]:
            route: Any = self.router.apply(
                {"params": mine}, x[None], active=active[None, None], capacity=1,
                limit=jnp.ones(1, jnp.int32), share=share,
            )  # fmt: skip
            return route.kept[0, 0], route.gate[0, 0]

        left = self.recursions - recursion
        share = left / jnp.minimum(left + 1, self.recursions)
        return jax.vmap(asked)(own, x, active, share)

    @nn.nowrap
    def joined(self, x: Hidden, y: Hidden, *, gate: Float[Array, " B"]) -> Hidden:
        """``x + gate * y``, in float32."""
        added = gate[:, None, None] * y.astype(jnp.float32)
        return (x.astype(jnp.float32) + added).astype(x.dtype)

    def _loop(
        self,
        layers: list[nn.Module],
        x: Hidden,
        keys: LoopKeys,
        *,
        positions: Positions,
        segments: Segments,
        train: bool,
    ) -> tuple[Hidden, list[Route]]:
        """Gathers the tokens that a recursion keeps, runs it, adds the gated result back."""
        where = {"positions": positions, "segments": segments, "train": train}
        kept, routes = segments > 0, []
        tokens = jnp.sum(kept, axis=1)
        for r in range(self.recursions):
            left, whole = self.recursions - r, self.recursions
            route = self.router.copy(parent=self, name=f"router_{r}")(
                x,
                active=kept,
                capacity=max(1, x.shape[1] * left // whole),
                limit=jnp.minimum(tokens, jnp.maximum(1, tokens * left // whole)),
                share=left / min(left + 1, whole),
            )
            x = route.scatter_add(x, self._routed(layers, x, route, keys, r, **where))
            kept = route.kept
            routes.append(route)
        return x, routes

    def _trace(
        self, valid: Bool[Array, "B T"], went: list[Route], layers: SharedLayers
    ) -> DepthTrace:
        """And the routers' losses."""
        trace = super()._trace(valid, went, layers)
        return dataclasses.replace(trace, aux=_stacked([route.aux for route in went]))


def _stacked(parts: list[dict[str, Weighted]]) -> dict[str, Weighted]:
    """One sum per recursion under each name."""
    return {
        name: Weighted(
            total=jnp.stack([part[name].total for part in parts]),
            weight=jnp.stack([part[name].weight for part in parts]),
        )
        for name in parts[0]
    }

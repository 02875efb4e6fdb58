"""Mixture-of-Recursions: a shared block, run as often on each token as a router decides."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int, Positions, Scalar, Segments
from tokenlab.core.duration import Fraction
from tokenlab.core.errors import UserError
from tokenlab.core.progress import progress
from tokenlab.core.weighted import Weighted
from tokenlab.depth.base import DepthProgram, DepthTrace
from tokenlab.depth.loop_keys import LoopKeys
from tokenlab.depth.recursive import Recursive, SharedLayers, Went
from tokenlab.routing import ExpertChoiceRouter, Router


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

    With ``warmup`` capacities fall from 1 to ``c_r`` over the first part of a training run, by half
    a cosine: recursion r keeps ``k_r + floor((S - k_r) (1 + cos(pi s)) / 2)`` tokens, ``k_r`` being
    those that it keeps otherwise and s the share of the warm-up that is done. Until its end all S
    slots of each recursion are computed, of which the ledger counts those in use. Both forms are in
    the one program that is compiled, which has room for what either leaves for the backward pass;
    ``remat`` makes that small. Evaluation, decoding and passes over a cache are as behind it.

    Reference: Bae, Kim, Bayat, Kim, Ha, Schuster, Fisch, Harutyunyan, Ji, Courville, Yun,
    "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level
    Computation", 2025, arXiv:2507.10524.

    Differences from the paper: the capacity of a padded row is that of its tokens, padding left
    out; the warm-up takes a share of the run, not a number of steps. ``"hybrid"`` keeps a cache of
    each recursion, as many entries as at full depth: in one cache that is overwritten, decoding
    would read keys of deeper recursions than training did. ``"shared"`` computes the queries of
    routed tokens alone, where the released code computes all and masks.

    Attributes:
        router: of each recursion, with parameters of its own.
        warmup: share of a training run in which capacities fall from 1; None is without.
    """

    router: Router = ExpertChoiceRouter()
    warmup: Fraction | None = None

    def __post_init__(self) -> None:
        if self.warmup is not None and not 0 < self.warmup.of_run <= 1:
            raise UserError(
                f"warmup.of_run {self.warmup.of_run} must be above 0 and at most 1; "
                "warmup=None is without"
            )
        super().__post_init__()

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
    ) -> tuple[Hidden, list[Went]]:
        """The recursions; while warming up, in a form with slots for all tokens."""
        done, routers = progress(self), self._routers()
        if self.warmup is None or done is None or keys.cached:
            where = {"positions": positions, "segments": segments, "train": train}
            return self._recursions(layers, routers, x, keys, **where)
        warming = _Form(
            program=self, layers=tuple(layers), routers=tuple(routers), keys=keys, train=train,
            name="form",
        )  # fmt: skip
        share = done / self.warmup.of_run
        return nn.cond(share < 1, _Form.warming, _Form.warm, warming, share, x, positions, segments)

    def _routers(self) -> list[Any]:
        return [self.router.copy(parent=self, name=f"router_{r}") for r in range(self.recursions)]

    def _recursions(
        self,
        layers: list[nn.Module],
        routers: list[Any],
        x: Hidden,
        keys: LoopKeys,
        warmth: Scalar | None = None,
        **where: Any,
    ) -> tuple[Hidden, list[Went]]:
        """Gathers the tokens that a recursion keeps, runs it, adds the gated result back.

        Args:
            layers: of a recursion.
            routers: one of each recursion.
            x: the stream.
            keys: at the beginning of the pass.
            warmth: what is left of the way from 1 to each capacity; None has slots for no more.
            where: positions, segments and whether it is training.
        """
        kept, went = where["segments"] > 0, []
        tokens, whole = jnp.sum(kept, axis=1), self.recursions
        before: int | Scalar = whole
        for r in range(whole):
            left = whole - r
            capacity = max(1, x.shape[1] * left // whole)
            limit = jnp.minimum(tokens, jnp.maximum(1, tokens * left // whole))
            part: int | Scalar = left
            if warmth is not None:
                capacity = x.shape[1]
                limit += jnp.floor((tokens - limit) * warmth).astype(limit.dtype)
                part += (whole - left) * warmth
            route = routers[r](x, active=kept, capacity=capacity, limit=limit, share=part / before)
            x = route.scatter_add(x, self._routed(layers, x, route, keys, r, **where))
            kept, before = route.kept, part
            went.append(Went(kept, route.aux))
        return x, went

    def _trace(
        self, valid: Bool[Array, "B T"], went: list[Went], layers: SharedLayers
    ) -> DepthTrace:
        """And the routers' losses."""
        trace = super()._trace(valid, went, layers)
        return dataclasses.replace(trace, aux=_stacked([route.aux for route in went]))


class _Form(nn.Module):
    """What a loop runs on while it warms up, or behind that; ``nn.cond`` takes it as one module.

    Attributes:
        program: the loop.
        layers: of a recursion.
        routers: one of each recursion.
        keys: of which the loop's own pass has none left.
        train: as there.
    """

    program: Any
    layers: Any
    routers: Any
    keys: LoopKeys
    train: bool

    def warming(self, share: Scalar, *arrays: Array) -> tuple[Hidden, list[Went]]:
        """Slots for all tokens; ``share`` of the warm-up is done."""
        return self._run(0.5 * (1 + jnp.cos(jnp.pi * share)), *arrays)

    def warm(self, _: Scalar, *arrays: Array) -> tuple[Hidden, list[Went]]:
        """Behind it."""
        return self._run(None, *arrays)

    def _run(self, warmth: Scalar | None, *arrays: Array) -> tuple[Hidden, list[Went]]:
        x, positions, segments = arrays
        return self.program._recursions(
            list(self.layers),
            list(self.routers),
            x,
            self.keys.again(),
            warmth,
            positions=positions,
            segments=segments,
            train=self.train,
        )


def _stacked(parts: list[dict[str, Weighted]]) -> dict[str, Weighted]:
    """One sum per recursion under each name."""
    return {
        name: Weighted(
            total=jnp.stack([part[name].total for part in parts]),
            weight=jnp.stack([part[name].weight for part in parts]),
        )
        for name in parts[0]
    }

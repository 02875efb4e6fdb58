"""The same layers several times: depth without parameters."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from tokenlab.cache import Cache
from tokenlab.core.arrays import Array, Bool, Hidden, Positions, Prompt, Segments
from tokenlab.core.errors import UserError
from tokenlab.depth.base import DepthProgram, DepthTrace, Layers
from tokenlab.depth.loop_keys import KeySharing, LoopKeys
from tokenlab.routing import Route

Sharing = Literal["cycle", "middle_cycle"]


class SharedLayers(NamedTuple):
    """The modules of a recursive stack; each is one set of parameters, however often it runs.

    Attributes:
        first: layers before the loop.
        loop: layers of one recursion.
        last: layers behind the loop.
    """

    first: list[nn.Module]
    loop: list[nn.Module]
    last: list[nn.Module]


class Recursive(DepthProgram):
    """Every token through the same few layers ``recursions`` times.

    With ``num_layers`` L and N recursions, ``cycle`` loops over L / N layers; ``middle_cycle``
    keeps a first and a last layer of their own and loops over (L - 2) / N. Parameters do not grow
    with N at equal (L - 2) / N, because each layer is one module that is called again.

    In recursion r a layer reads the keys and values that ``keys`` names: ``recursion_wise``, those
    that the tokens of recursion r have in it; ``shared``, those of recursion 1, of which later ones
    compute queries only; ``hybrid``, of each token those of the last recursion up to r that it
    went through. Decoding keeps a cache of each recursion and layer, where keys are shared of each
    layer, and computes the same function as one pass over the whole row.

    Reference: Bae et al., "Relaxed Recursive Transformers: Effective Parameter Sharing with
    Layer-wise LoRA", 2024, arXiv:2410.20672 (without its LoRA).

    Attributes:
        recursions: passes through the loop.
        sharing: which layers are shared.
        keys: whose keys and values a recursion reads.
    """

    recursions: int = 3
    sharing: Sharing = "middle_cycle"
    keys: KeySharing = "recursion_wise"

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
        prompt: Prompt | None = None,
    ) -> tuple[Hidden, DepthTrace, Cache | None]:
        """Runs the ends on all tokens and the loop on those that come to each recursion."""
        if prompt is not None:
            raise UserError(
                f"{type(self).__name__} does not tell its layers which tokens are the prompt; "
                "use depth=Sequential(), or data without a prompt"
            )
        layers = self._layers(block, num_layers)
        count = len(self.cached_layers(num_layers))
        own = [None if cache is None else cache.layer(i) for i in range(count)]
        ends = len(layers.first)
        where = {"positions": positions, "segments": segments, "train": train}
        x, first = self._run(layers.first, x, own[:ends], **where)
        keys = LoopKeys(self.keys, own[ends : count - ends], layers=len(layers.loop))
        x, routes = self._loop(layers.loop, x, keys, **where)
        x, last = self._run(layers.last, x, own[count - ends :], **where)
        if cache is not None:
            cache = cache.after((*first, *keys.finished(), *last))
        return x, self._trace(segments > 0, routes, layers), cache

    @nn.nowrap
    def cached_layers(self, num_layers: int) -> tuple[int, ...]:
        """One cache of each recursion and layer, in order; of each layer where keys are shared."""
        ends, loop = self._sizes(num_layers)
        own = 1 if self.keys == "shared" else self.recursions
        return (
            *range(ends),
            *[ends + i for _ in range(own) for i in range(loop)],
            *range(num_layers - ends, num_layers),
        )

    @nn.nowrap
    def projects(self, num_layers: int) -> tuple[bool, ...]:
        """Not from the second recursion on where keys are shared."""
        ends, loop = self._sizes(num_layers)
        later = (self.recursions - 1) * loop
        return (True,) * (ends + loop) + (self.keys != "shared",) * later + (True,) * ends

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
        """All recursions; and of each the tokens that came to it, or nothing where all did."""
        for r in range(self.recursions):
            x, after = self._run(
                layers, x, keys.given(r, None), positions=positions, segments=segments, train=train
            )
            keys.left(r, after)
        return x, []

    @nn.nowrap
    def _sizes(self, num_layers: int) -> tuple[int, int]:
        """Layers at each end, and of a recursion."""
        ends = 1 if self.sharing == "middle_cycle" else 0
        looped = num_layers - 2 * ends
        if looped < self.recursions or looped % self.recursions:
            raise UserError(
                f"num_layers {num_layers} under {self.sharing} leaves {looped} layers, which are "
                f"not a multiple of recursions {self.recursions}; change one of them"
            )
        return ends, looped // self.recursions

    def _layers(self, block: Layers, num_layers: int) -> SharedLayers:
        ends, loop = self._sizes(num_layers)
        if len(block.kinds()) > 1:
            raise UserError(
                f"{type(self).__name__} shares layers of one kind, not {len(block.kinds())}; "
                "give the model one block"
            )
        names = [f"block_{i}" for i in range(loop)]
        first, last = ["block_first"] * ends, ["block_last"] * ends
        return SharedLayers(
            *(
                [block.copy(parent=block.parent, name=n) for n in part]
                for part in (first, names, last)
            )
        )

    def _run(
        self,
        layers: list[nn.Module],
        x: Hidden,
        given: list[Any],
        *,
        positions: Positions,
        segments: Segments,
        train: bool,
    ) -> tuple[Hidden, list[Any]]:
        """``x`` through ``layers`` in turn, each with what it is ``given``, and that afterwards."""

        def body(layer: nn.Module, x: Hidden, own: Any) -> tuple[Hidden, Any]:
            return layer(x, positions=positions, segments=segments, cache=own, train=train)

        body, after = self._rematerialised(body), []
        for layer, own in zip(layers, given, strict=True):
            x, own = body(layer, x, own)
            after.append(own)
        return x, after

    def _trace(
        self, valid: Bool[Array, "B T"], routes: list[Route], layers: SharedLayers
    ) -> DepthTrace:
        """The trace of a loop whose recursions ran on the tokens of ``routes``, or on all."""
        kept = [route.kept for route in routes] or [valid] * self.recursions

        def of(masks: list[Bool[Array, "B T"]]) -> Bool[Array, "R B T"]:
            loop = [mask for mask in masks for _ in layers.loop]
            return jnp.stack([valid] * len(layers.first) + loop + [valid] * len(layers.last))

        active = of(kept)
        read = None if self.keys == "recursion_wise" else of(kept[:1] * self.recursions)
        return DepthTrace(depth=jnp.sum(active, axis=0), active=active, read=read)

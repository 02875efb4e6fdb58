"""The same layers several times: depth without parameters."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from tokenlab.cache import Cache
from tokenlab.core.arrays import Array, Bool, Hidden, Positions, Segments
from tokenlab.core.errors import UserError
from tokenlab.depth.base import DepthProgram, DepthTrace, Layers

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

    Reference: Bae et al., "Relaxed Recursive Transformers: Effective Parameter Sharing with
    Layer-wise LoRA", 2024, arXiv:2410.20672 (without its LoRA).

    Attributes:
        recursions: passes through the loop.
        sharing: which layers are shared.
    """

    recursions: int = 3
    sharing: Sharing = "middle_cycle"

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
        """Runs all tokens to the full depth."""
        layers = self._layers(block, num_layers)
        order = layers.first + layers.loop * self.recursions + layers.last
        x = self._run(order, x, positions=positions, segments=segments, train=train)
        valid = segments > 0
        return x, trace_of(valid, [valid] * self.recursions, layers), None

    @nn.nowrap
    def cached_layers(self, num_layers: int) -> tuple[int, ...]:
        """None yet."""
        raise UserError(
            f"{type(self).__name__} does not decode with a cache yet; evaluate the run instead"
        )

    def _layers(self, block: Layers, num_layers: int) -> SharedLayers:
        ends = 1 if self.sharing == "middle_cycle" else 0
        looped = num_layers - 2 * ends
        if looped < self.recursions or looped % self.recursions:
            raise UserError(
                f"num_layers {num_layers} under {self.sharing} leaves {looped} layers, which are "
                f"not a multiple of recursions {self.recursions}; change one of them"
            )
        if len(block.kinds()) > 1:
            raise UserError(
                f"{type(self).__name__} shares layers of one kind, not {len(block.kinds())}; "
                "give the model one block"
            )
        names = [f"block_{i}" for i in range(looped // self.recursions)]
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
        *,
        positions: Positions,
        segments: Segments,
        train: bool,
    ) -> Hidden:
        """``x`` through ``layers`` in turn."""

        def body(layer: nn.Module, x: Hidden) -> Hidden:
            return layer(x, positions=positions, segments=segments, train=train)[0]

        body = self._rematerialised(body)
        for layer in layers:
            x = body(layer, x)
        return x


def trace_of(
    valid: Bool[Array, "B T"], kept: list[Bool[Array, "B T"]], layers: SharedLayers
) -> DepthTrace:
    """The trace of a loop whose recursion r ran on the tokens ``kept[r]``."""
    masks = [valid] * len(layers.first)
    masks += [mask for mask in kept for _ in layers.loop]
    active = jnp.stack(masks + [valid] * len(layers.last))
    return DepthTrace(depth=jnp.sum(active, axis=0), active=active)

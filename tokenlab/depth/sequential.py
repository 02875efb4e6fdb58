"""Every token through every layer: the plain Transformer stack."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from tokenlab.cache import Cache, LayerCache
from tokenlab.core.arrays import Hidden, Positions, Prompt, Segments
from tokenlab.core.errors import UserError
from tokenlab.core.reports import REPORTS
from tokenlab.depth.base import DepthProgram, DepthTrace, Layers


class Sequential(DepthProgram):
    """Applies ``num_layers`` blocks in turn, each with parameters of its own.

    Where the model has a pattern of blocks, they take turns; then layers are not scanned.

    Attributes:
        scan: run the layers as one compiled loop over stacked parameters: compile time does not
            grow with depth. Unrolled layers run faster on a CPU, and decoding needs them.
    """

    scan: bool = False

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
        """Runs all layers on all tokens."""
        if self.scan and cache is not None:
            raise ValueError("a cache needs unrolled layers; decode with models.unrolled(...)")

        def body(
            layer: nn.Module, x: Hidden, own: LayerCache | None
        ) -> tuple[Hidden, LayerCache | None]:
            where = {"positions": positions, "segments": segments, "prompt": prompt}
            return layer(x, **where, cache=own, train=train)

        body = self._rematerialised(body, scanned=self.scan)
        kinds = block.kinds()
        if self.scan and len(kinds) > 1:
            raise UserError(
                f"scan=True needs layers of one kind, not {len(kinds)}; set depth.scan=False"
            )
        if self.scan:
            run = nn.scan(
                body,
                variable_axes={"params": 0, REPORTS: 0},
                split_rngs={"params": True, "dropout": True, "routes": True},
                length=num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = run(block, x, None)
        else:
            after = []
            for i in range(num_layers):
                kind = kinds[i % len(kinds)]
                layer = kind.copy(parent=block.parent, name=f"block_{i}")
                x, own = body(layer, x, None if cache is None else cache.layer(i))
                after.append(own)
            cache = None if cache is None else cache.after(tuple(after))
        valid = segments > 0
        trace = DepthTrace(
            depth=jnp.where(valid, num_layers, 0),
            active=jnp.broadcast_to(valid[None], (num_layers, *valid.shape)),
        )
        return x, trace, cache

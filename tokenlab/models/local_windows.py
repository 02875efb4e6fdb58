"""Attention of patches among those of their window."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kernels_pallas.block_sparse_attention import Bidirectional
from tokenlab.core.arrays import Array, Bool, Hidden, Positions
from tokenlab.models.attention import Attention
from tokenlab.models.grid import Grid, Window, exchanged


class LocalWindows(nn.Module):
    """Softmax attention among the patches of a window; other tokens read nothing.

    Reference: Liu, Lin, Cao, Hu, Wei, Zhang, Lin, Guo, "Swin Transformer: Hierarchical Vision
    Transformer using Shifted Windows", 2021, arXiv:2103.14030.

    Differences from the paper: windows in three dimensions, with rotary positions; a shift makes
    smaller windows at the edges in place of masked ones that wrap around.

    Attributes:
        attention: of each window; its rule is not read, patches see each other both ways.
        grid: where the patches lie.
        window: which patches attend to each other.
        shifted: whether windows begin half a window before the edge.
    """

    attention: Attention
    grid: Grid
    window: Window
    shifted: bool = False

    @nn.compact
    def __call__(self, x: Hidden, *, positions: Positions, vision: Bool[Array, "B T"]) -> Hidden:
        """What each patch reads of its window.

        Args:
            x: normalised residual stream.
            positions: position of each token in its document.
            vision: which tokens are patches.
        """
        batch, length, dim = x.shape
        if length < self.grid.end and not self.is_initializing():
            return jnp.zeros_like(x)
        index, inside, place = self._gathered(positions, vision)
        rows, size = inside.shape[1], inside.shape[2]

        def windows(each: Array) -> Array:
            return each.reshape(batch * rows, size, *each.shape[2:])

        patches = index, inside.reshape(batch, -1)
        picked = exchanged(x, *patches, place, vision)
        attention = self.attention.copy(
            parent=self, name="softmax", rule=Bidirectional(), prefill=None
        )
        out, _ = attention(
            windows(picked),
            positions=windows(jnp.take_along_axis(positions, index, axis=1)),
            segments=inside.reshape(batch * rows, size).astype(jnp.int32),
        )
        return exchanged(out.reshape(batch, -1, dim), place, vision, *patches)

    def _gathered(
        self, positions: Positions, vision: Bool[Array, "B T"]
    ) -> tuple[Array, Bool[Array, "B W N"], Array]:
        """Of each place in a window its token and whether it has one; of each token its place."""
        grid = self.grid
        patches = grid.windows(self.window, shifted=self.shifted)
        batch, length = vision.shape
        spans = max(1, length // grid.end)
        first = vision & (positions == grid.start)
        number = jnp.cumsum(first, axis=1) - 1
        begins = (
            jnp.full((batch, spans), length)
            .at[jnp.arange(batch)[:, None], jnp.where(first, number, spans)]
            .set(jnp.broadcast_to(jnp.arange(length)[None], first.shape), mode="drop")
        )
        index = begins[:, :, None, None] + jnp.asarray(patches)[None, None]
        inside = (jnp.asarray(patches) >= 0)[None, None] & (begins < length)[:, :, None, None]
        inside = jnp.broadcast_to(inside, index.shape)
        index = jnp.clip(jnp.where(inside, index, 0), 0, length - 1)
        places = np.zeros(grid.size, np.int64)
        flat = patches.reshape(-1)
        places[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
        patch = jnp.where(vision, positions - grid.start, 0)
        place = jnp.where(vision, number, 0) * patches.size + jnp.take(jnp.asarray(places), patch)
        return index.reshape(batch, -1), inside.reshape(batch, -1, patches.shape[1]), place

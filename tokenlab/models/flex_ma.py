"""Two-way state space layers that take the place of attention."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tokenlab.attention import Scanned, ssd
from tokenlab.core.arrays import Array, Bool, Float, Hidden, Positions, Prompt, Segments
from tokenlab.core.parameters import parameter
from tokenlab.models.attention import Attention
from tokenlab.models.grid import Axis, Grid
from tokenlab.models.layers import Linear, RMSNorm

# Shares of the state that heads forget per token at the start, from the slowest to the fastest.
_FORGOTTEN = (0.002, 0.3)


class FlexMA(nn.Module):
    """Two-way state space with the projections of attention.

    ``h_i = a_i h_{i-1} + k_i v_iᵀ``, ``y_i = h_iᵀ q_i`` over all tokens, and the same backwards
    over the prompt; ``y = g y_forward + (1 - g) y_backward``, with ``g = sigmoid(W_g x)`` in the
    prompt and 1 behind it. ``a = exp(-softplus(w x + b) exp(r))`` of each head. Each head is
    normalised, then ``W_o`` follows. There are no rotary positions.

    Reference: that of :class:`MMATE`.

    Attributes:
        attention: what it takes the place of; its heads and projections.
        grid: where the patches lie.
        fastest: along which axis patches are read.
        chunk: tokens that are computed as one product.
        normalised: whether each head is normalised before ``W_o``.
    """

    attention: Attention
    grid: Grid
    fastest: Axis = "column"
    chunk: int = 64
    normalised: bool = True

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segments: Segments,
        vision: Bool[Array, "B T"],
        prompt: Prompt | None,
        state: Float[Array, "B H N P"] | None = None,
    ) -> tuple[Hidden, Float[Array, "B H N P"]]:
        """What each token reads, and the state after the last.

        Args:
            x: normalised residual stream.
            positions: position of each token in its document.
            segments: document of each token, 0 for padding.
            vision: which tokens are patches.
            prompt: which tokens are read backwards as well; None is none.
            state: what was read before, for tokens that go on from there.
        """
        order = self.grid.order(self.fastest)
        where = {"vision": vision, "positions": positions}
        x = self.grid.permuted(x, order, **where)
        valid = segments > 0
        row = Scanned(*self._written(x), valid=valid, starts=valid & (positions == 0))
        y, state = ssd(row, state=state, chunk=self.chunk)
        gate = nn.sigmoid(Linear(y.shape[2], axes=("embed", "heads"), zero=True, name="gate")(x))
        if prompt is not None:
            backwards = row._replace(valid=valid & prompt).reversed()
            behind = jnp.flip(ssd(backwards, chunk=self.chunk)[0], axis=1)
            gate = jnp.where(prompt[..., None], gate, 1.0).astype(jnp.float32)[..., None]
            y = gate * y + (1 - gate) * behind
        if self.normalised:
            y = RMSNorm(name="norm")(y)
        y = y.astype(x.dtype).reshape(*x.shape[:2], -1)
        out = Linear(x.shape[-1], axes=("heads", "embed"), name="out")(y)
        return self.grid.permuted(out, np.argsort(order), **where), state

    def _written(self, x: Hidden) -> tuple[Array, Array, Array, Array]:
        """Queries, keys, values and log-decays, of every query head."""
        part = self.attention
        width = part.width(x.shape[-1])

        def heads(name: str, count: int, norm: RMSNorm | None) -> Float[Array, "B T H E"]:
            bias, axes = part.qkv_bias, ("embed", "heads")
            flat = Linear(count * width, axes=axes, bias=bias, name=name)(x)
            split = flat.reshape(*x.shape[:2], count, width)
            split = split if norm is None else norm.copy(parent=self, name=f"{name}_norm")(split)
            return jnp.repeat(split, part.num_heads // count, axis=2)

        q = heads("q", part.num_heads, part.qk_norm)
        k = heads("k", part.num_kv_heads, part.qk_norm)
        v = heads("v", part.num_kv_heads, None)
        step = Linear(part.num_heads, axes=("embed", "heads"), bias=True, name="decay")(x)
        log_rate = parameter(self, "log_rate", _log_rates, (part.num_heads,), ("heads",))
        log_decay = -nn.softplus(step.astype(jnp.float32)) * jnp.exp(log_rate)[None, None]
        return q, k, v, log_decay


def _log_rates(key: Array, shape: tuple[int, ...], dtype: Any) -> Float[Array, " H"]:
    """Rates at which heads forget :data:`_FORGOTTEN` of the state where ``w x + b`` is zero."""
    forgotten = np.geomspace(*_FORGOTTEN, shape[0])
    return jnp.asarray(np.log(-np.log1p(-forgotten) / math.log(2)), dtype)

"""Feed-forward layers whose backward passes see the columns that matter, and keep no others."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Bool, Float, Hidden
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import dense_init, parameter
from tokenlab.models.layers import LowRank, SwiGLU

_ROUNDING = 1e-9


class PrunedSwiGLU(SwiGLU):
    """``SwiGLU`` as it is, with a backward pass over a share of its inner columns.

    Kept are the ``(1 - pruned) F`` columns with the highest ``|silu(gate)|_2 + |up|_2`` over the
    tokens of a batch. The gradient by the input is that of the layer without the other columns, and
    they get none; with ``pruned=0`` it is exact. Of a token two numbers per kept column are saved,
    and, where kernels or adapters are trained too, its input.

    Reference: Tuowei Wang, Xingyu Chen, Kun Li, Ting Cao, Ju Ren, Yaoxue Zhang, "LeMo: Enabling
    LEss Token Involvement for MOre Context Fine-tuning", 2025, arXiv:2501.09767 (published as
    JENGA); its released code.

    Differences from the paper: padding has no say in the choice of columns. Kernels need not be
    frozen; columns that are kept get their gradients. Each micro-batch chooses for itself.

    Attributes:
        pruned: share of the columns that the backward pass leaves out, from 0 to below 1.
    """

    pruned: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.pruned < 1:
            raise UserError(f"PrunedSwiGLU.pruned is {self.pruned}; use 0 or more, and below 1")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Hidden, *, valid: Bool[Array, "B T"] | None = None, train: bool = False
    ) -> Hidden:
        """Applies the gated layer to every token."""
        kernel = functools.partial(_Kernel, adapter=self.adapter)
        gate = kernel(self.hidden_dim, name="gate")(x.shape[-1], x.dtype)
        up = kernel(self.hidden_dim, name="up")(x.shape[-1], x.dtype)
        down = kernel(x.shape[-1], ("mlp", "embed"), name="down")(self.hidden_dim, x.dtype)
        counts = jnp.ones(x.shape[:2], bool) if valid is None else valid
        flat = x.reshape(-1, x.shape[-1])
        kept = max(1, math.floor((1 - self.pruned) * self.hidden_dim + _ROUNDING))
        return _gated(flat, gate, up, down, counts.reshape(-1), kept).reshape(x.shape)


class _Kernel(nn.Module):
    """The kernel of ``Linear`` with its adapter merged, so that it can be read by columns."""

    features: int
    axes: tuple[str, str] = ("embed", "mlp")
    adapter: LowRank | None = None

    @nn.compact
    def __call__(self, inputs: int, dtype: Any) -> Float[Array, "D F"]:
        kernel = parameter(self, "kernel", dense_init, (inputs, self.features), self.axes)
        if self.adapter is not None and self.adapter.adapts(self.name):
            # A linear map is what it does to unit vectors.
            unit = jnp.eye(inputs, dtype=kernel.dtype)[None]
            adapter = self.adapter.copy(parent=self, name="adapter")
            kernel += adapter(unit, axes=self.axes, like=kernel[None])[0]
        return kernel.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _gated(x: Array, gate: Array, up: Array, down: Array, counts: Array, kept: int) -> Array:
    """``(silu(x gate) * (x up)) down``; the backward pass sees ``kept`` columns."""
    del counts, kept
    return (nn.silu(x @ gate) * (x @ up)) @ down


def _forward(x: Any, gate: Any, up: Any, down: Any, counts: Any, kept: int) -> tuple[Array, Any]:
    trained = gate.perturbed or up.perturbed or down.perturbed
    x, gate, up, down, counts = (each.value for each in (x, gate, up, down, counts))
    gates, ups = x @ gate, x @ up
    opened = nn.silu(gates)

    def norms(columns: Array) -> Float[Array, " F"]:
        wide = jnp.where(counts[:, None], columns, 0).astype(jnp.float32)
        return jnp.sqrt(jnp.sum(wide * wide, axis=0))

    _, index = jax.lax.top_k(norms(opened) + norms(ups), kept)
    saved = (gates[:, index], ups[:, index], index, gate, up, down, x if trained else None)
    return (opened * ups) @ down, saved


def _backward(kept: int, saved: Any, cotangent: Any) -> tuple[Array | None, ...]:
    gates, ups, index, gate, up, down, x = saved
    cotangent = jnp.asarray(cotangent)
    opened, slope = jax.vjp(nn.silu, gates)
    by_hidden = cotangent @ down[index].T
    (by_gates,) = slope(by_hidden * ups)
    by_ups = by_hidden * opened
    by_x = by_gates @ gate[:, index].T + by_ups @ up[:, index].T
    if x is None:
        return by_x, None, None, None, None
    by_gate, by_up = (
        jnp.zeros_like(kernel).at[:, index].set(x.T @ by)
        for kernel, by in ((gate, by_gates), (up, by_ups))
    )
    by_down = jnp.zeros_like(down).at[index].set((opened * ups).T @ cotangent)
    return by_x, by_gate, by_up, by_down, None


_gated.defvjp(_forward, _backward, symbolic_zeros=True)

"""The score family: how well a token does for a choice, from its stream."""

from __future__ import annotations

import abc

import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Float, Hidden
from tokenlab.core.parameters import dense_init, parameter

_small = nn.initializers.normal(0.02)


class Scores(nn.Module, abc.ABC):
    """The score family: one float32 score of each token for each of ``choices``."""

    @abc.abstractmethod
    def __call__(self, x: Hidden, *, choices: int) -> Float[Array, "B T C"]:
        """The scores.

        Args:
            x: the residual stream.
            choices: how many scores a token gets.
        """


class LinearScores(Scores):
    """``W x``.

    Reference: the linear router of Bae et al., "Mixture-of-Recursions: Learning Dynamic Recursive
    Depths for Adaptive Token-Level Computation", 2025, arXiv:2507.10524.
    """

    @nn.compact
    def __call__(self, x: Hidden, *, choices: int) -> Float[Array, "B T C"]:
        """One product."""
        shape = (x.shape[-1], choices)
        weight = parameter(self, "kernel", _small, shape, ("embed", "norm"))
        return x.astype(jnp.float32) @ weight


class MLPScores(Scores):
    """``W_2 gelu(W_1 x)``.

    Reference: the MLP router, and with ``widening=2`` the wide one, of Bae et al.,
    "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level
    Computation", 2025, arXiv:2507.10524.

    Attributes:
        widening: width of the hidden layer over that of the stream.
    """

    widening: int = 1

    @nn.compact
    def __call__(self, x: Hidden, *, choices: int) -> Float[Array, "B T C"]:
        """Two products."""
        width = x.shape[-1]
        hidden = self.widening * width
        inner = parameter(self, "hidden", dense_init, (width, hidden), ("embed", "mlp"))
        outer = parameter(self, "kernel", _small, (hidden, choices), ("mlp", "norm"))
        return nn.gelu(x.astype(jnp.float32) @ inner, approximate=False) @ outer

"""The score family: how well a token does for a choice, from its stream."""

from __future__ import annotations

import abc

import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Float, Hidden
from tokenlab.core.parameters import dense_init, parameter

_small = nn.initializers.normal(0.02)
_he = nn.initializers.he_normal()


class Scores(nn.Module, abc.ABC):
    """The score family: one float32 score of each token for each of ``choices``."""

    @abc.abstractmethod
    def __call__(self, x: Hidden, *, choices: int) -> Float[Array, "B T C"]:
        """The scores.

        Args:
            x: the residual stream.
            choices: how many scores a token gets.
        """

    @abc.abstractmethod
    def flops(self, width: int, choices: int) -> int:
        """Floating-point operations of a token, from a stream of ``width``."""


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

    def flops(self, width: int, choices: int) -> int:
        """One product."""
        return 2 * width * choices


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

    def flops(self, width: int, choices: int) -> int:
        """Two products."""
        return 2 * self.widening * width * (width + choices)


class NarrowScores(Scores):
    """``W_2 relu(W_1 x + b_1) + b_2``, narrower within; He initialisation, biases 0 at the start.

    Reference: the router of Zhao et al., "SkipGPT: Dynamic Layer Pruning Reinvented with Token
    Awareness and Module Decoupling", 2025, arXiv:2506.04179.

    Attributes:
        divisor: width of the stream over that of the hidden layer.
    """

    divisor: int = 4

    @nn.compact
    def __call__(self, x: Hidden, *, choices: int) -> Float[Array, "B T C"]:
        """Two products."""
        width = x.shape[-1]
        hidden = max(1, width // self.divisor)
        zeros = nn.initializers.zeros
        inner = parameter(self, "hidden", _he, (width, hidden), ("embed", "mlp"))
        inner_bias = parameter(self, "hidden_bias", zeros, (hidden,), ("mlp",))
        outer = parameter(self, "kernel", _he, (hidden, choices), ("mlp", "norm"))
        outer_bias = parameter(self, "bias", zeros, (choices,), ("norm",))
        within = nn.relu(x.astype(jnp.float32) @ inner + inner_bias[None, None])
        return within @ outer + outer_bias[None, None]

    def flops(self, width: int, choices: int) -> int:
        """Two products."""
        return 2 * max(1, width // self.divisor) * (width + choices)

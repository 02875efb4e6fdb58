"""Output heads: where the vocabulary projection's weight comes from.

A head gives a weight and never multiplies by it: losses go through
``kernels_pallas.linear_cross_entropy``, decoding through ``Transformer.logits``.
"""

from __future__ import annotations

import abc

from flax import linen as nn

from tokenlab.core.arrays import Array, Float
from tokenlab.core.parameters import dense_init, parameter


class Head(nn.Module, abc.ABC):
    """The head family.

    Attributes:
        softcap: bound c of logits by ``c * tanh(logit / c)``, or None.
    """

    softcap: float | None = None

    @abc.abstractmethod
    def __call__(self, embedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
        """The projection weight, given the input embedding."""


class TiedHead(Head):
    """Projects with the input embedding itself.

    Reference: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2016,
    arXiv:1608.05859.
    """

    def __call__(self, embedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
        """The embedding, unchanged."""
        return embedding


class LinearHead(Head):
    """Projects with a weight of its own."""

    @nn.compact
    def __call__(self, embedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
        """A weight of the embedding's shape."""
        return parameter(self, "kernel", _fan_last, embedding.shape, ("vocab", "embed"))


def _fan_last(key, shape, dtype):  # the initialiser of a [D, V] matrix, stored as [V, D]
    return dense_init(key, shape[::-1], dtype).T

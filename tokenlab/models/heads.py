"""Output heads: where the vocabulary projection's weight comes from.

A head gives a weight and never multiplies by it: losses go through
``kernels_pallas.linear_cross_entropy``, decoding through ``Transformer.logits``.
"""

from __future__ import annotations

import abc
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Float
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import dense_init, parameter
from tokenlab.core.projection import SharedRows
from tokenlab.models.codes import contiguous_codes, random_codes


class Head(nn.Module, abc.ABC):
    """The head family.

    Attributes:
        softcap: bound c of logits by ``c * tanh(logit / c)``, or None.
    """

    softcap: float | None = None

    @abc.abstractmethod
    def __call__(self, embedding: Float[Array, "V D"]) -> Float[Array, "V D"] | SharedRows:
        """The projection weight, given the input embedding."""

    @nn.nowrap
    def rows(self, vocab_size: int) -> int:
        """Rows that a hidden state is multiplied with; one per token unless they are shared."""
        return vocab_size


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


class VQHead(Head):
    """Projects onto a codebook; every token has one of its rows: ``logit[v] = h · C[M(v)]``.

    The loss never expands to the vocabulary: with ``n_k`` tokens in code k,
    ``log Σ_v exp logit[v] = log Σ_k n_k exp(h · C[k])``. Tokens of one code are equally likely in
    every context unless ``token_bias`` tells them apart, and an arg-max takes the lowest id of
    the best code, which is the most frequent token where ids are sorted by frequency. Filters
    such as top-p cut inside a code at an arbitrary place.

    The map is a table beside the parameters, saved with them and never trained:
    ``models.codes.with_codes`` sets it, to what ``frequency_codes`` or ``k_means`` give.

    Reference: Shao, Huang, Wu, Cheng, Wu, Shan, Zheng, "VQ-Logits: Compressing the Output
    Bottleneck of Large Language Models via Vector Quantized Logits", 2025, arXiv:2505.10202,
    equations 1 to 3.

    Differences from the paper: the map stays as it was made, for how the paper learns it is not
    published; ``token_bias`` is an addition.

    Attributes:
        softcap: must be None: a cap does not commute with the numbers of tokens.
        num_codes: rows K of the codebook.
        codes: the first map: ``"random"`` (balanced), or ``"contiguous"`` runs of ids.
        seed: of a random map.
        token_bias: whether each token has a bias of its own, which no context changes.
    """

    num_codes: int = 256
    codes: Literal["random", "contiguous"] = "random"
    seed: int = 0
    token_bias: bool = False

    def __post_init__(self) -> None:
        if self.softcap is not None:
            raise ValueError("VQHead takes no softcap; set head.softcap=None")
        super().__post_init__()

    @nn.nowrap
    def rows(self, vocab_size: int) -> int:
        """The codebook's."""
        return self.num_codes

    @nn.compact
    def __call__(self, embedding: Float[Array, "V D"]) -> SharedRows:
        """The codebook and who shares its rows."""
        vocabulary, dim = embedding.shape
        if self.num_codes > vocabulary:
            raise UserError(
                f"head.num_codes={self.num_codes} exceeds the {vocabulary} tokens; set it lower"
            )
        shape = (self.num_codes, dim)
        rows = parameter(self, "codebook", _fan_last, shape, ("vocab", "embed"))
        # A float, because gradients are taken of all parameters; ids up to 2**24 are exact.
        table = jax.lax.stop_gradient(
            parameter(self, "codes", self._first_codes, (vocabulary,), ("codes",))
        )
        bias = None
        if self.token_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (vocabulary,), ("codes",))
        return SharedRows(rows=rows, codes=jnp.round(table).astype(jnp.int32), bias=bias)

    def _first_codes(self, key, shape, dtype):
        del key
        if self.codes == "contiguous":
            return jnp.asarray(contiguous_codes(shape[0], self.num_codes), dtype)
        return jnp.asarray(random_codes(shape[0], self.num_codes, seed=self.seed), dtype)


def _fan_last(key, shape, dtype):  # the initialiser of a [D, V] matrix, stored as [V, D]
    return dense_init(key, shape[::-1], dtype).T

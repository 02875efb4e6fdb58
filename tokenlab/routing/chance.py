"""Routing by chance: what a learned choice is compared with."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Float, Hidden
from tokenlab.routing.base import Router
from tokenlab.routing.expert_choice import Asked, Kept, ScoringRouter, highest


class RandomRouter(ScoringRouter):
    """Any tokens, as many as expert choice keeps, under learned gates.

    The draw of a token is a hash of the bits of its stream, so that the same input gives the same
    route without a stream of random numbers; passes that round otherwise choose otherwise.

    Reference: the random router of Bae et al., "Mixture-of-Recursions: Learning Dynamic Recursive
    Depths for Adaptive Token-Level Computation", 2025, arXiv:2507.10524.
    """

    causal: ClassVar[bool] = False

    def _kept(self, x: Hidden, scores: Float[Array, "B T"], asked: Asked) -> Kept:
        return highest(draws(x), asked), {}

    @nn.nowrap
    def causal_twin(self) -> Router:
        """The same share of tokens, each by itself."""
        return ChanceRouter(alpha=self.alpha, temperature=self.temperature, head=self.head)


class ChanceRouter(ScoringRouter):
    """Each active token with the chance ``share``, by the draws of ``RandomRouter``.

    Reference: as ``RandomRouter``, whose causal twin it is.
    """

    causal: ClassVar[bool] = True

    def _kept(self, x: Hidden, scores: Float[Array, "B T"], asked: Asked) -> Kept:
        return asked.active & (draws(x) < asked.share), {}

    @nn.nowrap
    def causal_twin(self) -> Router:
        """Itself."""
        return self


def draws(x: Hidden, salt: int = 0) -> Float[Array, "B T"]:
    """A number of [0, 1) for each token, from the bits of its stream in float32.

    Args:
        x: the stream.
        salt: makes draws from the same stream independent; 0 to 2^32 - 1.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    odd = 2 * jnp.arange(x.shape[-1], dtype=jnp.uint32) + 1
    mixed = jnp.sum(bits * (odd * jnp.uint32(0x9E3779B1))[None, None], axis=-1, dtype=jnp.uint32)
    mixed ^= jnp.uint32(salt)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):  # MurmurHash3's last steps
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(multiplier)
    return (mixed >> 8).astype(jnp.float32) / 2**24

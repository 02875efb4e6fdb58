"""The token importance family: which calibration tokens a quantised layer must get right."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Float, Hidden, Int, Positions, Segments, Tokens, Weights
from tokenlab.core.attention_mass import attention_mass


@flax.struct.dataclass
class LayerView:
    """What one layer makes of calibration rows.

    Attributes:
        tokens: their ids.
        counts: how often each token occurs in all calibration rows.
        positions: position of each token in its document.
        segments: 0 for padding.
        hidden: the stream that the layer reads.
        queries: after rotary positions.
        keys: likewise.
        rule: which keys a query may see (``kernels_pallas.block_sparse_attention.MaskRule``).
        scale: factor of the scores.
        softcap: bound of the scores, or None.
    """

    tokens: Tokens
    counts: Int[Array, "B T"]
    positions: Positions
    segments: Segments
    hidden: Hidden
    queries: Float[Array, "B T H E"]
    keys: Float[Array, "B T K E"]
    rule: Any = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False)
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenImportance(abc.ABC):
    """The token importance family: weights of a row's tokens, 1 on average, 0 for padding."""

    def __call__(self, layer: LayerView) -> Weights:
        """Weights of all tokens of the rows, float32."""
        real = layer.segments > 0
        weights = jnp.where(real, self.unscaled(layer), 0.0)
        total = jnp.sum(weights, axis=1, keepdims=True)
        count = jnp.sum(real, axis=1, keepdims=True).astype(jnp.float32)
        mean_one = weights * (count / jnp.where(total > 0, total, 1.0))
        return jnp.where(total > 0, mean_one, real.astype(jnp.float32))

    @abc.abstractmethod
    def unscaled(self, layer: LayerView) -> Weights:
        """Weights up to a factor, 0 or more; of padding they are not read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(TokenImportance):
    """Every token counts the same: plain GPTQ."""

    def unscaled(self, layer: LayerView) -> Weights:
        """Ones."""
        return jnp.ones(layer.segments.shape, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstPositions(TokenImportance):
    """The first tokens of a row alone.

    Attributes:
        count: tokens.
    """

    count: int

    def unscaled(self, layer: LayerView) -> Weights:
        """1 up to ``count``, 0 after."""
        return (_places(layer.segments) < self.count).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstAndLastPositions(TokenImportance):
    """The first and the last tokens of a row alone.

    Attributes:
        first: tokens at the beginning.
        last: tokens at the end.
    """

    first: int
    last: int

    def unscaled(self, layer: LayerView) -> Weights:
        """1 at both ends, 0 between."""
        place = _places(layer.segments)
        length = jnp.sum(layer.segments > 0, axis=1, keepdims=True)
        return ((place < self.first) | (place >= length - self.last)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredImportance(TokenImportance):
    """Weights by a score, stretched from ``lowest`` to ``highest`` in each row.

    ``r = lowest + (highest - lowest) (a - min a) / (max a - min a)``, and 1 where all are equal.

    Reference: Sung, Yadav, Li, Yoon, Bansal, "RSQ: Learning from Important Tokens Leads to Better
    Quantized LLMs", 2025, arXiv:2503.01820.

    Attributes:
        lowest: weight of the least important token, before weights are scaled to a mean of 1.
        highest: weight of the most important one.
    """

    lowest: float = 0.005
    highest: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.lowest <= self.highest or self.highest == 0:
            raise ValueError(
                f"lowest {self.lowest} and highest {self.highest} must be 0 <= lowest <= highest"
            )

    def unscaled(self, layer: LayerView) -> Weights:
        """The score, stretched."""
        if self.lowest == self.highest:
            return jnp.ones(layer.segments.shape, jnp.float32)
        score, real = self.scores(layer).astype(jnp.float32), layer.segments > 0
        low = jnp.min(jnp.where(real, score, jnp.inf), axis=1, keepdims=True)
        high = jnp.max(jnp.where(real, score, -jnp.inf), axis=1, keepdims=True)
        span = jnp.where(high > low, high - low, 1.0)
        stretched = self.lowest + (self.highest - self.lowest) * (score - low) / span
        return jnp.where(high > low, stretched, 1.0)

    @abc.abstractmethod
    def scores(self, layer: LayerView) -> Weights:
        """Larger is more important."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConcentration(ScoredImportance):
    """By the attention that a token receives, over all heads and queries.

    Reference: Sung, Yadav, Li, Yoon, Bansal, "RSQ: Learning from Important Tokens Leads to Better
    Quantized LLMs", 2025, arXiv:2503.01820, its default.

    Attributes:
        lowest: weight of the least important token, before weights are scaled to a mean of 1.
        highest: weight of the most important one.
        block: queries whose attention is in memory at a time.
    """

    block: int = 128

    def scores(self, layer: LayerView) -> Weights:
        """Column sums of attention."""
        return attention_received(layer, block=self.block)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRarity(ScoredImportance):
    """By how seldom a token occurs in the calibration rows: ``-log count``."""

    def scores(self, layer: LayerView) -> Weights:
        """Minus the logarithm of the count."""
        return -jnp.log(layer.counts.astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationNorm(ScoredImportance):
    """By the norm of the stream at a token."""

    def scores(self, layer: LayerView) -> Weights:
        """The Euclidean norm."""
        return jnp.linalg.norm(layer.hidden.astype(jnp.float32), axis=-1)


def _places(segments: Segments) -> Int[Array, "B T"]:
    """How many real tokens of its row come before each one."""
    return jnp.cumsum(segments > 0, axis=1) - 1


def attention_received(layer: LayerView, *, block: int) -> Weights:
    """``a_j = Σ_h Σ_i A_hij``: the columns of the attention matrix, summed in float32.

    Rows of the matrix are complete softmaxes, so they are made a block of queries at a time, and
    the whole of it is never in memory.

    Args:
        layer: queries, keys and the rule of their masks.
        block: queries at a time.
    """
    positions, segments = layer.positions, layer.segments
    mass = attention_mass(
        q=layer.queries,
        k=layer.keys.swapaxes(1, 2),
        q_positions=positions,
        q_segments=segments,
        kv_positions=positions[:, None],
        kv_segments=segments[:, None],
        rule=layer.rule,
        scale=layer.scale,
        softcap=layer.softcap,
        block=block,
    )
    return jnp.sum(mass, axis=(1, 2))

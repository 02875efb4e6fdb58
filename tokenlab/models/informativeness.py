"""How much blocks of tokens have to say to a layer, and how many of them it keeps."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.block_sparse_attention import MaskRule
from tokenlab.cache import Heads
from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int, Positions, Segments
from tokenlab.core.errors import UserError
from tokenlab.core.reports import report
from tokenlab.core.weighted import Weighted
from tokenlab.models.layers import Linear

BlockScores = Float[Array, "B N"]
TileScores = Float[Array, "B N N"]
_WHOLE = ("norm", "embed_act")  # on every device: predictors are small, and lose units unevenly
_ROUNDING = 1e-9  # of shares such as 0.29 of 100


def tile_scores(
    *,
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    positions: Positions,
    segments: Segments,
    rule: MaskRule,
    scale: float,
    block: int,
) -> TileScores:
    """``M[b, i, j] = max over pairs of the tile of Σ_h relu(scale * q_h · k_h)``, symmetric.

    Pairs that the rule hides count as 0. The half above the diagonal, where a causal rule shows
    nothing, repeats the half below it. One block of queries is looked at at a time, so that the
    scores of all pairs are never there at once.

    Args:
        q: queries, turned by their positions.
        k: keys, likewise.
        positions: position of each token in its document.
        segments: 0 for padding.
        rule: which keys a query may see.
        scale: factor of the scores.
        block: tokens of a block; the last one may have fewer.
    """
    size = q.shape[1] + -q.shape[1] % block

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(len(x), -1, block, *x.shape[2:]), 1, 0)

    groups = q.shape[2] // k.shape[2]
    grouped = q.reshape(*q.shape[:2], k.shape[2], groups, q.shape[3])
    keys = jnp.pad(k, ((0, 0), (0, size - k.shape[1]), (0, 0), (0, 0)))
    kv_positions, kv_segments = (
        jnp.pad(x, ((0, 0), (0, size - x.shape[1])))[:, None] for x in (positions, segments)
    )

    def row(queries: tuple[Array, Array, Array]) -> Float[Array, "B N"]:
        q, q_positions, q_segments = queries
        scores = jnp.einsum("bskge,btke->bkgst", q, keys, preferred_element_type=jnp.float32)
        total = jnp.sum(nn.relu(scale * scores), axis=(1, 2))
        shown = rule(q_positions[:, :, None], kv_positions, q_segments[:, :, None], kv_segments)
        total = jnp.where(shown, total, 0.0)
        return jnp.max(total.reshape(*total.shape[:2], -1, block), axis=(1, 3))

    tiles = jax.lax.map(row, (blocks(grouped), blocks(positions), blocks(segments)))
    tiles = jnp.moveaxis(tiles, 0, 1)
    return tiles + jnp.triu(tiles.swapaxes(1, 2), 1)


class Informativeness(nn.Module, abc.ABC):
    """The informativeness family: one float32 score for each block of tokens.

    Reference: Tuowei Wang, Xingyu Chen, Kun Li, Ting Cao, Ju Ren, Yaoxue Zhang, "LeMo: Enabling
    LEss Token Involvement for MOre Context Fine-tuning", 2025, arXiv:2501.09767.
    """

    @abc.abstractmethod
    def __call__(
        self,
        x: Hidden,
        *,
        block: int,
        there: Bool[Array, "B N"],
        heads: Heads,
        tiles: Callable[[], TileScores],
    ) -> BlockScores:
        """Scores of the blocks of ``x``; they carry no gradient.

        Args:
            x: what queries and keys are made of, 0 for padding.
            block: tokens of a block; the last one may have fewer.
            there: blocks that hold a token.
            heads: of the attention.
            tiles: computes :func:`tile_scores`.
        """


class PooledScores(Informativeness):
    """The scores themselves, ``I_b = Σ_a M[a, b]``, which need queries and keys of all tokens.

    Reference: as ``Informativeness``: arXiv:2501.09767.
    """

    def __call__(
        self,
        x: Hidden,
        *,
        block: int,
        there: Bool[Array, "B N"],
        heads: Heads,
        tiles: Callable[[], TileScores],
    ) -> BlockScores:
        """The sum over rows."""
        count = jnp.sum(there, axis=1, dtype=jnp.float32)
        pairs = jnp.sum(count * (count + 1) / 2) * block**2
        report(self, flops=pairs * 2 * heads.num_heads * heads.width)
        return jnp.sum(tiles(), axis=1)


class PredictedScores(Informativeness):
    """What a small network makes of the tokens: ``I_b = Σ_a M̂[a, b]``, ``M̂ = Σ_h q_h k_hᵀ``.

    The stream is cut into as many parts as there are heads. In each, the tokens of a block are put
    end to end and go through ``W_3 relu(W_2 relu(W_1 ·))``, once for q and once for k, with the
    same weights for all parts. The loss ``predictor`` that it reports is the smooth L1 distance of
    ``M̂`` from ``M / 16``, a mean over tiles; its gradient reaches the network alone.

    Reference: as ``Informativeness``: arXiv:2501.09767.

    Differences from the paper: ``M̂`` is fitted to the symmetric ``M``, so that both are summed
    over rows in the same way.

    Attributes:
        hidden: units of the first layer; the second has as many as a block has entries.
        units: of the first and second layer for q, then for k, where
            :func:`tokenlab.models.shrunk` has removed some; None is none.
    """

    hidden: int = 128
    units: tuple[int, int, int, int] | None = None

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        *,
        block: int,
        there: Bool[Array, "B N"],
        heads: Heads,
        tiles: Callable[[], TileScores],
    ) -> BlockScores:
        """The sum over rows of the predicted scores.

        Raises:
            UserError: the stream does not divide into as many parts as there are heads.
        """
        rows, length, dim = x.shape
        count = there.shape[1]
        parts = heads.num_heads
        if dim % parts:
            raise UserError(
                f"the predictor cuts a stream of width {dim} into {parts} parts, one a head; "
                "use a width that they divide, or informativeness=PooledScores()"
            )
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        x = jnp.pad(x, ((0, 0), (0, count * block - length), (0, 0)))
        x = x.reshape(rows, count, block, parts, dim // parts).swapaxes(2, 3)
        x = x.reshape(rows, count * parts, -1)
        default = (self.hidden, x.shape[2]) * 2
        units = self.units or default
        queries, keys = (
            self._path(x, name, widths, dim // parts, there).reshape(rows, count, parts, -1)
            for name, widths in (("q", units[:2]), ("k", units[2:]))
        )
        predicted = jnp.einsum("bihe,bjhe->bij", queries, keys)
        error = jnp.abs(predicted - jax.lax.stop_gradient(tiles()) / 16)
        smooth = jnp.where(error < 1, 0.5 * error**2, error - 0.5)
        both = (there[:, :, None] & there[:, None]).astype(jnp.float32)
        products = sum(
            x.shape[2] * a + a * b + b * (dim // parts) for a, b in (units[:2], units[2:])
        )
        report(
            self,
            aux={"predictor": Weighted.of(smooth, both)},
            flops=2.0 * products * parts * jnp.sum(there, dtype=jnp.float32),
        )
        return jax.lax.stop_gradient(jnp.sum(predicted, axis=1))

    def _path(
        self,
        x: Float[Array, "B NH D"],
        name: str,
        widths: tuple[int, int],
        out: int,
        there: Bool[Array, "B N"],
    ) -> Float[Array, "B NH E"]:
        parts = x.shape[1] // there.shape[1]
        counted = jnp.repeat(there, parts, axis=1)[:, :, None]
        for number, width in enumerate(widths, start=1):
            x = Linear(width, axes=_WHOLE, name=f"{name}_{number}")(x)
            # For removing units; kept only where asked for.
            idle = jnp.mean((x <= 0), axis=(0, 1), where=jnp.broadcast_to(counted, x.shape))
            self.sow("intermediates", f"idle_{name}_{number}", idle)
            x = nn.relu(x)
        return Linear(out, axes=_WHOLE, name=f"{name}_3")(x)


class RandomScores(Informativeness):
    """Chance, drawn from the stream ``routes``: what any other member has to beat.

    Reference: as ``Informativeness``: arXiv:2501.09767.
    """

    def __call__(
        self,
        x: Hidden,
        *,
        block: int,
        there: Bool[Array, "B N"],
        heads: Heads,
        tiles: Callable[[], TileScores],
    ) -> BlockScores:
        """Uniform in [0, 1)."""
        if self.is_initializing():
            return jnp.zeros(there.shape)
        return jax.random.uniform(self.make_rng("routes"), there.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptBlocks(abc.ABC):
    """The kept-blocks family: how many blocks of a row stay, the most informative first.

    Reference: as ``Informativeness``: arXiv:2501.09767.
    """

    @abc.abstractmethod
    def slots(self, blocks: int) -> int:
        """The most blocks that a row of ``blocks`` keeps: what there is room for."""

    @abc.abstractmethod
    def counts(self, scores: BlockScores, *, there: Bool[Array, "B N"]) -> Int[Array, " B"]:
        """How many blocks each row keeps, at most ``slots``."""

    def __call__(self, scores: BlockScores, *, there: Bool[Array, "B N"]) -> Bool[Array, "B N"]:
        """The kept blocks; of equal scores the earlier.

        Args:
            scores: float32.
            there: blocks that hold a token.
        """
        order = jnp.argsort(jnp.where(there, -scores, jnp.inf), axis=1, stable=True)
        rank = jnp.argsort(order, axis=1)
        return there & (rank < self.counts(scores, there=there)[:, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptShare(KeptBlocks):
    """``max(1, floor(share * n))`` of the n blocks that a row has, padding left out.

    Reference: as ``Informativeness``: arXiv:2501.09767; its released code.

    Attributes:
        share: ρ, above 0 and up to 1.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"KeptShare.share is {self.share}; use more than 0 and up to 1")

    def slots(self, blocks: int) -> int:
        """The count of a full row."""
        return max(1, math.floor(self.share * blocks + _ROUNDING))

    def counts(self, scores: BlockScores, *, there: Bool[Array, "B N"]) -> Int[Array, " B"]:
        """The same for any scores."""
        table = [self.slots(n) for n in range(there.shape[1] + 1)]
        return jnp.asarray(table, jnp.int32)[jnp.sum(there, axis=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptAbove(KeptBlocks):
    """Blocks with ``I_b >= threshold * max_b I_b``, at most a share of a row's and at least one.

    Reference: as ``Informativeness``: arXiv:2501.09767.

    Differences from the paper: compiled shapes are fixed, so there is room for ``most`` of a row;
    of more blocks than that the most informative stay.

    Attributes:
        threshold: θ of a layer, as a share of its row's highest score.
        most: share of a row's blocks that there is room for.
    """

    threshold: float
    most: float = 1.0

    def slots(self, blocks: int) -> int:
        """What there is room for."""
        return KeptShare(share=self.most).slots(blocks)

    def counts(self, scores: BlockScores, *, there: Bool[Array, "B N"]) -> Int[Array, " B"]:
        """The blocks above the threshold."""
        highest = jnp.max(jnp.where(there, scores, -jnp.inf), axis=1, keepdims=True)
        above = jnp.sum(there & (scores >= self.threshold * highest), axis=1)
        return jnp.clip(above, 1, KeptShare(share=self.most).counts(scores, there=there))

"""The prefill attention family: a whole prompt at once, over some of the blocks of its keys."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_attention import Causal, MaskRule, block_sparse_attention
from tokenlab.attention.budget import BlockBudget, MassBudget
from tokenlab.core.arrays import Array, Bool, Float, Int, Positions, Segments

# Stands in for -inf, whose differences would be NaN.
_NEVER = -1e30
_CAUSAL = Causal()


class Blocks(NamedTuple):
    """Pairs of a block of queries and a block of keys, ``[row, 1, queries, keys]``.

    Attributes:
        causal: those that hold a visible pair of tokens where nothing is skipped.
        candidates: those of spans before the queries' own; a selector chooses among them.
        own: those of the queries' own span, which are always looked at.
        length: tokens of each row.
    """

    causal: Bool[Array, "B 1 Q N"]
    candidates: Bool[Array, "B 1 Q N"]
    own: Bool[Array, "B 1 Q N"]
    length: Int[Array, " B"]


class Selection(NamedTuple):
    """What a selector decided; ``A`` is the number of query heads, or 1 where they agree.

    Attributes:
        kept: blocks of keys that each block of queries looks at.
        order: index of the key in each slot, by query head, or None for the order of the text.
        blocks: what it chose from.
    """

    kept: Bool[Array, "B A Q N"]
    order: Int[Array, "B H T"] | None
    blocks: Blocks


class Prefilled(NamedTuple):
    """The result, and what it cost.

    Attributes:
        out: the result.
        density: of the blocks in earlier spans, the share that was looked at; 1 where there are
            none.
        visited: pairs of blocks that were computed, over those of dense causal attention.
        pairs: pairs of tokens that are visible in them, where the rule is causal.
    """

    out: Float[Array, "B T H E"]
    density: Float[Array, "B H"]
    visited: Float[Array, "B H"]
    pairs: Float[Array, "B H"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillAttention(abc.ABC):
    """Causal attention of a prompt with itself, block-sparse.

    Each block of queries looks at all of its own span, at the block of the first token, and at
    those blocks of earlier spans that get most of the softmax of :meth:`scores`, as far as the
    budget goes. A row holds one document with padding behind it. Heads that choose for themselves
    do not share keys any more: ``2 B H T E`` numbers are copied, where grouped-query attention
    has ``2 B K T E``.

    Attributes:
        block: queries and keys in a block.
        span: tokens in a span, a multiple of ``block``.
        budget: how many blocks of earlier spans are looked at.
    """

    causal: ClassVar[bool]  # whether no result depends on a later token

    block: int = 128
    span: int = 256
    budget: BlockBudget = MassBudget()

    def __post_init__(self) -> None:
        if self.block < 1 or self.span % self.block or self.span < self.block:
            raise ValueError(f"span {self.span} is not a multiple of block {self.block}")

    @abc.abstractmethod
    def scores(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        segments: Segments,
        order: Int[Array, "B H T"] | None,
        scale: float,
    ) -> Float[Array, "#B A Q N"]:
        """Logit of the attention that blocks of queries are thought to give to blocks of keys."""

    def key_order(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        segments: Segments,
        scale: float,
    ) -> Int[Array, "B H T"] | None:
        """The order in which keys are cut into blocks; that of the text unless a member says so."""
        del q, k, segments, scale
        return None

    def select(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        segments: Segments,
        scale: float,
    ) -> Selection:
        """The blocks of keys that each block of queries looks at."""
        order = self.key_order(q=q, k=k, segments=segments, scale=scale)
        blocks = self._blocks(segments, moved=order is not None)
        scores = self.scores(q=q, k=k, segments=segments, order=order, scale=scale)
        candidates = jnp.broadcast_to(
            blocks.candidates, jnp.broadcast_shapes(scores.shape, blocks.candidates.shape)
        )
        logits = jnp.where(candidates, scores.astype(jnp.float32), _NEVER)
        mass = jnp.where(candidates, jax.nn.softmax(logits, axis=-1), 0.0)
        kept = self.budget(mass, candidates=candidates) | blocks.own
        if order is None:
            sink = jnp.arange(kept.shape[-1])[None, None] == 0
        else:
            slot = jnp.argmax(order == 0, axis=-1) // self.block
            sink = jnp.arange(kept.shape[-1])[None, None] == slot[:, :, None]
        return Selection(kept | (sink[:, :, None] & blocks.causal), order, blocks)

    def __call__(
        self,
        *,
        q: Float[Array, "B T H E"],
        k: Float[Array, "B T K E"],
        v: Float[Array, "B T K E"],
        positions: Positions,
        segments: Segments,
        scale: float,
        softcap: float | None = None,
        rule: MaskRule = _CAUSAL,
        impl: Literal["ref", "xla", "tpu", "gpu"] | None = None,
    ) -> Prefilled:
        """Attends.

        Args:
            q: queries.
            k: keys.
            v: values.
            positions: positions of the tokens.
            segments: 0 for padding.
            scale: factor of the scores.
            softcap: bound of the absolute scores; the choice of blocks takes no notice of it.
            rule: what a query sees of the keys it looks at; a causal one.
            impl: form of ``kernels_pallas.block_sparse_attention``.
        """
        kept, order, blocks = self.select(q=q, k=k, segments=segments, scale=scale)
        batch, length, heads, width = q.shape
        by_head = kept.shape[1] > 1 or order is not None
        kv_positions, kv_segments = positions, segments
        if by_head:
            kept = jnp.broadcast_to(kept, (batch, heads, *kept.shape[2:]))
            q = q.swapaxes(1, 2).reshape(batch * heads, length, 1, width)
            k, v = (_by_head(x, heads, order) for x in (k, v))
            positions, segments = (jnp.repeat(x, heads, axis=0) for x in (positions, segments))
            kv_positions, kv_segments = positions, segments
            if order is not None:
                index = order.reshape(batch * heads, length)
                kv_positions = jnp.take_along_axis(positions, index, axis=1)
                kv_segments = jnp.take_along_axis(segments, index, axis=1)
        number = jnp.arange(kept.shape[-1])
        out = block_sparse_attention(
            q=q,
            k=k,
            v=v,
            q_positions=positions,
            kv_positions=kv_positions,
            q_segments=segments,
            kv_segments=kv_segments,
            rule=rule,
            scale=scale,
            softcap=softcap,
            blocks=jnp.where(kept, number[None, None, None], -1).reshape(-1, *kept.shape[2:]),
            block_shape=(self.block, self.block),
            impl=impl,
        )
        if by_head:
            out = out.reshape(batch, heads, length, width).swapaxes(1, 2)
        chosen = kept & blocks.candidates
        found = (
            _share(chosen, blocks.candidates),
            _share(kept, blocks.causal),
            self._pairs(chosen, blocks.length),
        )
        return Prefilled(out, *(jnp.broadcast_to(x, (batch, heads)) for x in found))

    def _pairs(
        self, chosen: Bool[Array, "B A Q N"], length: Int[Array, " B"]
    ) -> Float[Array, "B A"]:
        """Whole blocks of earlier spans for each query, and the causal pairs of its own span."""
        first = jnp.arange(chosen.shape[2]) * self.block
        queries = jnp.clip(length[:, None] - first[None], 0, self.block)
        count = jnp.sum(chosen, axis=3, dtype=jnp.float32) * self.block
        earlier = jnp.sum(count * queries[:, None], axis=2)
        whole, rest = length // self.span, length % self.span
        own = whole * (self.span * (self.span + 1) // 2) + rest * (rest + 1) // 2
        return earlier + own[:, None].astype(jnp.float32)

    def _blocks(self, segments: Segments, moved: bool) -> Blocks:
        """Blocks without a token are in none of the sets.

        Args:
            segments: of the tokens.
            moved: whether keys change places inside their span, so that a later block of it may
                hold an earlier key.
        """
        real = jnp.any(blocked(segments > 0, self.block), axis=-1)
        index = jnp.arange(real.shape[1])
        span = index // (self.span // self.block)
        pairs = (real[:, :, None] & real[:, None, :])[:, None]
        causal = pairs & (index[None, :] <= index[:, None])[None, None]
        own = (span[None, :] == span[:, None])[None, None]
        return Blocks(
            causal=causal,
            candidates=pairs & (span[None, :] < span[:, None])[None, None],
            own=(pairs if moved else causal) & own,
            length=jnp.sum(segments > 0, axis=1),
        )


def blocked(x: Array, block: int, axis: int = 1) -> Array:
    """``axis`` cut into blocks, the last one filled up with zeros."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    x = jnp.pad(x, widths)
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])


def pooled(
    x: Float[Array, "B G T E"], real: Bool[Array, "B A T"], block: int
) -> Float[Array, "B G N E"]:
    """Mean of the real tokens of each block, float32; 0 where there is none."""
    wide = jnp.where(real[..., None], x.astype(jnp.float32), 0.0)
    count = jnp.sum(blocked(real, block, 2), axis=3, dtype=jnp.float32)
    return jnp.sum(blocked(wide, block, 2), axis=3) / jnp.maximum(count, 1.0)[..., None]


def last_scores(
    q: Float[Array, "B T H E"],
    k: Float[Array, "B T K E"],
    segments: Segments,
    *,
    count: int,
    scale: float,
) -> tuple[Float[Array, "B H C T"], Int[Array, "B C"]]:
    """Scores of the last ``count`` tokens of each row with all keys, and where those tokens are.

    An index below 0 is a token that a short row has not got; its scores mean nothing.
    """
    batch, length, heads, width = q.shape
    lengths = jnp.sum(segments > 0, axis=1)
    index = lengths[:, None] - count + jnp.arange(count)[None]
    last = jnp.take_along_axis(q, jnp.maximum(index, 0)[:, :, None, None], axis=1)
    grouped = last.swapaxes(1, 2).reshape(batch, k.shape[2], -1, width)
    # Both sides laid out as one matrix per head, which is what a CPU multiplies fastest.
    keys = jnp.einsum("btke->bket", k)
    scores = jnp.einsum("bkce,bket->bkct", grouped, keys, preferred_element_type=jnp.float32)
    return scores.reshape(batch, heads, count, length) * scale, index


def _by_head(
    x: Float[Array, "B T K E"], heads: int, order: Int[Array, "B H T"] | None
) -> Float[Array, "BH T 1 E"]:
    """Keys or values as each query head reads them."""
    batch, length, kv_heads, width = x.shape
    x = jnp.repeat(x.swapaxes(1, 2), heads // kv_heads, axis=1)
    if order is not None:
        x = jnp.take_along_axis(x, order[..., None], axis=2)
    return x.reshape(batch * heads, length, 1, width)


def _share(kept: Bool[Array, "B A Q N"], of: Bool[Array, "B 1 Q N"]) -> Float[Array, "B A"]:
    count, total = (jnp.sum(x, axis=(2, 3), dtype=jnp.float32) for x in (kept, of))
    return jnp.where(total > 0, count / jnp.maximum(total, 1.0), 1.0)

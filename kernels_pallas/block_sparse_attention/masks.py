"""Who may attend to whom: a rule for two tokens, and what it says of blocks."""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@runtime_checkable
class MaskRule(Protocol):
    """Visibility of a key to a query, from positions and segments alone.

    Members are frozen dataclasses, so a rule is hashable and a static argument. Tokens see their
    own segment only; segment 0 is padding, which neither sees nor is seen.
    """

    def __call__(
        self,
        q_pos: Int[Array, "..."],
        kv_pos: Int[Array, "..."],
        q_seg: Int[Array, "..."],
        kv_seg: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """Whether each query sees each key; the arguments broadcast at equal rank."""
        ...

    def block_map(
        self, block_q: int, block_k: int, num_q: int, num_k: int
    ) -> Bool[np.ndarray, "num_q num_k"]:
        """Which blocks may hold a visible pair, where queries and keys are the same tokens.

        An upper bound that goes by index. It holds where, inside a segment, a later index has a
        later position and positions are at least as far apart as indices: rows of packed
        documents are such rows.

        Args:
            block_q: queries in a block.
            block_k: keys in a block.
            num_q: blocks of queries.
            num_k: blocks of keys.
        """
        ...


@runtime_checkable
class RangeRule(MaskRule, Protocol):
    """A rule that can tell from ranges of positions that it hides nothing.

    A kernel leaves out the mask of such a pair of blocks; of other rules it masks every pair.
    Members derive from it.
    """

    def __call__(
        self,
        q_pos: Int[Array, "..."],
        kv_pos: Int[Array, "..."],
        q_seg: Int[Array, "..."],
        kv_seg: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """Same segment, not padding, and near."""
        return (q_seg == kv_seg) & (kv_seg != 0) & self.near(q_pos, kv_pos)

    def near(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Whether each query sees each key of its own segment."""
        ...

    def all_visible(
        self,
        q_first: Int[Array, "..."],
        q_last: Int[Array, "..."],
        kv_first: Int[Array, "..."],
        kv_last: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """Whether every query position sees every key position, in one segment, padding aside.

        Args:
            q_first: lowest position of the queries.
            q_last: highest position of the queries.
            kv_first: lowest position of the keys.
            kv_last: highest position of the keys.
        """
        ...


@runtime_checkable
class IndexRule(MaskRule, Protocol):
    """A rule whose block map takes positions for indices: rows of one document, padding behind it.

    Any other row is one that the map does not hold for.
    """

    positions_are_indices: ClassVar[bool]


@runtime_checkable
class UnorderedRule(MaskRule, Protocol):
    """A rule that no order of tokens tells blocks for, so that they are best listed at run time."""

    lists_blocks: ClassVar[bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bidirectional(RangeRule):
    """Every token sees its whole segment."""

    def near(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Always."""
        return jnp.ones(jnp.broadcast_shapes(q_pos.shape, kv_pos.shape), bool)

    def all_visible(
        self,
        q_first: Int[Array, "..."],
        q_last: Int[Array, "..."],
        kv_first: Int[Array, "..."],
        kv_last: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """Always."""
        return jnp.ones(jnp.broadcast_shapes(q_first.shape, kv_first.shape), bool)

    def block_map(
        self, block_q: int, block_k: int, num_q: int, num_k: int
    ) -> Bool[np.ndarray, "num_q num_k"]:
        """Every block; this one holds for any order and for queries that are not the keys."""
        return np.ones((num_q, num_k), bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal(RangeRule):
    """A token sees itself and earlier positions of its segment."""

    def near(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        """``kv_pos <= q_pos``."""
        return kv_pos <= q_pos

    def all_visible(
        self,
        q_first: Int[Array, "..."],
        q_last: Int[Array, "..."],
        kv_first: Int[Array, "..."],
        kv_last: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """No key is after the first query."""
        return kv_last <= q_first

    def block_map(
        self, block_q: int, block_k: int, num_q: int, num_k: int
    ) -> Bool[np.ndarray, "num_q num_k"]:
        """Blocks whose first key is not after their last query."""
        return _first(block_k, num_k)[None, :] <= _last(block_q, num_q)[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindow(RangeRule):
    """A token sees the last ``size`` positions of its segment, itself among them.

    Attributes:
        size: positions that a token sees, at least 1.
    """

    size: int

    def near(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        """``q_pos - size < kv_pos <= q_pos``."""
        return (kv_pos <= q_pos) & (q_pos - kv_pos < self.size)

    def all_visible(
        self,
        q_first: Int[Array, "..."],
        q_last: Int[Array, "..."],
        kv_first: Int[Array, "..."],
        kv_last: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """No key is after the first query, and the first key is in reach of the last query."""
        return (kv_last <= q_first) & (q_last - kv_first < self.size)

    def block_map(
        self, block_q: int, block_k: int, num_q: int, num_k: int
    ) -> Bool[np.ndarray, "num_q num_k"]:
        """Causal blocks whose last key is within reach of their first query."""
        oldest = _first(block_q, num_q) - self.size
        reached = _last(block_k, num_k)[None, :] > oldest[:, None]
        return reached & Causal().block_map(block_q, block_k, num_q, num_k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkWindow(RangeRule):
    """A token sees the first ``sinks`` positions and the last ``size``, itself among them.

    Attributes:
        sinks: positions at the start that every later token sees.
        size: positions that a token sees behind it, at least 1.

    Reference: Guangxuan Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
    2023, arXiv:2309.17453.
    """

    sinks: int
    size: int
    positions_are_indices: ClassVar[bool] = True

    def near(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        """``kv_pos <= q_pos``, and ``kv_pos < sinks`` or ``q_pos - size < kv_pos``."""
        return (kv_pos <= q_pos) & ((kv_pos < self.sinks) | (q_pos - kv_pos < self.size))

    def all_visible(
        self,
        q_first: Int[Array, "..."],
        q_last: Int[Array, "..."],
        kv_first: Int[Array, "..."],
        kv_last: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """No key is after the first query, and all are sinks or all are in reach of the last."""
        kept = (kv_last < self.sinks) | (q_last - kv_first < self.size)
        return (kv_last <= q_first) & kept

    def block_map(
        self, block_q: int, block_k: int, num_q: int, num_k: int
    ) -> Bool[np.ndarray, "num_q num_k"]:
        """Blocks of the window, and causal ones that hold a sink."""
        window = SlidingWindow(size=self.size).block_map(block_q, block_k, num_q, num_k)
        sinks = (_first(block_k, num_k) < self.sinks)[None, :]
        return window | (sinks & Causal().block_map(block_q, block_k, num_q, num_k))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strided(RangeRule):
    """A token sees, of its own unit of positions and every ``stride``-th before it, what is causal.

    Attributes:
        unit: positions in a unit.
        stride: units from one that is seen to the next, at least 1.

    Reference: Rewon Child et al., "Generating Long Sequences with Sparse Transformers", 2019,
    arXiv:1904.10509.

    Differences from the paper: strides are of whole units, so that blocks of keys can be left out.
    """

    unit: int
    stride: int
    positions_are_indices: ClassVar[bool] = True

    def near(self, q_pos: Int[Array, "..."], kv_pos: Int[Array, "..."]) -> Bool[Array, "..."]:
        """``kv_pos <= q_pos``, and units that are a multiple of ``stride`` apart."""
        apart = q_pos // self.unit - kv_pos // self.unit
        return (kv_pos <= q_pos) & (apart % self.stride == 0)

    def all_visible(
        self,
        q_first: Int[Array, "..."],
        q_last: Int[Array, "..."],
        kv_first: Int[Array, "..."],
        kv_last: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """No key is after the first query, and both lie in one unit each, a multiple apart."""
        q_low, q_high, kv_low, kv_high = (
            x // self.unit for x in (q_first, q_last, kv_first, kv_last)
        )
        single = ((q_low == q_high) & (kv_low == kv_high)) | (self.stride == 1)
        return (kv_last <= q_first) & single & ((q_low - kv_low) % self.stride == 0)

    def block_map(
        self, block_q: int, block_k: int, num_q: int, num_k: int
    ) -> Bool[np.ndarray, "num_q num_k"]:
        """Causal blocks with two units that are a multiple of ``stride`` apart."""
        queries = _first(block_q, num_q) // self.unit, _last(block_q, num_q) // self.unit
        keys = _first(block_k, num_k) // self.unit, _last(block_k, num_k) // self.unit
        least = np.maximum(queries[0][:, None] - keys[1][None, :], 0)
        most = queries[1][:, None] - keys[0][None, :]
        multiple = most // self.stride * self.stride >= least
        return multiple & Causal().block_map(block_q, block_k, num_q, num_k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branching(MaskRule):
    """A document is a trunk; a branch leaves it behind one position and sees none but its own.

    A token of the trunk sees the trunk as ``within`` says. A token of a branch sees the trunk up to
    the position that the branch leaves, and what is before it of its own branch. Segments are those
    of :meth:`trunk` and :meth:`branch`. Nothing can be told of blocks by index: give ``blocks``.

    Attributes:
        within: which keys a query sees of those.
    """

    within: RangeRule = Causal()
    lists_blocks: ClassVar[bool] = True
    _BITS: ClassVar[int] = 16

    def __call__(
        self,
        q_pos: Int[Array, "..."],
        kv_pos: Int[Array, "..."],
        q_seg: Int[Array, "..."],
        kv_seg: Int[Array, "..."],
    ) -> Bool[Array, "..."]:
        """Same document, not padding, and near; and ahead of the branch or of the same one."""
        every = (1 << self._BITS) - 1
        q_leaf, kv_leaf = q_seg & every, kv_seg & every
        same = (q_seg >> self._BITS == kv_seg >> self._BITS) & (kv_seg != 0)
        until = jnp.where(q_leaf == 0, q_pos, q_leaf - 1)
        along = ((kv_leaf == 0) & (kv_pos <= until)) | ((kv_leaf != 0) & (kv_leaf == q_leaf))
        return same & along & self.within.near(q_pos, kv_pos)

    def trunk(self, segments: Int[Array, "..."]) -> Int[Array, "..."]:
        """Segments of the tokens of documents ``segments``, of which there are fewer than 32768."""
        return segments << self._BITS

    def branch(
        self, segments: Int[Array, "..."], positions: Int[Array, "..."]
    ) -> Int[Array, "..."]:
        """Segments of the branches that leave ``positions``, below 65535, of these documents."""
        return jnp.where(segments == 0, 0, (segments << self._BITS) + positions + 1)

    def block_map(
        self, block_q: int, block_k: int, num_q: int, num_k: int
    ) -> Bool[np.ndarray, "num_q num_k"]:
        """Every block; this one holds for any order."""
        return np.ones((num_q, num_k), bool)


def _first(block: int, count: int) -> Int[np.ndarray, " count"]:
    return np.arange(count) * block


def _last(block: int, count: int) -> Int[np.ndarray, " count"]:
    return np.arange(count) * block + block - 1

"""Block sizes, and the shapes that tests and benchmarks share."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSparseAttentionConfig:
    """Block sizes.

    Attributes:
        block: queries, and granularity of keys, handled at a time; ``None`` derives it from the
            length.
    """

    block: int | None = None

    def of(self, length: int) -> int:
        """The block size for ``length`` queries: at least 128, and at most 16 blocks."""
        return min(length, self.block or max(128, -(-length // 16)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one call.

    Attributes:
        batch: rows.
        length: positions of a row.
        heads: query heads.
        kv_heads: key/value heads.
        width: width of a head.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int


SHAPES = {
    "laptop-512": Shape(batch=8, length=512, heads=6, kv_heads=6, width=64),
    "laptop-512-grouped": Shape(batch=8, length=512, heads=6, kv_heads=2, width=64),
    "laptop-256": Shape(batch=8, length=256, heads=8, kv_heads=8, width=32),
    "laptop-2048": Shape(batch=1, length=2048, heads=6, kv_heads=6, width=64),
}

"""Operands of the TPU kernels: padded, heads first, and their blocks at an entry of the list."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention import pairs
from kernels_pallas.block_sparse_attention.blocks import Tokens
from kernels_pallas.block_sparse_attention.masks import MaskRule
from kernels_pallas.block_sparse_attention.operands import whole

LANES = 128
# What a kernel may hold, of 64 MiB (v5p, tpu7x) to 128 MiB (v5e, v6e) that a core has.
VMEM_BYTES = 48 << 20
# Of keys that are padding; no query has it.
NO_SEGMENT = jnp.iinfo(jnp.int32).min


class Static(NamedTuple):
    """What is no array; ``block_q`` and ``block_k`` are those of the pass."""

    rule: MaskRule
    scale: float
    softcap: float | None
    block_q: int
    block_k: int
    interpret: Any

    @property
    def sizes(self) -> tuple[int, int]:
        """Queries and keys in a block."""
        return self.block_q, self.block_k


class Operands(NamedTuple):
    """Operands as the kernels take them: heads first, whole blocks."""

    q_tokens: Int[Array, "B 2 T"]
    kv_tokens: Int[Array, "B 2 S"]
    q: Float[Array, "B H T E"]
    k: Float[Array, "B K S E"]
    v: Float[Array, "B K S E"]


def operands_of(static: Static, tokens: Tokens, q: Array, k: Array, v: Array) -> Operands:
    """Of padded tokens; on the side of the keys segment 0 becomes one that no query has."""
    kv_segments = jnp.where(tokens.kv_segments == 0, NO_SEGMENT, tokens.kv_segments)
    return Operands(
        jnp.stack([tokens.q_positions, tokens.q_segments], axis=1),
        jnp.stack([tokens.kv_positions, kv_segments], axis=1),
        whole(jnp.swapaxes(q, 1, 2), static.block_q, 2),
        whole(jnp.swapaxes(k, 1, 2), static.block_k, 2),
        whole(jnp.swapaxes(v, 1, 2), static.block_k, 2),
    )


class Specs:
    """Blocks of the operands at an entry of the list; grids are ``(row, head, entry[, group])``.

    What is small stays in VMEM by whole rows: every operand that moves from entry to entry costs
    scalar instructions in each grid step.
    """

    def __init__(self, static: Static, listed: pairs.Listed, operands: Operands, *, by_rows: bool):
        self.batch, self.heads, self.queries, self.width = operands.q.shape
        self.kv_heads, self.keys = operands.k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.pairs, self.steps = listed.entries.shape[0] // self.batch, listed.steps
        self.static, self.by_rows = static, by_rows

    def vectors(self, *, queries: bool) -> pl.BlockSpec:
        """``[B, heads, T, E]``."""
        block = pairs.outer if queries == self.by_rows else pairs.inner
        size = self.static.block_q if queries else self.static.block_k

        def index(b, h, p, *rest):
            *group, entries = rest
            if self.by_rows:
                head = h if queries or self.group == 1 else h // self.group
            else:
                head = h * self.group + group[0] if queries and self.group > 1 else h
            return b, head, block(entries[b * self.pairs + p]), 0

        return pl.BlockSpec((None, None, size, self.width), index)

    def all(self) -> list[pl.BlockSpec]:
        """Of the five arrays of :class:`Operands`."""
        tokens = [
            pl.BlockSpec((None, 2, length), lambda b, *rest: (b, 0, 0))
            for length in (self.queries, self.keys)
        ]
        return [*tokens, *(self.vectors(queries=queries) for queries in (True, False, False))]

    def per_query(self, count: int) -> pl.BlockSpec:
        """``[B, H, count, T]``: of one head along rows, of a group of heads along columns."""
        heads = 1 if self.by_rows else self.group
        return pl.BlockSpec((None, heads, count, self.queries), lambda b, h, *rest: (b, h, 0, 0))

    def per_group(self) -> pl.BlockSpec:
        """All vectors ``[B, H, T, E]`` of the queries of a group of heads."""
        shape = (None, self.group, self.queries, self.width)
        return pl.BlockSpec(shape, lambda b, h, *rest: (b, h, 0, 0))

"""What the implementations know of blocks: the static map, its precondition, lists at run time."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_sparse_attention.masks import IndexRule, MaskRule


class Tokens(NamedTuple):
    """What rules look at."""

    q_positions: Int[Array, "B T"]
    kv_positions: Int[Array, "B S"]
    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]


def count(length: int, block: int) -> int:
    """Blocks that hold ``length`` tokens."""
    return -(-length // block)


def static_map(
    rule: MaskRule, block_q: int, block_k: int, queries: int, keys: int
) -> Bool[np.ndarray, "num_q num_k"]:
    """``rule.block_map`` for that many queries and keys."""
    return rule.block_map(block_q, block_k, count(queries, block_q), count(keys, block_k))


def static_map_refusal(
    rule: MaskRule, block_q: int, block_k: int, queries: int, keys: int
) -> str | None:
    """Why the static map cannot be used, or ``None``."""
    if queries == keys or static_map(rule, block_q, block_k, queries, keys).all():
        return None
    return f"{rule} skips blocks by index, which needs as many queries ({queries}) as keys ({keys})"


def in_order(tokens: Tokens) -> Bool[Array, " B"]:
    """Rows for which a map of blocks by index holds (see ``MaskRule.block_map``)."""
    same = tokens.q_positions == tokens.kv_positions
    same &= tokens.q_segments == tokens.kv_segments
    order = jnp.argsort(tokens.q_segments, axis=1, stable=True)
    positions = jnp.take_along_axis(tokens.q_positions, order, axis=1)
    segments = jnp.take_along_axis(tokens.q_segments, order, axis=1)
    apart = jnp.diff(positions, axis=1) >= jnp.diff(order, axis=1)
    apart |= (jnp.diff(segments, axis=1) != 0) | (segments[:, 1:] == 0)
    return jnp.all(same, axis=1) & jnp.all(apart, axis=1)


def positions_are_indices(tokens: Tokens) -> Bool[Array, " B"]:
    """Rows of one document, padding behind it, whose keys are numbered from 0."""
    index = jnp.arange(tokens.kv_positions.shape[1])[None]
    real = tokens.kv_segments != 0
    first = tokens.kv_segments[:, :1]
    alike = (tokens.kv_segments == first) & (tokens.kv_positions == index)
    return jnp.all(alike | ~real, axis=1)


def where_in_order(
    out: Float[Array, "B T H E"],
    log_sum_exp: Float[Array, "B T H"],
    tokens: Tokens,
    rule: MaskRule,
    visible: Bool[np.ndarray, "num_q num_k"],
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Results by the static map ``visible``, NaN in rows for which it does not hold."""
    if visible.all():
        return out, log_sum_exp
    right = in_order(tokens)
    if isinstance(rule, IndexRule):
        right &= positions_are_indices(tokens)
    return (
        jnp.where(right[:, None, None, None], out, jnp.nan),
        jnp.where(right[:, None, None], log_sum_exp, jnp.nan),
    )


def distinct(blocks: Int[Array, "B Q N"], num_k: int) -> Int[Array, "B Q N"]:
    """The lists in ascending order; what is repeated or no block of keys becomes -1."""
    blocks = jnp.sort(jnp.where((blocks < 0) | (blocks >= num_k), num_k, blocks), axis=2)
    repeated = jnp.diff(blocks, axis=2, prepend=-1) == 0
    return jnp.where(repeated | (blocks == num_k), -1, blocks).astype(jnp.int32)


def listed(blocks: Int[Array, "B Q N"], num_k: int) -> Bool[Array, "B Q M"]:
    """The lists as a map ``[B, blocks of queries, blocks of keys]``."""
    batch, rows, _ = blocks.shape
    found = jnp.zeros((batch, rows, num_k), bool)
    b, i = jnp.arange(batch)[:, None, None], jnp.arange(rows)[None, :, None]
    blocks = jnp.where(blocks < 0, num_k, blocks)
    return found.at[b, i, blocks].set(True, mode="drop")


def finer(
    blocks: Int[Array, "B Q N"], of_q: int, of_k: int, num_q: int, num_k: int
) -> Int[Array, "B R M"]:
    """The lists for blocks that are ``of_q`` and ``of_k`` times smaller.

    Args:
        blocks: lists without repetition.
        of_q: how many of the smaller blocks of queries make one of these.
        of_k: likewise of keys.
        num_q: how many of the smaller blocks of queries there are.
        num_k: likewise of keys.
    """
    blocks = jnp.repeat(blocks, of_q, axis=1)[:, :num_q]
    blocks = jnp.pad(blocks, ((0, 0), (0, num_q - blocks.shape[1]), (0, 0)), constant_values=-1)
    parts = blocks[..., None] * of_k + jnp.arange(of_k)[None, None, None]
    parts = jnp.where((blocks[..., None] < 0) | (parts >= num_k), -1, parts)
    return parts.reshape(*blocks.shape[:2], -1).astype(jnp.int32)

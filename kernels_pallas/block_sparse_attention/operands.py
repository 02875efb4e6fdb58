"""What the kernels of every platform are handed: whole blocks, pairs of them, statistics."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention import blocks as block_lists
from kernels_pallas.block_sparse_attention import pairs
from kernels_pallas.block_sparse_attention.blocks import Tokens
from kernels_pallas.block_sparse_attention.masks import MaskRule


def whole(x: Array, block: int, axis: int) -> Array:
    """Pads ``axis`` with zeros to whole blocks."""
    widths = [(0, -x.shape[axis] % block if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def padded_tokens(tokens: Tokens, block_q: int, block_k: int) -> Tokens:
    """Whole blocks of int32; padding is segment 0."""
    sizes = (block_q, block_k) * 2
    return Tokens(*(whole(x.astype(jnp.int32), n, 1) for x, n in zip(tokens, sizes, strict=True)))


def pairs_of(
    rule: MaskRule,
    blocks: Int[Array, "B Q N"] | None,
    sizes: tuple[int, int],
    queries: int,
    keys: int,
    *,
    by_rows: bool,
) -> pairs.Pairs:
    """Pairs of blocks, from the lists or from the rule.

    Args:
        rule: asked where there are no lists.
        blocks: lists of blocks of that size, without repetition.
        sizes: queries and keys in a block.
        queries: how many there are.
        keys: how many there are.
        by_rows: sorted by their blocks of queries, not of keys.
    """
    if blocks is None:
        visible = block_lists.static_map(rule, *sizes, queries, keys)
        return pairs.static_rows(visible) if by_rows else pairs.static_columns(visible)
    if by_rows:
        return pairs.listed_rows(blocks)
    return pairs.listed_columns(blocks, block_lists.count(keys, sizes[1]))


def inner_products(
    out: Float[Array, "B T H E"],
    cotangent: Float[Array, "B T H E"],
    by_log_sum_exp: Float[Array, "B T H"],
) -> Float[Array, "B T H"]:
    """What every score of a query has subtracted from its gradient, ``Σ_e out · cotangent``."""
    inner = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    return inner - by_log_sum_exp

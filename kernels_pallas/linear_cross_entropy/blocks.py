"""The vocabulary in blocks of one size, one projected at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Head(NamedTuple):
    """Output embedding and logit bias."""

    weight: Float[Array, "V D"]
    bias: Float[Array, " V"] | None


class Block(NamedTuple):
    """Entries ``start`` onwards; those before ``first`` belong to the block before."""

    start: Int[Array, ""]
    first: Int[Array, ""]
    head: Head


def indices(vocabulary: int, size: int) -> Int[Array, " blocks"]:
    """Numbers of all blocks."""
    return jnp.arange(-(-vocabulary // size))


def block_of(head: Head, index: Int[Array, ""], size: int) -> Block:
    """Block ``index``; the last one starts early where the size does not divide the vocabulary."""
    first = index * size
    start = jnp.minimum(first, head.weight.shape[0] - size)
    entries = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), head)
    return Block(start, first, entries)


def owned(block: Block, size: int, vocabulary: int) -> Bool[Array, "1 V"] | None:
    """Which entries no earlier block had, or ``None`` where the answer is always all."""
    if vocabulary % size == 0:
        return None
    return (block.start + jnp.arange(size) >= block.first)[None, :]


def raw_logits(hidden: Float[Array, "N D"], head: Head) -> Float[Array, "N V"]:
    """``hidden · weight[v] + bias[v]``, float32."""
    logits = jnp.einsum("nd,vd->nv", hidden, head.weight, preferred_element_type=jnp.float32)
    return logits if head.bias is None else logits + head.bias.astype(jnp.float32)[None, :]


def add_block(whole: Head, part: Head, start: Int[Array, ""]) -> Head:
    """Adds a block; each entry is owned by one block, so low precision loses nothing here."""

    def add(whole, part):
        old = lax.dynamic_slice_in_dim(whole, start, part.shape[0])
        return lax.dynamic_update_slice_in_dim(whole, old + part.astype(whole.dtype), start, 0)

    return jax.tree.map(add, whole, part)

"""Clusters of keys by direction: k-means with cosine assignment."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float, Int


class Clusters(NamedTuple):
    """Parts of a set of keys.

    Attributes:
        of: cluster of each key, -1 for what is no key.
        objective: mean of ``1 - cosine`` to the nearest centre, before each iteration.
    """

    of: Int[Array, "B K T"]
    objective: Float[Array, "B K I"]


def spherical_k_means(
    keys: Float[Array, "B K T E"],
    *,
    valid: Bool[Array, "B T"],
    counts: Int[Array, " B"],
    most: int,
    iterations: int = 10,
    centred: bool = False,
) -> Clusters:
    """Assigns keys to the centre with the highest cosine; centres are mean directions.

    The first centre is the first key, every other the key that is farthest from those before it, so
    that clusters far apart are found for certain and no seed is needed.

    Args:
        keys: keys of each head.
        valid: which of them are keys.
        counts: clusters of each row.
        most: static bound of ``counts``.
        iterations: of assignment and averaging.
        centred: whether the mean key of a head is taken off first.
    """
    x = keys.astype(jnp.float32)
    there = valid[:, None, :, None]
    if centred:
        total = jnp.sum(jnp.where(there, x, 0), axis=2, keepdims=True)
        x = x - total / jnp.maximum(jnp.sum(there, axis=2, keepdims=True), 1)
    x = jnp.where(there, directions(x)[0], 0)
    open_ = (jnp.arange(most)[None] < counts[:, None])[:, None]
    centres = jnp.where(open_[..., None], _far_apart(x, valid, most), 0)

    def step(centres: Array, _: None) -> tuple[Array, Array]:
        of, nearest = _assigned(x, centres, open_)
        sums = _sums(x, jnp.where(valid[:, None], of, -1), most)
        # A centre that lost all its keys stays where it is, and is nobody's.
        kept = jnp.sum(sums * sums, axis=-1, keepdims=True) > 0
        distance = jnp.where(valid[:, None], 1 - nearest, 0)
        mean = jnp.sum(distance, axis=2) / jnp.maximum(jnp.sum(valid, axis=1), 1)[:, None]
        return jnp.where(kept, directions(sums)[0], centres), mean

    centres, objective = jax.lax.scan(step, centres, None, length=iterations)
    of, _ = _assigned(x, centres, open_)
    return Clusters(jnp.where(valid[:, None], of, -1), jnp.moveaxis(objective, 0, 2))


def directions(x: Float[Array, "*N E"]) -> tuple[Float[Array, "*N E"], Float[Array, "*N 1"]]:
    """Vectors of length one, and the lengths there were; zeros stay zeros. Float32."""
    wide = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(wide * wide, axis=-1, keepdims=True))
    return wide / jnp.where(norm > 0, norm, 1.0), norm


def _far_apart(
    x: Float[Array, "B K T E"], valid: Bool[Array, "B T"], count: int
) -> Float[Array, "B K C E"]:
    def step(nearest: Array, _: None) -> tuple[Array, Array]:
        place = jnp.argmin(jnp.where(valid[:, None], nearest, jnp.inf), axis=2)
        centre = jnp.take_along_axis(x, place[..., None, None], axis=2)
        return jnp.maximum(nearest, jnp.sum(x * centre, axis=-1)), centre[:, :, 0]

    _, centres = jax.lax.scan(step, jnp.full(x.shape[:3], -2.0), None, length=count)
    return jnp.moveaxis(centres, 0, 2)


def _assigned(
    x: Float[Array, "B K T E"], centres: Float[Array, "B K C E"], open_: Bool[Array, "B 1 C"]
) -> tuple[Int[Array, "B K T"], Float[Array, "B K T"]]:
    cosines = jnp.einsum("bkte,bkce->bktc", x, centres, preferred_element_type=jnp.float32)
    cosines = jnp.where(open_[:, :, None], cosines, -2.0)
    return jnp.argmax(cosines, axis=-1).astype(jnp.int32), jnp.max(cosines, axis=-1)


def _sums(
    x: Float[Array, "B K T E"], of: Int[Array, "B K T"], count: int
) -> Float[Array, "B K C E"]:
    batch, heads, _, width = x.shape
    b, k = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    at = jnp.where(of < 0, count, of)
    return jnp.zeros((batch, heads, count, width)).at[b, k, at].add(x, mode="drop")

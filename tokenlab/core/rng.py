"""Named random streams, all folded from one seed."""

import zlib

import jax

from tokenlab.core.arrays import PRNGKeyArray


def stream(seed_or_key: int | PRNGKeyArray, name: str, *indices: int | jax.Array) -> PRNGKeyArray:
    """The key of stream ``name`` at ``indices`` (a step, a micro-batch, a row).

    Streams of different names are independent, and adding one never changes another.

    Args:
        seed_or_key: the run's seed, or a key to derive from.
        name: the stream, for example ``"dropout"``.
        *indices: integers, traced or not, folded in turn.
    """
    key = jax.random.key(seed_or_key) if isinstance(seed_or_key, int) else seed_or_key
    key = jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key

"""What tests of attention have in common."""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Even:
    """A rule that is no ``RangeRule``, so that every pair is masked: keys at even positions."""

    def __call__(self, q_pos, kv_pos, q_seg, kv_seg):
        return (q_seg == kv_seg) & (kv_seg != 0) & (kv_pos % 2 == 0) & (q_pos >= 0)

    def block_map(self, block_q, block_k, num_q, num_k):
        return np.ones((num_q, num_k), bool)


def documents(lengths, length):
    """Positions and segments of one row of documents of those lengths, padding after them."""
    lengths = [*lengths, length - sum(lengths)]
    positions = np.concatenate([np.arange(n) for n in lengths])
    segments = np.repeat([*range(1, len(lengths)), 0], lengths)
    return jnp.asarray(positions)[None], jnp.asarray(segments)[None]


def both_sides(positions, segments):
    """The arguments of attention over the queries' own tokens."""
    return {
        "q_positions": positions,
        "kv_positions": positions,
        "q_segments": segments,
        "kv_segments": segments,
    }

"""How much of full attention falls on what a policy reads."""

from __future__ import annotations

import jax.numpy as jnp

from kernels_pallas.block_sparse_attention import Causal
from kernels_pallas.decode_attention import partial_decode_attention
from tokenlab.cache.attending import over_view
from tokenlab.cache.base import Entries, Heads, Reading
from tokenlab.core.arrays import Array, Float


def attention_recalled(
    reading: Reading, new: Entries, keys: Float[Array, "B S K E"], *, heads: Heads
) -> Float[Array, "B T H"]:
    """``Σ over what is read of exp(score) / Σ over all earlier tokens of exp(score)``.

    The tokens of the pass themselves are in neither sum. It is a share, at most 1, where a policy
    leaves keys and positions as they are.

    Args:
        reading: what the policy shows.
        new: the tokens of the pass, turned.
        keys: all earlier keys, turned.
        heads: how they score.
    """
    parts = [over_view(view, new, heads, Causal(), None)[0][1] for view in reading.views]
    pool = keys.swapaxes(1, 2)
    _, whole = partial_decode_attention(
        q=new.q, k=pool, v=pool, q_positions=new.positions, scale=heads.scale,
        softcap=heads.softcap,
    )  # fmt: skip
    return jnp.sum(jnp.exp(jnp.stack(parts) - whole[None]), axis=0)

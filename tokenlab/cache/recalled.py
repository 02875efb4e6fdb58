"""How much of full attention falls on what a policy reads."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from kernels_pallas.block_sparse_attention import Causal
from kernels_pallas.decode_attention import partial_decode_attention
from tokenlab.cache.attending import over_view
from tokenlab.cache.base import CachePolicy, Entries, Heads, Reading, Room
from tokenlab.core.arrays import Array, Float, Int
from tokenlab.core.errors import UserError


def attention_recalled(
    reading: Reading,
    new: Entries,
    keys: Float[Array, "B S K E"],
    *,
    heads: Heads,
    lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B T H"]:
    """``Σ over what is read of exp(score) / Σ over all earlier tokens of exp(score)``.

    The tokens of the pass themselves are in neither sum. It is a share, at most 1, where a policy
    leaves keys and positions as they are.

    Args:
        reading: what the policy shows.
        new: the tokens of the pass, turned.
        keys: all earlier keys, turned.
        heads: how they score.
        lengths: how many keys of each row are earlier ones; None is all.
    """
    parts = [over_view(view, new, heads, Causal(), None)[0][1] for view in reading.views]
    pool = keys.swapaxes(1, 2)
    _, whole = partial_decode_attention(
        q=new.q, k=pool, v=pool, q_positions=new.positions, scale=heads.scale,
        softcap=heads.softcap, lengths=lengths,
    )  # fmt: skip
    return jnp.sum(jnp.exp(jnp.stack(parts) - whole[None]), axis=0)


def recalled_in_decoding(
    policy: CachePolicy,
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S K E"],
    *,
    prompt: int,
    heads: Heads,
) -> Float[Array, "B N H"]:
    """:func:`attention_recalled` at every token after a prompt, as one after another is read.

    Rows may be layers: keys and queries are given, so no layer waits for another. Values play no
    part, so a policy that merges entries by them is not what is measured.

    Args:
        policy: the policy.
        q: queries of prompt and text, turned.
        k: keys, likewise.
        prompt: tokens of the prompt.
        heads: how they score.

    Returns:
        The share for each of the other tokens.

    Raises:
        UserError: the policy moves keys, so that there is no share; or no token is left.
    """
    if not policy.rotated:
        raise UserError(
            f"{type(policy).__name__} gives keys other positions than full attention does, so it "
            "recalls no share of that; score text through it instead"
        )
    if not 0 < prompt < q.shape[1]:
        raise UserError(f"a prompt of {prompt} of {q.shape[1]} tokens leaves nothing to decode")
    return _decoded((policy, prompt, heads), q, k)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(
    static: tuple[CachePolicy, int, Heads], q: Float[Array, "B S H E"], k: Float[Array, "B S K E"]
) -> Float[Array, "B N H"]:
    policy, prompt, heads = static
    rows, tokens = k.shape[:2]

    def entries(start: Array | int, size: int) -> Entries:
        queries, keys = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (q, k))
        places = jnp.broadcast_to(start + jnp.arange(size)[None], (rows, size))
        return Entries(queries, keys, keys, places, jnp.ones_like(places))

    state = policy.init(Room(rows, tokens, k.dtype), heads)
    state = policy.append(state, entries(0, prompt), heads=heads)

    def step(state: PyTree, at: Array) -> tuple[PyTree, Array]:
        new = entries(at, 1)
        reading = policy.read(state, new, heads=heads)
        lengths = jnp.broadcast_to(at, rows)
        recalled = attention_recalled(reading, new, k, heads=heads, lengths=lengths)
        return policy.append(reading.state, new, heads=heads), recalled[:, 0]

    _, recalled = jax.lax.scan(step, state, jnp.arange(prompt, tokens))
    return jnp.moveaxis(recalled, 0, 1)

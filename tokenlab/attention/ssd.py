"""State-space duality: a decaying linear recurrence, computed as products of matrices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float

# A decay of exp(-20) is none at all in float32; sums of lower ones would lose the digits of others.
_LOWEST = -20.0
# Of each head: what is read from it with C has the width of X.
State = Float[Array, "B H N P"]


class Scanned(NamedTuple):
    """The recurrence of a row of tokens, before or after it is read.

    Attributes:
        c: what reads the state.
        b: where the state is written.
        x: what is written there.
        log_decay: logarithm of the share of the state that is kept, at most 0.
        valid: others neither write nor decay.
        starts: tokens before which the state is emptied.
    """

    c: Float[Array, "B T H N"]
    b: Float[Array, "B T H N"]
    x: Float[Array, "B T H P"]
    log_decay: Float[Array, "B T H"]
    valid: Bool[Array, "B T"]
    starts: Bool[Array, "B T"]

    def prepared(self) -> Scanned:
        """Float32, with nothing at tokens that are not valid, and decays in range."""
        c, b, x = (
            jnp.where(self.valid[..., None, None], each, 0).astype(jnp.float32) for each in self[:3]
        )
        log_decay = jnp.clip(self.log_decay.astype(jnp.float32), _LOWEST, 0.0)
        log_decay = jnp.where(self.valid[..., None], log_decay, 0.0)
        return Scanned(c, b, x, log_decay, self.valid, self.starts)

    def reversed(self) -> Scanned:
        """The tokens from the last to the first; the state is emptied where it was."""
        before = jnp.pad(self.starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        return Scanned(*(jnp.flip(each, axis=1) for each in self._replace(starts=before)))


def ssd(
    row: Scanned, *, state: State | None = None, chunk: int = 64
) -> tuple[Float[Array, "B T H P"], State]:
    """``h_i = a_i h_{i-1} + b_i x_iᵀ``, ``y_i = h_iᵀ c_i``, chunk by chunk.

    Inside a chunk as masked attention without a softmax, ``y = (L ∘ C Bᵀ) X`` with
    ``L_ij = Π_{j<k≤i} a_k``; from chunk to chunk as a recurrence of the state. The work grows
    linearly with T.

    Reference: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms
    Through Structured State Space Duality", 2024, arXiv:2405.21060, section 6.

    Differences from the paper: every head has a B and a C of its own; rows may hold several
    documents and padding.

    Args:
        row: the tokens.
        state: before the first token; None is empty.
        chunk: tokens of a chunk; rows are padded to a multiple of it.

    Returns:
        What each token reads, float32, and the state after the last token.
    """
    batch, length = row.valid.shape
    chunk = min(chunk, length)
    row = Scanned(*(_padded(each, -length % chunk) for each in row.prepared()))
    if state is None:
        state = jnp.zeros((batch, *row.b.shape[2:], row.x.shape[-1]), jnp.float32)
    runs = jnp.cumsum(row.starts, axis=1)
    # Heads before tokens, once for all chunks: their products need no transposition.
    chunks = tuple(
        jnp.moveaxis(each.reshape(batch, -1, chunk, *each.shape[2:]), (1, 3), (0, 2))
        for each in row[:4]
    )
    chunks += (jnp.moveaxis(runs.reshape(batch, -1, chunk), 1, 0),)
    first = (state.astype(jnp.float32), jnp.zeros((batch,), runs.dtype))
    if length <= chunk:  # without a loop, which takes long to compile
        (state, _), y = _chunk(first, tuple(each[0] for each in chunks))
        return jnp.swapaxes(y, 1, 2), state
    (state, _), y = jax.lax.scan(_chunk, first, chunks)
    y = jnp.moveaxis(y, (0, 2), (1, 3)).reshape(batch, -1, *first[0].shape[1::2])
    return y[:, :length], state


def _chunk(carry: tuple[Array, Array], parts: tuple[Array, ...]) -> tuple[tuple, Array]:
    """One chunk; ``runs`` says which tokens share a state, with each other and with the past."""
    state, run = carry
    c, b, x, log_decay, runs = parts
    total = jnp.cumsum(log_decay, axis=2)
    scores = jnp.einsum("bhin,bhjn->bhij", c, b) * _decays(total, runs)
    inherits = (runs == run[:, None])[:, None]
    carried = jnp.where(inherits, jnp.exp(total), 0.0)
    y = jnp.einsum("bhij,bhjp->bhip", scores, x)
    y += carried[..., None] * jnp.einsum("bhin,bhnp->bhip", c, state)
    stays = (runs == runs[:, -1:])[:, None]
    left = jnp.where(stays, jnp.exp(total[:, :, -1:] - total), 0.0)
    state = carried[:, :, -1, None, None] * state
    state += jnp.einsum("bhjn,bhjp->bhnp", b * left[..., None], x)
    return (state, runs[:, -1]), y


def _decays(total: Float[Array, "B H T"], runs: Array) -> Float[Array, "B H T T"]:
    """``L_ij = exp(total_i - total_j)`` where j is at or before i in the same run, else 0."""
    seen = jnp.tril(jnp.ones((runs.shape[1],) * 2, bool))
    seen = seen[None] & (runs[:, :, None] == runs[:, None, :])
    difference = total[..., :, None] - total[..., None, :]
    return jnp.exp(jnp.where(seen[:, None], difference, -jnp.inf))


def _padded(x: Array, count: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2))


def quadratic_ssd(row: Scanned) -> Float[Array, "B T H P"]:
    """:func:`ssd` as one masked product over whole rows: the dual, for reference."""
    row = row.prepared()
    total = jnp.moveaxis(jnp.cumsum(row.log_decay, axis=1), 1, 2)
    decays = _decays(total, jnp.cumsum(row.starts, axis=1))
    scores = jnp.einsum("bihn,bjhn->bhij", row.c, row.b) * decays
    return jnp.einsum("bhij,bjhp->bihp", scores, row.x)


def associative_ssd(row: Scanned) -> Float[Array, "B T H P"]:
    """:func:`ssd` as an associative scan that holds every state, for reference."""
    row = row.prepared()
    decay = jnp.where(row.starts[..., None], 0.0, jnp.exp(row.log_decay))[..., None, None]
    written = jnp.einsum("bthn,bthp->bthnp", row.b, row.x)

    def joined(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    _, states = jax.lax.associative_scan(joined, (decay, written), axis=1)
    return jnp.einsum("bthnp,bthn->bthp", states, row.c)


def ssd_flops(*, heads: int, width: int, chunk: int) -> int:
    """Floating-point operations of :func:`ssd` per token, matrix products only.

    Args:
        heads: number of heads.
        width: of B, C and X.
        chunk: tokens of a chunk.
    """
    return 4 * heads * width * (chunk + width)

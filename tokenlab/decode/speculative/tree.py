"""Trees of drafted tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float, Int


class Tree(NamedTuple):
    """Drafted continuations of each row; a node comes after its parent and its older siblings.

    Attributes:
        tokens: drafted tokens.
        parents: node that each follows; -1 is the last token of the row.
        valid: whether a node is one; what follows it is not, otherwise.
        proposals: distribution that each token was drawn from once its older siblings were
            rejected; None where all were proposed for certain.
    """

    tokens: Int[Array, "B N"]
    parents: Int[Array, "B N"]
    valid: Bool[Array, "B N"]
    proposals: Float[Array, "B N V"] | None

    @classmethod
    def empty(cls, batch: int, nodes: int, vocabulary: int | None = None) -> Tree:
        """Room for ``nodes``; with distributions where a vocabulary is given."""
        shape = (batch, nodes)
        return cls(
            tokens=jnp.zeros(shape, jnp.int32),
            parents=jnp.full(shape, -1, jnp.int32),
            valid=jnp.zeros(shape, bool),
            proposals=None if vocabulary is None else jnp.zeros((*shape, vocabulary)),
        )

    @property
    def size(self) -> int:
        """Nodes, whether valid or not."""
        return self.tokens.shape[1]

    def ancestors(self) -> Bool[Array, "B N N"]:
        """Which nodes lie on the way to each node, itself included."""
        eye = jnp.eye(self.size, dtype=bool)

        def add(i: Array, seen: Array) -> Array:
            parent = self.parents[:, i]
            above = jnp.take_along_axis(seen, jnp.maximum(parent, 0)[:, None, None], axis=1)[:, 0]
            above = jnp.where((parent >= 0)[:, None], above, False)
            return seen.at[:, i].set(above | eye[i][None])

        start = jnp.zeros((*self.tokens.shape, self.size), bool)
        return jax.lax.fori_loop(0, self.size, add, start)

    def path(self, node: Int[Array, " B"], depth: int) -> Int[Array, "B L"]:
        """Nodes from the root to ``node``, at most ``depth``, and -1 after them."""

        def up(node: Array, _: None) -> tuple[Array, Array]:
            parent = jnp.take_along_axis(self.parents, jnp.maximum(node, 0)[:, None], axis=1)[:, 0]
            return jnp.where(node >= 0, parent, -1), node

        _, backwards = jax.lax.scan(up, node, None, length=depth)
        backwards = backwards.T
        count = jnp.sum(backwards >= 0, axis=1)
        at = count[:, None] - 1 - jnp.arange(depth)[None, :]
        forwards = jnp.take_along_axis(backwards, jnp.maximum(at, 0), axis=1)
        return jnp.where(at >= 0, forwards, -1)


class Verdict(NamedTuple):
    """What is taken of a tree.

    Attributes:
        path: nodes accepted, in order, -1 after them.
        count: how many.
        token: what follows them: drawn where the last rejection left it, or at a leaf.
    """

    path: Int[Array, "B L"]
    count: Int[Array, " B"]
    token: Int[Array, " B"]

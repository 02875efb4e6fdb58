"""Drafted trees whose shape follows the draft's own confidence, and ones whose shape is fixed."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float, Int, RowKeys
from tokenlab.core.errors import UserError
from tokenlab.decode.speculative.drafters import Ask, ModelDrafter, Reader
from tokenlab.decode.speculative.tree import Tree


class _Frontier(NamedTuple):
    """Ways to add a node: slot 0 hangs on the root, slot n + 1 on node n.

    Attributes:
        value: estimated probability that verification gets there; 0 where there is no way.
        left: what the next child of the slot is drawn from; zeros until the draft has read it.
        known: whether it has.
    """

    value: Float[Array, "B M"]
    left: Float[Array, "B M V"]
    known: Bool[Array, "B M"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicTree(ModelDrafter):
    """DySpec: the next node goes where verification is likeliest to arrive, as the draft sees it.

    A way to add a node has a value v, at first 1 for a child of the root. The best way is taken: a
    token y is drawn from what is left there, R. If y should be accepted, its first child is worth
    ``v R[y]``; if not, its next sibling ``v (1 - R[y])``, drawn from R without y.

    The draft reads a tree whenever the best way is one whose distribution it has not seen yet, so
    its passes are far fewer than nodes.

    With ``expected``, ways are ranked by ``v Σ R^2``, the chance that verification gets there and
    that the token drawn there is accepted, with R in the place of the target.

    Reference: Xiong et al., "DySpec: Faster Speculative Decoding with Dynamic Token Tree
    Structure", 2024, arXiv:2410.11744, algorithm 1; its text has the rank of ``expected``.

    Differences from the paper: arrays instead of a heap; where a model is to be asked, all nodes
    are asked of at once; ``layered`` is its threshold variant.

    Attributes:
        size: nodes of a tree.
        deepest: longest path; a node there has no child.
        threshold: only ways of at least this rank are taken; 0 takes the best until the tree is
            full. ``1 / size`` is the paper's choice for its cheaper variant.
        expected: whether the rank of a way has the acceptance of its next token in it; otherwise it
            is v.
    """

    size: int = 16
    deepest: int = 8
    threshold: float = 0.0
    expected: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1 or self.deepest < 1 or not 0 <= self.threshold < 1:
            raise UserError(
                f"a tree of size {self.size}, depth {self.deepest} and threshold {self.threshold} "
                "needs at least 1 node, 1 level, and a threshold in [0, 1)"
            )

    @property
    def nodes(self) -> int:
        """Its size."""
        return self.size

    @property
    def depth(self) -> int:
        """Longest path."""
        return min(self.size, self.deepest)

    def grow(
        self,
        tree: Tree,
        first: Float[Array, "B V"],
        *,
        ask: Ask,
        state: Reader,
        keys: RowKeys,
    ) -> tuple[Tree, Reader]:
        """Adds a node at a time; asks the draft where a row cannot go on without."""
        slots = (len(first), self.size + 1)
        frontier = _Frontier(
            value=jnp.zeros(slots).at[:, 0].set(1.0),
            left=jnp.zeros((*slots, first.shape[1])).at[:, 0].set(first),
            known=jnp.zeros(slots, bool).at[:, 0].set(True),
        )

        def step(carry: tuple[Tree, _Frontier, Reader], i: Array) -> tuple[tuple, None]:
            tree, frontier, state = carry
            best = jnp.argmax(self._ranks(frontier), axis=1)
            known = jnp.take_along_axis(frontier.known, best[:, None], axis=1)
            frontier, state = jax.lax.cond(
                jnp.all(known),
                lambda: (frontier, state),
                lambda: _informed(frontier, tree, *ask(state, tree)),
            )
            # What the draft has just read may rank lower than before.
            ranks = self._ranks(frontier)
            tree, frontier = jax.vmap(self._add, in_axes=(0, 0, 0, None, 0))(
                tree, frontier, ranks, i, keys
            )
            return (tree, frontier, state), None

        (tree, _, state), _ = jax.lax.scan(step, (tree, frontier, state), jnp.arange(self.size))
        return tree, state

    def _ranks(self, frontier: _Frontier) -> Float[Array, "B M"]:
        """By which the best way is found; at least as high as that where the draft is unknown."""
        if not self.expected:
            return frontier.value
        accepted = jnp.sum(frontier.left**2, axis=2)
        return frontier.value * jnp.where(frontier.known, accepted, 1.0)

    def _add(
        self, tree: Tree, frontier: _Frontier, ranks: Array, i: Array, key: Array
    ) -> tuple[Tree, _Frontier]:
        """One row: node ``i`` as the next child of the best slot."""
        slot = jnp.argmax(ranks)
        value, left = frontier.value[slot], frontier.left[slot]
        taken = (ranks[slot] > 0) & (ranks[slot] >= self.threshold)
        token, rest = _drawn(jax.random.fold_in(key, i), left)
        chance = left[token]
        again = jnp.where(jnp.any(rest > 0), value * (1 - chance), 0.0)
        parent = slot - 1
        depth = _depth(tree, parent) + 1
        first = jnp.where(depth < self.depth, value * chance, 0.0)
        # Where nothing is taken, all is written to where there is nothing.
        at, from_ = jnp.where(taken, i, self.size), jnp.where(taken, slot, self.size + 1)
        behind = jnp.where(taken, i + 1, self.size + 1)
        put = functools.partial(_put, at=at)
        return Tree(
            tokens=put(tree.tokens, token),
            parents=put(tree.parents, parent),
            valid=put(tree.valid, True),
            proposals=put(cast(Array, tree.proposals), left),
        ), frontier._replace(
            value=_put(_put(frontier.value, again, at=from_), first, at=behind),
            left=_put(frontier.left, rest, at=from_),
        )


def _put(x: Array, value: Any, *, at: Array) -> Array:
    return x.at[at].set(value, mode="drop")


def _informed(
    frontier: _Frontier, tree: Tree, chances: Float[Array, "B N V"], state: Reader
) -> tuple[_Frontier, Reader]:
    """With distributions after all nodes that had none."""
    fresh = tree.valid & ~frontier.known[:, 1:]
    left = jnp.where(fresh[..., None], chances, frontier.left[:, 1:])
    return frontier._replace(
        left=frontier.left.at[:, 1:].set(left),
        known=frontier.known.at[:, 1:].set(frontier.known[:, 1:] | tree.valid),
    ), state


def _depth(tree: Tree, node: Int[Array, ""]) -> Int[Array, ""]:
    """Nodes on the way to ``node`` of one row, itself included; 0 for the root."""

    def up(state: tuple[Array, Array]) -> tuple[Array, Array]:
        node, count = state
        return tree.parents[jnp.maximum(node, 0)], count + 1

    return jax.lax.while_loop(lambda s: s[0] >= 0, up, (node, jnp.int32(0)))[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedTree(ModelDrafter):
    """A tree of one shape: every node of level l has ``branches[l]`` children, drawn apart.

    Siblings are drawn without replacement: each from what its older ones have left.

    Reference: Miao et al., "SpecInfer: Accelerating Generative Large Language Model Serving with
    Tree-based Speculative Inference and Verification", 2023, arXiv:2305.09781.

    Attributes:
        branches: children of a node, by level.
    """

    branches: tuple[int, ...] = (4, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.branches or min(self.branches) < 1:
            raise UserError(f"branches {self.branches} must be at least one level of at least 1")

    @property
    def nodes(self) -> int:
        """All levels together."""
        return sum(math.prod(self.branches[: level + 1]) for level in range(self.depth))

    @property
    def depth(self) -> int:
        """Levels."""
        return len(self.branches)

    def grow(
        self,
        tree: Tree,
        first: Float[Array, "B V"],
        *,
        ask: Ask,
        state: Reader,
        keys: RowKeys,
    ) -> tuple[Tree, Reader]:
        """A level at a time."""
        batch = len(first)
        chances, start, above = first[:, None], -1, 1
        for level, branch in enumerate(self.branches):
            if level:
                after, state = ask(state, tree)
                chances = after[:, start : start + above]
            count = above * branch
            here = start + above + jnp.arange(count) if level else jnp.arange(count)
            parents = start + jnp.arange(count) // branch if level else jnp.full(count, -1)
            apart = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
            draw = jax.vmap(jax.vmap(functools.partial(_siblings, count=branch)))
            drawn = draw(apart(keys, here[::branch]), chances)
            tokens, proposals, possible = (x.reshape(batch, count, *x.shape[3:]) for x in drawn)
            tree = Tree(
                tokens=tree.tokens.at[:, here].set(tokens),
                parents=tree.parents.at[:, here].set(parents),
                valid=tree.valid.at[:, here].set(possible),
                proposals=cast(Array, tree.proposals).at[:, here].set(proposals),
            )
            start, above = (start + above, count) if level else (0, count)
        return tree, state


def _siblings(
    key: Array, chances: Float[Array, " V"], *, count: int
) -> tuple[Int[Array, " N"], Float[Array, "N V"], Bool[Array, " N"]]:
    """Children of one node, without replacement."""

    def draw(left: Array, i: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        token, rest = _drawn(jax.random.fold_in(key, i), left)
        return rest, (token, left, jnp.sum(left) > 0)

    return jax.lax.scan(draw, chances, jnp.arange(count))[1]


def _drawn(key: Array, left: Float[Array, " V"]) -> tuple[Int[Array, ""], Float[Array, " V"]]:
    """A token, and what is left to draw from without it; zeros where that is nothing."""
    token = jax.random.categorical(key, jnp.log(left)).astype(jnp.int32)
    rest = left.at[token].set(0.0)
    total = jnp.sum(rest)
    return token, jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), 0.0)

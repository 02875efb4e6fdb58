"""Drafted trees whose shape follows the draft's own confidence, and ones whose shape is fixed."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Int, RowKeys
from tokenlab.core.errors import UserError
from tokenlab.decode.processors import History
from tokenlab.decode.samplers import Sampler
from tokenlab.decode.speculative.drafters import Draft, ModelDrafter, Reader
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

    Reference: Xiong et al., "DySpec: Faster Speculative Decoding with Dynamic Token Tree
    Structure", 2024, arXiv:2410.11744, algorithm 1.

    Differences from the paper: arrays instead of a heap; where a model is to be asked, all nodes
    are asked of at once; ``layered`` is its threshold variant.

    Attributes:
        size: nodes of a tree.
        deepest: longest path; a node there has no child.
        threshold: only ways of at least this value are taken; 0 takes the best until the tree is
            full. ``1 / size`` is the paper's choice for its cheaper variant.
    """

    size: int = 16
    deepest: int = 8
    threshold: float = 0.0

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

    def propose(
        self,
        draft: Draft | None,
        state: PyTree,
        *,
        history: History,
        sampler: Sampler,
        keys: RowKeys,
    ) -> tuple[Tree, PyTree]:
        """Adds a node at a time; asks the draft where a row cannot go on without."""
        draft = cast(Draft, draft)
        logits, state = self._root(draft, state, history)
        batch, vocabulary = logits.shape
        tree = Tree.empty(batch, self.size, vocabulary)
        left = jnp.zeros((batch, self.size + 1, vocabulary))
        slots = (batch, self.size + 1)
        frontier = _Frontier(
            value=jnp.zeros(slots).at[:, 0].set(1.0),
            left=left.at[:, 0].set(self._shaped(logits, history, sampler)),
            known=jnp.zeros(slots, bool).at[:, 0].set(True),
        )

        def step(carry: tuple[Tree, _Frontier, Reader], i: Array) -> tuple[tuple, None]:
            tree, frontier, state = carry
            best = jnp.argmax(frontier.value, axis=1)
            known = jnp.take_along_axis(frontier.known, best[:, None], axis=1)[:, 0]
            frontier, state = jax.lax.cond(
                jnp.all(known),
                lambda: (frontier, state),
                lambda: self._ask(draft, state, tree, frontier, history, sampler),
            )
            tree, frontier = jax.vmap(self._grow, in_axes=(0, 0, 0, None, 0))(
                tree, frontier, best, i, keys
            )
            return (tree, frontier, state), None

        (tree, _, state), _ = jax.lax.scan(step, (tree, frontier, state), jnp.arange(self.size))
        return tree, state

    def _ask(
        self,
        draft: Draft,
        state: Reader,
        tree: Tree,
        frontier: _Frontier,
        history: History,
        sampler: Sampler,
    ) -> tuple[_Frontier, Reader]:
        """Distributions after all nodes there are."""
        chances, state = self._after(draft, state, tree, history, sampler)
        fresh = tree.valid & ~frontier.known[:, 1:]
        left = jnp.where(fresh[..., None], chances, frontier.left[:, 1:])
        return frontier._replace(
            left=frontier.left.at[:, 1:].set(left),
            known=frontier.known.at[:, 1:].set(frontier.known[:, 1:] | tree.valid),
        ), state

    def _grow(
        self, tree: Tree, frontier: _Frontier, slot: Array, i: Array, key: Array
    ) -> tuple[Tree, _Frontier]:
        """One row: node ``i`` as the next child of ``slot``."""
        value, left = frontier.value[slot], frontier.left[slot]
        taken = (value > 0) & (value >= self.threshold)
        token = jax.random.categorical(jax.random.fold_in(key, i), jnp.log(left)).astype(jnp.int32)
        chance = left[token]
        rest = left.at[token].set(0.0)
        total = jnp.sum(rest)
        rest = jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), 0.0)
        again = jnp.where(total > 0, value * (1 - chance), 0.0)
        parent = slot - 1
        depth = _depth(tree, parent) + 1
        first = jnp.where(depth < self.depth, value * chance, 0.0)
        grown = tree._replace(
            tokens=tree.tokens.at[i].set(token),
            parents=tree.parents.at[i].set(parent),
            valid=tree.valid.at[i].set(True),
            proposals=cast(Array, tree.proposals).at[i].set(left),
        )
        after = frontier._replace(
            value=frontier.value.at[slot].set(again).at[i + 1].set(first),
            left=frontier.left.at[slot].set(rest),
        )
        return jax.tree.map(
            lambda old, new: jnp.where(taken, new, old), (tree, frontier), (grown, after)
        )


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
    def _levels(self) -> list[tuple[int, int]]:
        """First node and number of nodes of each level."""
        levels, first, count = [], 0, 1
        for branch in self.branches:
            count *= branch
            levels.append((first, count))
            first += count
        return levels

    @property
    def nodes(self) -> int:
        """All levels together."""
        return sum(count for _, count in self._levels)

    @property
    def depth(self) -> int:
        """Levels."""
        return len(self.branches)

    def propose(
        self,
        draft: Draft | None,
        state: PyTree,
        *,
        history: History,
        sampler: Sampler,
        keys: RowKeys,
    ) -> tuple[Tree, PyTree]:
        """A level at a time."""
        draft = cast(Draft, draft)
        logits, state = self._root(draft, state, history)
        batch, vocabulary = logits.shape
        tree = Tree.empty(batch, self.nodes, vocabulary)
        chances = self._shaped(logits, history, sampler)[:, None]
        before, above = -1, 1
        for level, (first, count) in enumerate(self._levels):
            branch = self.branches[level]
            if level:
                after, state = self._after(draft, state, tree, history, sampler)
                chances = after[:, before : before + above]
            here = jnp.arange(first, first + count)
            above_keys = jax.vmap(
                lambda key, here=here, branch=branch: jax.vmap(jax.random.fold_in, (None, 0))(
                    key, here[::branch]
                )
            )(keys)
            draw = jax.vmap(jax.vmap(functools.partial(_siblings, count=branch)))
            tokens, proposals, possible = draw(above_keys, chances)
            parents = before + jnp.arange(count) // branch if level else jnp.full(count, -1)
            tree = tree._replace(
                tokens=tree.tokens.at[:, here].set(tokens.reshape(batch, count)),
                parents=tree.parents.at[:, here].set(parents),
                valid=tree.valid.at[:, here].set(possible.reshape(batch, count)),
                proposals=cast(Array, tree.proposals)
                .at[:, here]
                .set(proposals.reshape(batch, count, vocabulary)),
            )
            before, above = first, count
        return tree, state


def _siblings(
    key: Array, chances: Float[Array, " V"], *, count: int
) -> tuple[Int[Array, " N"], Float[Array, "N V"], Bool[Array, " N"]]:
    """Children of one node, without replacement."""

    def draw(left: Array, i: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        token = jax.random.categorical(jax.random.fold_in(key, i), jnp.log(left)).astype(jnp.int32)
        rest = left.at[token].set(0.0)
        total = jnp.sum(rest)
        after = jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), 0.0)
        return after, (token, left, jnp.sum(left) > 0)

    return jax.lax.scan(draw, chances, jnp.arange(count))[1]

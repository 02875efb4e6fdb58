"""Drafters that ask no model: what the context said before, and what followed a token lately."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Bool, Float, Int, RowKeys
from tokenlab.core.errors import UserError
from tokenlab.decode.processors import History
from tokenlab.decode.samplers import Sampler
from tokenlab.decode.speculative.drafters import Draft, Drafter, Outcome
from tokenlab.decode.speculative.tree import Tree


def longest_match(
    history: History, *, longest: int, shortest: int
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Where the last tokens of each row have stood before.

    Args:
        history: tokens of the rows.
        longest: tokens of the longest suffix looked for.
        shortest: of the shortest.

    Returns:
        The place behind the latest earlier occurrence of the longest suffix that has one, -1 if
        none has; and the length of that suffix, 0 if none.
    """
    tokens, lengths = history.tokens, history.lengths
    suffix = history.last(longest)
    place = jnp.arange(tokens.shape[1])[None, :]
    equal = jnp.ones(tokens.shape, bool)
    found, size = jnp.full(len(tokens), -1), jnp.zeros(len(tokens), jnp.int32)
    for back in range(longest):
        # Whether the token that is ``back`` before each place is the suffix's.
        shifted = jnp.pad(tokens, ((0, 0), (back + 1, 0)), constant_values=-2)[:, : tokens.shape[1]]
        equal &= shifted == suffix[:, longest - 1 - back][:, None]
        if back + 1 < shortest:
            continue
        behind = equal & (place > back) & (place < lengths[:, None])
        last = jnp.max(jnp.where(behind, place, -1), axis=1)
        found = jnp.where(last >= 0, last, found)
        size = jnp.where(last >= 0, back + 1, size)
    return found, size


def copied(history: History, start: Int[Array, " B"], count: int) -> Int[Array, "B N"]:
    """Tokens from ``start`` on, -1 where there are none."""
    at = start[:, None] + jnp.arange(count)[None, :]
    inside = (start[:, None] >= 0) & (at < history.lengths[:, None])
    tokens = jnp.take_along_axis(
        history.tokens, jnp.clip(at, 0, history.tokens.shape[1] - 1), axis=1
    )
    return jnp.where(inside, tokens, -1)


def _check_suffixes(longest: int, shortest: int) -> None:
    if not 1 <= shortest <= longest:
        raise UserError(f"suffixes of {shortest} to {longest} tokens must be from 1 up")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup(Drafter):
    """A chain copied from where the last tokens stood before.

    Reference: the rule is Apoorv Saxena's prompt lookup decoding (2023, code without a paper); as a
    model-free case of assisted generation.

    Attributes:
        length: tokens copied.
        longest: of the suffix looked for.
        shortest: of the suffix that still counts.
    """

    length: int = 10
    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        _check_suffixes(self.longest, self.shortest)
        if self.length < 1:
            raise UserError(f"length {self.length} must be at least 1")

    @property
    def nodes(self) -> int:
        """The chain."""
        return self.length

    def begin(
        self,
        draft: Draft | None,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, " B"],
        *,
        capacity: int,
        vocabulary: int,
    ) -> PyTree:
        """Nothing: the history says it all."""
        return ()

    def propose(
        self,
        draft: Draft | None,
        state: PyTree,
        *,
        history: History,
        sampler: Sampler,
        keys: RowKeys,
    ) -> tuple[Tree, PyTree]:
        """The tokens behind the match, for certain."""
        start, _ = longest_match(history, longest=self.longest, shortest=self.shortest)
        tokens = copied(history, start, self.length)
        parents = jnp.broadcast_to(jnp.arange(self.length)[None] - 1, tokens.shape)
        return Tree(jnp.maximum(tokens, 0), parents, tokens >= 0, None), state


class GooseState(flax.struct.PyTreeNode):
    """What Goose has learned in each row.

    Attributes:
        following: the likeliest tokens after each token when it was last read; -1 if it was not.
        spine: estimated chance that a copied token is accepted.
        branch: the same of the followers, by rank.
    """

    following: Int[Array, "B V W"]
    spine: Float[Array, " B"]
    branch: Float[Array, "B W"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goose(Drafter):
    """A deep spine copied from the context, and branches of what lately followed each token.

    With chances p of a copied token and b_j of the follower of rank j, copied token i is worth
    ``p^i`` and a follower of it ``p^i (1 - p [there is token i + 1]) b_j``; followers of followers
    are worth their parent's value times b_j. The tree holds the nodes of most value. Both chances
    are running means of what was accepted.

    Reference: "Goose: Anisotropic Speculation Trees for Training-Free Speculative Decoding", 2025;
    followers: Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language
    Models with Token Recycling", 2024, arXiv:2408.08696.

    Differences from the paper: the rule of sizes is reconstructed from the roles that its public
    code gives to the two sources; branches are at most two deep.

    Attributes:
        size: nodes of a tree.
        longest: of the suffix looked for.
        shortest: of the suffix that still counts.
        deepest: copied tokens at most; 0 leaves the spine out (token recycling).
        width: followers kept of a token; 0 leaves branches out (prompt lookup).
        prior: chances of both at the start: of a copied token and of a follower of rank 0; rank
            j has ``b (1 - b)^j``.
        rate: of the running means.
        adaptive: whether chances are learned; balanced trees keep the prior.
    """

    size: int = 32
    longest: int = 4
    shortest: int = 2
    deepest: int = 16
    width: int = 8
    prior: tuple[float, float] = (0.6, 0.1)
    rate: float = 0.05
    adaptive: bool = True

    def __post_init__(self) -> None:
        _check_suffixes(self.longest, self.shortest)
        if self.size < 1 or self.deepest < 0 or self.width < 0 or not self.deepest + self.width:
            raise UserError(
                f"a tree of {self.size} nodes, {self.deepest} copied and {self.width} followers "
                "needs at least 1 node and one of the two sources"
            )
        if not all(0 < p < 1 for p in self.prior):
            raise UserError(f"prior {self.prior} must be two chances between 0 and 1")

    @property
    def nodes(self) -> int:
        """The budget."""
        return self.size

    @property
    def depth(self) -> int:
        """The spine with two followers behind it."""
        return min(self.size, self.deepest + (2 if self.width else 0))

    def begin(
        self,
        draft: Draft | None,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, " B"],
        *,
        capacity: int,
        vocabulary: int,
    ) -> GooseState:
        """An empty table; followers are learned as tokens are read."""
        batch, first = len(tokens), self.prior[1]
        ranks = jnp.arange(self.width)
        return GooseState(
            following=jnp.full((batch, vocabulary, self.width), -1, jnp.int32),
            spine=jnp.full(batch, self.prior[0]),
            branch=jnp.broadcast_to(first * (1 - first) ** ranks, (batch, self.width)),
        )

    def propose(
        self,
        draft: Draft | None,
        state: GooseState,
        *,
        history: History,
        sampler: Sampler,
        keys: RowKeys,
    ) -> tuple[Tree, GooseState]:
        """The nodes of most value."""
        start, _ = longest_match(history, longest=self.longest, shortest=self.shortest)
        spine = copied(history, start, self.deepest)
        tree = jax.vmap(self._tree)(state, spine, history.last(1)[:, 0])
        return tree, state

    def _tree(self, state: GooseState, spine: Int[Array, " L"], root: Int[Array, ""]) -> Tree:
        """One row: candidates are the spine, its followers, and the followers of those."""
        count, width = self.deepest, self.width
        on = jnp.concatenate([root[None], jnp.maximum(spine, 0)])
        there = jnp.concatenate([jnp.ones(1, bool), spine >= 0])
        after = jnp.concatenate([spine, jnp.full(1, -1)])
        reach = state.spine ** jnp.arange(count + 1)
        p, b = state.spine, state.branch
        first = state.following[on]  # [L + 1, W]
        use = there[:, None] & (first >= 0) & (first != after[:, None])
        worth = (reach * (1 - p * (after >= 0)))[:, None] * b[None]
        worth = jnp.where(use, worth, 0.0)
        second = state.following[jnp.maximum(first, 0)]  # [L + 1, W, W]
        deep = jnp.where(use[..., None] & (second >= 0), worth[..., None] * b[None, None], 0.0)
        spine_worth = jnp.where(spine >= 0, reach[1:], 0.0)
        # Candidates: spine, first followers, second followers; parents by number of candidate.
        number = count + jnp.arange((count + 1) * width).reshape(count + 1, width)
        parents = [
            jnp.arange(count) - 1,
            jnp.broadcast_to(jnp.arange(-1, count)[:, None], first.shape).reshape(-1),
            jnp.broadcast_to(number[..., None], second.shape).reshape(-1),
        ]
        worths = jnp.concatenate([spine_worth, worth.reshape(-1), deep.reshape(-1)])
        tokens = jnp.concatenate([spine, first.reshape(-1), second.reshape(-1)])
        # A parent is worth more than its child, but for equal values: it comes first of equals.
        total = len(worths)
        size = min(self.size, total)
        best, chosen = jax.lax.top_k(worths, size)
        chosen = jnp.sort(jnp.where(best > 0, chosen, total))
        taken = chosen < total
        at = jnp.where(taken, chosen, 0)
        place = jnp.full(total + 1, -1).at[jnp.where(taken, chosen, total)].set(jnp.arange(size))
        above = jnp.concatenate(parents)[at]
        parent = jnp.where(above >= 0, place[jnp.maximum(above, 0)], -1)
        missing = self.size - size
        taken, at, parent = (jnp.pad(x, (0, missing)) for x in (taken, at, parent))
        return Tree(
            jnp.where(taken, jnp.maximum(tokens[at], 0), 0).astype(jnp.int32),
            jnp.where(taken, parent, -1).astype(jnp.int32),
            taken,
            None,
        )

    def learn(self, state: GooseState, outcome: Outcome) -> GooseState:
        """Followers of every token that was read, the last node winning; and the chances."""
        tree, running = outcome.tree, outcome.running
        if self.width:
            read = jnp.concatenate([outcome.root[:, None], tree.tokens], axis=1)
            valid = jnp.concatenate([running[:, None], tree.valid], axis=1)
            best = jax.lax.top_k(outcome.logits, self.width)[1]
            state = state.replace(following=_put_last(state.following, read, valid, best))
        if not self.adaptive:
            return state
        return self._chances(state, outcome)

    def _chances(self, state: GooseState, outcome: Outcome) -> GooseState:
        """Running means over the nodes whose parent was accepted."""
        tree, verdict = outcome.tree, outcome.verdict
        rows = jnp.arange(len(tree.tokens))[:, None]
        accepted = jnp.zeros((len(tree.tokens), tree.size + 1), bool)
        path = jnp.where(verdict.path >= 0, verdict.path, tree.size)  # the last is the root
        accepted = accepted.at[rows, path].set(True).at[:, -1].set(True)
        above = jnp.take_along_axis(
            accepted, jnp.where(tree.parents >= 0, tree.parents, tree.size), 1
        )
        judged = tree.valid & above
        taken = accepted[:, : tree.size]
        number = jnp.arange(tree.size)[None, :]
        # Spine nodes come first and in a chain.
        spine = judged & (tree.parents == number - 1) & (number < self.deepest)
        spine &= jnp.cumprod(tree.parents == number - 1, axis=1).astype(bool)
        share = jnp.sum(spine & taken, 1) / jnp.maximum(jnp.sum(spine, 1), 1)
        some = jnp.any(spine, axis=1)
        mean = jnp.where(some, (1 - self.rate) * state.spine + self.rate * share, state.spine)
        mean = jnp.clip(mean, 0.02, 0.98)
        if not self.width:
            return state.replace(spine=mean)
        rank = _ranks(tree, judged & ~spine)
        branch = state.branch
        for j in range(self.width):
            here = judged & ~spine & (rank == j)
            share = jnp.sum(here & taken, 1) / jnp.maximum(jnp.sum(here, 1), 1)
            new = jnp.where(
                jnp.any(here, 1), (1 - self.rate) * branch[:, j] + self.rate * share, branch[:, j]
            )
            branch = branch.at[:, j].set(jnp.clip(new, 1e-3, 0.98))
        return state.replace(spine=mean, branch=branch)


def _ranks(tree: Tree, counted: Bool[Array, "B N"]) -> Int[Array, "B N"]:
    """Number of older siblings among ``counted``."""
    same = tree.parents[:, :, None] == tree.parents[:, None, :]
    older = jnp.tril(jnp.ones((tree.size, tree.size), bool), -1)[None]
    return jnp.sum(same & older & counted[:, None, :], axis=2)


def _put_last(
    table: Int[Array, "B V W"],
    tokens: Int[Array, "B M"],
    valid: Bool[Array, "B M"],
    rows: Int[Array, "B M W"],
) -> Int[Array, "B V W"]:
    """``table[b, tokens[b, m]] = rows[b, m]``; of equal tokens the last valid one wins."""
    later = jnp.triu(jnp.ones((tokens.shape[1], tokens.shape[1]), bool), 1)[None]
    same = (tokens[:, :, None] == tokens[:, None, :]) & valid[:, None, :]
    last = valid & ~jnp.any(same & later, axis=2)
    at = jnp.where(last, tokens, table.shape[1])
    return table.at[jnp.arange(len(tokens))[:, None], at].set(rows, mode="drop")

"""Verifiers: which drafted tokens the target takes, so that its distribution stays as it is."""

from __future__ import annotations

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float, Int, PRNGKeyArray, RowKeys
from tokenlab.core.errors import UserError
from tokenlab.decode.speculative.tree import Tree, Verdict

Distribution = Float[Array, " V"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verifier(abc.ABC):
    """The verifier family: what is written has the target's distribution exactly."""

    def __call__(self, tree: Tree, target: Float[Array, "B M V"], *, keys: RowKeys) -> Verdict:
        """Walks each row's tree from its root.

        Args:
            tree: the draft, of N nodes.
            target: the target's distribution after the root and after each node; ``M = N + 1``.
            keys: one per row.

        Returns:
            The accepted path, and the token behind it.
        """
        last, count, token = jax.vmap(self.walk)(tree, target, keys)
        return Verdict(tree.path(last, tree.size), count, token)

    @abc.abstractmethod
    def walk(
        self, tree: Tree, target: Float[Array, "M V"], key: PRNGKeyArray
    ) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """One row, its arrays without the axis of rows.

        Returns:
            The last node accepted, -1 for none; how many; and the token behind them.
        """

    def check(self, width: int) -> None:
        """Refuses drafters that it does not serve; ``width`` is their number of chains, or 0."""
        del width


def _drawn(key: PRNGKeyArray, chances: Distribution) -> Int[Array, ""]:
    return jax.random.categorical(key, jnp.log(chances)).astype(jnp.int32)


def _normalised(weights: Distribution, otherwise: Distribution) -> Distribution:
    total = jnp.sum(weights)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), otherwise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecursiveRejection(Verifier):
    """Siblings one after the other, each against what the rejected ones have left.

    At a node with target T and children ``y_1, y_2, ...`` drawn from ``R_1, R_2, ...``: y_i is
    accepted with probability ``min(1, T[y_i] / R_i[y_i])``; when it is rejected
    ``T ← norm(max(T - R_i, 0))``. When no sibling is left, the token is drawn from T. A token
    proposed for certain has ``R_i`` one at it; a greedy target is one at its best token.

    Reference: Xiong et al., "DySpec: Faster Speculative Decoding with Dynamic Token Tree
    Structure", 2024, arXiv:2410.11744, section 4; with one chain, Leviathan, Kalman, Matias, "Fast
    Inference from Transformers via Speculative Decoding", 2022, arXiv:2211.17192.
    """

    def walk(
        self, tree: Tree, target: Float[Array, "M V"], key: PRNGKeyArray
    ) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Nodes in order: those that are no child of the last accepted one are passed over."""
        vocabulary = target.shape[1]

        def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            here, count, left = state
            token = tree.tokens[i]
            if tree.proposals is None:
                proposal = jax.nn.one_hot(token, vocabulary)
            else:
                proposal = tree.proposals[i]
            asked = tree.valid[i] & (tree.parents[i] == here)
            chance = left[token] / jnp.maximum(proposal[token], 1e-30)
            accepted = asked & (jax.random.uniform(jax.random.fold_in(key, i)) < chance)
            rejected = _normalised(jnp.maximum(left - proposal, 0), left)
            left = jnp.where(accepted, target[i + 1], jnp.where(asked, rejected, left))
            return jnp.where(accepted, i, here), count + accepted, left

        size = len(tree.tokens)
        start = (jnp.int32(-1), jnp.int32(0), target[0])
        here, count, left = jax.lax.fori_loop(0, size, step, start)
        return here, count, _drawn(jax.random.fold_in(key, size), left)


class _Walk(NamedTuple):
    alive: Bool[Array, " K"]
    node: Int[Array, ""]
    count: Int[Array, ""]
    stopped: Bool[Array, ""]
    token: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KSequential(Verifier):
    """SpecTr: of k independent drafts, the first that passes a test common to all.

    With ``beta(rho) = Σ min(p, q / rho)``, drafts are tried in turn and accepted with
    ``min(1, q(x) / (rho p(x)))``, rho being the root in [1, k] of
    ``1 - (1 - beta(rho))^k = rho beta(rho)``. When all are rejected, the token is drawn from
    ``(q - min(p, q / rho) P / beta) / (1 - beta)^k`` with ``P = 1 - (1 - beta)^k``. Drafts that
    agree with what was accepted stay in the game.

    Reference: Sun, Suresh, Ro, Beirami, Jain, Yu, "SpecTr: Fast Speculative Decoding via Optimal
    Transport", 2023, arXiv:2310.15141, algorithm 3.

    Attributes:
        chains: independent drafts k.
    """

    chains: int

    def __post_init__(self) -> None:
        if self.chains < 1:
            raise UserError(f"chains {self.chains} must be at least 1")

    def check(self, width: int) -> None:
        """Its drafts are ``chains`` independent ones."""
        if width != self.chains:
            raise UserError(
                f"KSequential(chains={self.chains}) verifies as many independent chains, not "
                f"{width}; take RecursiveRejection for other drafts"
            )

    def walk(
        self, tree: Tree, target: Float[Array, "M V"], key: PRNGKeyArray
    ) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Position by position; node ``c * length + l`` is token l of chain c."""
        if tree.proposals is None:
            raise UserError("KSequential needs drafts that were drawn, not looked up")
        length = len(tree.tokens) // self.chains
        tokens = tree.tokens.reshape(self.chains, length)
        valid = tree.valid.reshape(self.chains, length)
        proposals = tree.proposals.reshape(self.chains, length, -1)

        def step(at: Array, walk: _Walk) -> _Walk:
            keys = jax.random.split(jax.random.fold_in(key, at), self.chains + 1)
            # All that are alive have read the same, so any of them knows p.
            alive = walk.alive & valid[:, at]
            p = proposals[jnp.argmax(alive), at]
            q = target[walk.node + 1]
            chosen, residual = k_sequential(p, q, tokens[:, at], alive, keys[1:])
            found = chosen >= 0
            token = tokens[chosen, at]
            none = ~jnp.any(alive)
            drawn = _drawn(keys[0], jnp.where(none, q, residual))
            after = _Walk(
                alive=alive & (tokens[:, at] == token),
                node=jnp.where(found, chosen * length + at, walk.node).astype(jnp.int32),
                count=walk.count + found,
                stopped=~found,
                token=drawn,
            )
            return jax.tree.map(lambda old, new: jnp.where(walk.stopped, old, new), walk, after)

        start = _Walk(
            jnp.ones(self.chains, bool), jnp.int32(-1), jnp.int32(0), jnp.bool_(False), jnp.int32(0)
        )
        walk = jax.lax.fori_loop(0, length, step, start)
        bonus = _drawn(jax.random.fold_in(key, length), target[walk.node + 1])
        return walk.node, walk.count, jnp.where(walk.stopped, walk.token, bonus)


def k_sequential(
    p: Distribution,
    q: Distribution,
    tokens: Int[Array, " K"],
    alive: Bool[Array, " K"],
    keys: RowKeys,
) -> tuple[Int[Array, ""], Distribution]:
    """One token by the rule of :class:`KSequential`.

    Args:
        p: what the drafts were drawn from.
        q: the target.
        tokens: the drafts.
        alive: which of them are in the game.
        keys: one per draft.

    Returns:
        The draft accepted, -1 for none, and what to draw from in that case.
    """
    k = jnp.sum(alive).astype(jnp.float32)
    rho = transport_rate(p, q, k)
    kept = jnp.minimum(p, q / rho)
    beta = jnp.minimum(jnp.sum(kept), 1.0)
    chance = q[tokens] / jnp.maximum(rho * p[tokens], 1e-30)
    passed = alive & (jax.vmap(jax.random.uniform)(keys) < chance)
    first = jnp.where(jnp.any(passed), jnp.argmax(passed), -1)
    accepted = 1 - (1 - beta) ** k
    left = q - kept * accepted / jnp.maximum(beta, 1e-30)
    return first, _normalised(jnp.maximum(left, 0), q)


def transport_rate(p: Distribution, q: Distribution, k: Float[Array, ""]) -> Float[Array, ""]:
    """The root rho in [1, k] of ``1 - (1 - beta(rho))^k = rho beta(rho)``, by 40 bisections."""

    def excess(rho: Array) -> Array:
        beta = jnp.minimum(jnp.sum(jnp.minimum(p, q / rho)), 1.0)
        return 1 - (1 - beta) ** k - rho * beta

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        above = excess(middle) > 0
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    ends = jnp.float32(1.0), jnp.maximum(k, 1.0)
    # At the upper end of what is left, the residual is a distribution for certain.
    high = jax.lax.fori_loop(0, 40, halve, ends)[1]
    return jnp.where(excess(jnp.float32(1.0)) <= 0, 1.0, high)

"""The halting family: after how many recursions of a loop each token stops."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int
from tokenlab.core.parameters import parameter
from tokenlab.core.reports import report
from tokenlab.core.weighted import Weighted
from tokenlab.routing import LinearScores, Scores


class Halting(nn.Module, abc.ABC):
    """The halting family: a distribution over depths 1 to M for each token, and when it stops."""

    @abc.abstractmethod
    def __call__(
        self, states: Sequence[Hidden], *, depths: int, valid: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T M"]:
        """The chances ``q(1), ..., q(M)`` of each depth; float32, they sum to 1.

        Args:
            states: the stream ``h_0`` before the loop and behind each recursion so far. With fewer
                than M recursions, members that read later ones leave at M what is not placed yet.
            depths: M.
            valid: tokens that are not padding, for what members report; None is all.
        """

    @nn.nowrap
    def stopped(self, chances: Float[Array, "B T M"], *, depth: int) -> Bool[Array, "B T"]:
        """Whether a token that runs by the hard rule stops at ``depth`` or did before.

        Here the first depth up to which at least half of the chances lie.
        """
        return _up_to(chances, depth) >= 0.5

    @nn.nowrap
    def drawn(
        self, chances: Float[Array, "B T M"], *, depth: int, level: Float[Array, "B T"]
    ) -> Bool[Array, "B T"]:
        """:meth:`stopped` of a depth that is drawn from the chances, by a uniform ``level``."""
        return _up_to(chances, depth) >= level


class EarlyHalting(Halting):
    """Before the loop: ``q = softmax(W h_0)`` over the depths; the likeliest by the hard rule.

    The state is read at length 1, ``h / |h|``; W starts at zero.

    Reference: "Understanding Dynamic Compute Allocation in Recurrent Transformers", 2026,
    arXiv:2602.08864 (ANIRA-E).

    Differences from the paper: the head is not published in a form that we could read; this one is
    the plainest.
    """

    @nn.compact
    def __call__(
        self, states: Sequence[Hidden], *, depths: int, valid: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T M"]:
        """From the first state alone."""
        width = states[0].shape[-1]
        init = nn.initializers.zeros
        weight = parameter(self, "kernel", init, (width, depths), ("embed", "mlp"))
        return jax.nn.softmax(jnp.einsum("btd,dm->btm", _normed(states[0]), weight), axis=-1)

    @nn.nowrap
    def stopped(self, chances: Float[Array, "B T M"], *, depth: int) -> Bool[Array, "B T"]:
        """The likeliest depth; the smaller of equal ones."""
        return jnp.argmax(chances, axis=-1) < depth


class OnlineHalting(Halting):
    """Behind each recursion: ``s_d = sigmoid(w . h_d + b)``, ``q(d) = s_d prod_{j<d} (1 - s_j)``.

    ``q(M)`` is what remains. The states are read at length 1; w starts at zero and b below, so that
    training begins deep.

    Reference: "Understanding Dynamic Compute Allocation in Recurrent Transformers", 2026,
    arXiv:2602.08864 (ANIRA-O); the chances are those of Banino, Balaguer, Blundell, "PonderNet:
    Learning to Ponder", 2021, arXiv:2107.05407.

    Attributes:
        bias: where b starts.
    """

    bias: float = -2.0

    @nn.compact
    def __call__(
        self, states: Sequence[Hidden], *, depths: int, valid: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T M"]:
        """From the states behind the recursions so far; that behind the last is not read."""
        width = states[0].shape[-1]
        weight = parameter(self, "kernel", nn.initializers.zeros, (width,), ("embed",))
        bias = parameter(self, "bias", nn.initializers.constant(self.bias), (), ())
        read = states[1 : max(2, depths)]  # one at least, so that M = 1 has the parameters too
        scores = jnp.stack([_normed(h) @ weight + bias for h in read], axis=-1)
        return geometric(scores[..., : depths - 1], depths=depths)


class TokenChoice(Halting):
    """Before the loop: ``q = softmax(u)``; by the hard rule the depth of highest ``q + bias``.

    Reported: ``aux["balance"]``, ``M sum_d f_d P_d`` of the depths' shares f of tokens and mean
    chances P, 1 where depths are even; ``aux["z"]``, ``logsumexp(u)^2``; and with ``biased``
    ``aux["dual"]``, ``sum_d bias_d (f_d - 1/M)``, by which
    ``Group(parameters=("*/decision/bias",), optimizer=SGD(learning_rate=Constant(peak=1e-3),
    sign=True))`` is balance without a loss: ``bias_d += 1e-3 sign(1/M - f_d)``.

    Reference: Bae, Kim, Bayat, Kim, Ha, Schuster, Fisch, Harutyunyan, Ji, Courville, Yun,
    "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level
    Computation", 2025, arXiv:2507.10524 (token-choice routing).

    Differences from the paper: chances are a softmax; the variant of sigmoids is left out.

    Attributes:
        head: gives ``u``.
        biased: whether the choice has a bias.
    """

    head: Scores = LinearScores()
    biased: bool = False

    @nn.compact
    def __call__(
        self, states: Sequence[Hidden], *, depths: int, valid: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T M"]:
        """From the first state alone; reports once all states are there."""
        scores = self.head.copy(parent=self, name="scores")(states[0], choices=depths)
        chances = jax.nn.softmax(scores, axis=-1)
        bias = None
        if self.biased:
            bias = parameter(self, "bias", nn.initializers.zeros, (depths,), ("norm",))
        if len(states) == depths + 1:
            valid = jnp.ones(scores.shape[:2], bool) if valid is None else valid
            self._report(scores, chances, bias, valid.astype(jnp.float32))
        return chances

    def _report(
        self,
        scores: Float[Array, "B T M"],
        chances: Float[Array, "B T M"],
        bias: Float[Array, " M"] | None,
        valid: Float[Array, "B T"],
    ) -> None:
        depths, tokens = scores.shape[-1], jnp.sum(valid)
        chosen = jax.nn.one_hot(self._best(chances), depths)
        of_tokens = jnp.maximum(tokens, 1.0)
        shares, means = (
            jnp.einsum("btm,bt->m", each, valid) / of_tokens for each in (chosen, chances)
        )
        aux = {
            "balance": Weighted(total=tokens * depths * jnp.sum(shares * means), weight=tokens),
            "z": Weighted.of(jax.nn.logsumexp(scores, axis=-1) ** 2, valid),
        }
        if bias is not None:
            dual = jnp.sum(bias * (shares - 1 / depths))
            aux["dual"] = Weighted(total=tokens * dual, weight=tokens)
        report(self, aux=aux)

    def _best(self, chances: Float[Array, "B T M"]) -> Int[Array, "B T"]:
        if self.biased:
            bias = nn.meta.unbox(self.get_variable("params", "bias"))
            chances = chances + bias[None, None]
        return jnp.argmax(chances, axis=-1)

    def stopped(self, chances: Float[Array, "B T M"], *, depth: int) -> Bool[Array, "B T"]:
        """The depth of highest chance and bias; the smaller of equal ones."""
        return self._best(chances) < depth


class FixedHalting(Halting):
    """Every token at one depth: the loop of fixed depth, on the parameters of any other.

    Reference: the baseline of "Understanding Dynamic Compute Allocation in Recurrent Transformers",
    2026, arXiv:2602.08864.

    Attributes:
        depth: the depth; None is the last.
    """

    depth: int | None = None

    @nn.compact
    def __call__(
        self, states: Sequence[Hidden], *, depths: int, valid: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T M"]:
        """One at the depth, 0 elsewhere."""
        depth = depths if self.depth is None else self.depth
        if not 1 <= depth <= depths:
            raise ValueError(f"depth {depth} is not one of 1 to {depths}")
        chances = jax.nn.one_hot(depth - 1, depths)
        return jnp.broadcast_to(chances[None, None], (*states[0].shape[:2], depths))


def geometric(scores: Float[Array, "*N d"], *, depths: int) -> Float[Array, "*N M"]:
    """``q(d) = s_d prod_{j<d} (1 - s_j)`` with ``s = sigmoid(scores)``, and at M what remains.

    Args:
        scores: of the first depths, fewer than M; float32.
        depths: M.
    """
    stay = jnp.cumsum(jax.nn.log_sigmoid(-scores), axis=-1)
    before = jnp.concatenate([jnp.zeros_like(stay[..., :1]), stay], axis=-1)
    known = jnp.exp(jax.nn.log_sigmoid(scores) + before[..., :-1])
    missing = depths - 1 - scores.shape[-1]
    unplaced = jnp.zeros((*scores.shape[:-1], missing), scores.dtype)
    return jnp.concatenate([known, unplaced, jnp.exp(before[..., -1:])], axis=-1)


def _normed(x: Hidden) -> Hidden:
    """At length 1, so that a step of the optimiser moves scores alike at any width."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-5)


def _up_to(chances: Float[Array, "B T M"], depth: int) -> Float[Array, "B T"]:
    return jnp.sum(chances[..., :depth], axis=-1)

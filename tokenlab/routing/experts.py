"""The expert gate family: which experts run on each token, and how their results are mixed."""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Bool, Float, Hidden
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import dense_init, parameter
from tokenlab.core.weighted import Weighted
from tokenlab.routing.balance import expert_loads, lagrangian

ExpertScores = Float[Array, "B T E"]


@flax.struct.dataclass
class ExpertChoice:
    """What a gate decides; padding has no experts.

    Attributes:
        chosen: experts that run on each token.
        weights: float32 factor of each expert's result, 0 where it does not run.
        probabilities: float32 scores that sum to 1 over the experts.
        aux: losses of the gate's own parameters.
    """

    chosen: Bool[Array, "B T E"]
    weights: Float[Array, "B T E"]
    probabilities: Float[Array, "B T E"]
    aux: dict[str, Weighted] = flax.struct.field(default_factory=dict)


class ExpertGate(nn.Module, abc.ABC):
    """The expert gate family: scores ``x @ kernel`` in float32, and a rule that reads them.

    Outside training the choice of a token depends on that token alone.
    """

    @abc.abstractmethod
    def __call__(
        self, x: Hidden, *, num_experts: int, valid: Bool[Array, "B T"], train: bool
    ) -> ExpertChoice:
        """Chooses experts for every token.

        Args:
            x: normalised tokens, finite also where there is padding.
            num_experts: experts E to choose among.
            valid: tokens that are not padding.
            train: whether the choice may depend on other tokens of the batch.

        Raises:
            UserError: there are not as many experts as the gate wants.
        """

    @nn.nowrap
    def most_active(self, num_experts: int) -> int:
        """The most experts that a token may get; all of them unless the gate knows better."""
        return num_experts

    def _logits(self, x: Hidden, num_experts: int) -> ExpertScores:
        shape = (x.shape[-1], num_experts)
        kernel = parameter(self, "kernel", dense_init, shape, ("embed", "norm"))
        return jnp.einsum(
            "btd,de->bte", x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST
        )


class TopKGate(ExpertGate):
    """The k experts of highest score, mixed by their scores, which are made to sum to 1.

    Reference: Shazeer, Mirhoseini, Maziarz, Davis, Le, Hinton, Dean, "Outrageously Large Neural
    Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017, arXiv:1701.06538.

    Differences from the paper: no noise on the scores.

    Attributes:
        k: experts of each token.
        score: what makes scores of logits.
    """

    k: int = 2
    score: Literal["softmax", "sigmoid"] = "softmax"

    @nn.compact
    def __call__(
        self, x: Hidden, *, num_experts: int, valid: Bool[Array, "B T"], train: bool
    ) -> ExpertChoice:
        """Each token by its own scores; equal scores go to the earlier expert."""
        scores = self._scores(x, num_experts)
        return self._mixed(scores, best(scores, self.k), valid)

    @nn.nowrap
    def most_active(self, num_experts: int) -> int:
        """As many as every token gets.

        Raises:
            UserError: there are fewer experts.
        """
        if not 1 <= self.k <= num_experts:
            raise UserError(f"gate.k is {self.k}; use 1 to {num_experts}, the number of experts")
        return self.k

    def _scores(self, x: Hidden, num_experts: int) -> ExpertScores:
        logits = self._logits(x, num_experts)
        return nn.softmax(logits) if self.score == "softmax" else nn.sigmoid(logits)

    @nn.nowrap
    def _mixed(
        self, scores: ExpertScores, chosen: Bool[Array, "B T E"], valid: Bool[Array, "B T"]
    ) -> ExpertChoice:
        chosen = chosen & valid[..., None]
        return ExpertChoice(
            chosen=chosen,
            weights=_normalised(jnp.where(chosen, scores, 0.0)),
            probabilities=_normalised(scores),
        )


class BiasedTopKGate(TopKGate):
    """The k experts of highest ``score + bias``, mixed by the scores alone: balance without a loss.

    ``bias`` moves by the dual of the balanced assignment,
    ``G(p) = Σ_i TopKSum(γ_i + p) - L Σ_e p_e`` with ``L = k T / E``, whose gradient is the loads
    less L. ``aux["dual"]`` is G over the T tokens, with scores γ held fixed, so

    ``AuxiliaryTerm(name="dual")`` and
    ``Group(parameters=("*/gate/bias",), optimizer=SGD(learning_rate=Constant(peak=1e-3),
    sign=True))``

    are ``p_e += 1e-3 sign(L - A_e)`` after every step, by the loads A_e of the whole batch over
    all devices and micro-batches. Without the sign a step is ``rate * (L - A) / T``. Without the
    term the biases stay as they are.

    Reference: Han and Zhong, "A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of
    Sparse Mixture-of-Experts in Large-Scale AI Models", 2025, arXiv:2512.03915; the rule is that of
    Wang, Gao, Zhao, Sun, Dai, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    2024, arXiv:2408.15664.

    Differences from the paper: the bias is a parameter with a loss and an optimiser of its own, not
    state beside the parameters; the loss moves nothing else.
    """

    score: Literal["softmax", "sigmoid"] = "sigmoid"

    @nn.compact
    def __call__(
        self, x: Hidden, *, num_experts: int, valid: Bool[Array, "B T"], train: bool
    ) -> ExpertChoice:
        """Each token by its own scores and the biases."""
        scores = self._scores(x, num_experts)
        bias = parameter(self, "bias", nn.initializers.zeros, (num_experts,), ("norm",))
        fixed = jax.lax.stop_gradient(scores)
        choice = self._mixed(scores, best(fixed + bias[None, None], self.k), valid)
        tokens = jnp.sum(valid, dtype=jnp.float32)
        dual = lagrangian(fixed, bias=bias, chosen=choice.chosen)
        aux = {"dual": Weighted(total=dual, weight=tokens)}
        return dataclasses.replace(choice, aux=aux)


def best(scores: ExpertScores, k: int) -> Bool[Array, "B T E"]:
    """The k highest of each token; equal ones from the first."""
    places = jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]
    return jnp.any(jax.nn.one_hot(places, scores.shape[-1], dtype=bool), axis=-2)


def balance_loss(choice: ExpertChoice) -> Weighted:
    """``E Σ_e f_e P_e``: 1 where loads are even, more where likely experts have the most tokens.

    ``f_e`` is expert e's share of all activations and carries no gradient, ``P_e`` its mean
    probability.

    Reference: Fedus, Zoph, Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with
    Simple and Efficient Sparsity", 2021, arXiv:2101.03961, equations 4 to 6.

    Args:
        choice: of a layer.
    """
    valid = jnp.any(choice.chosen, axis=-1, keepdims=True)
    tokens = jnp.sum(valid, dtype=jnp.float32)
    loads = expert_loads(choice.chosen)
    share = loads / jnp.maximum(jnp.sum(loads), 1.0)
    probability = jnp.sum(jnp.where(valid, choice.probabilities, 0.0), axis=(0, 1))
    # The sum over tokens is the mean times the weight.
    return Weighted(total=loads.size * jnp.sum(share * probability), weight=tokens)


def _normalised(scores: ExpertScores) -> ExpertScores:
    total = jnp.sum(scores, axis=-1, keepdims=True)
    return scores / jnp.where(total > 0, total, 1.0)

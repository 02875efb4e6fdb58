"""How evenly experts are used, and the dual of the balanced assignment by which biases move.

Scores and choices are over tokens and experts, ``[*N, E]``; a choice leaves out padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float, Scalar


def expert_loads(chosen: Bool[Array, "*N E"]) -> Float[Array, " E"]:
    """Tokens of each expert, ``A_e``, float32."""
    return jnp.sum(chosen.reshape(-1, chosen.shape[-1]), axis=0, dtype=jnp.float32)


def maximum_violation(loads: Float[Array, " E"]) -> Scalar:
    """``MaxVio = max_e A_e / L - 1`` with L the mean load: 0 where balanced, at most E - 1.

    Reference: Wang, Gao, Zhao, Sun, Dai, "Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts", 2024, arXiv:2408.15664.

    Args:
        loads: tokens of each expert; 0 is returned where there are none.
    """
    mean = jnp.mean(loads)
    return jnp.max(loads) / jnp.where(mean > 0, mean, 1.0) - jnp.where(mean > 0, 1.0, 0.0)


def lagrangian(
    scores: Float[Array, "*N E"], *, bias: Float[Array, " E"], chosen: Bool[Array, "*N E"]
) -> Scalar:
    """``Σ_ie (γ_ie + p_e) x_ie - L Σ_e p_e`` of a choice x, with L its mean load.

    At the best choice for ``p`` it is the dual ``G(p)``, and its gradient in p is ``A_e - L``.

    Reference: Han and Zhong, "A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of
    Sparse Mixture-of-Experts in Large-Scale AI Models", 2025, arXiv:2512.03915.

    Args:
        scores: γ.
        bias: p.
        chosen: x, as many experts for every token.
    """
    width = scores.shape[-1]
    scores, chosen = scores.reshape(-1, width), chosen.reshape(-1, width)
    target = jnp.sum(chosen, dtype=scores.dtype) / width
    taken = jnp.sum(jnp.where(chosen, scores + bias[None], 0.0))
    return taken - target * jnp.sum(bias)


def dual_value(scores: Float[Array, "*N E"], *, bias: Float[Array, " E"], k: int) -> Scalar:
    """``G(p) = Σ_i TopKSum(γ_i + p) - L Σ_e p_e`` with ``L = k N / E``.

    It is convex, does not change where all biases move together, and its minimum is the highest
    total score of a balanced choice (where the linear programme has no gap, as this one).

    Reference: as :func:`lagrangian`.

    Args:
        scores: γ, without padding.
        bias: p.
        k: experts of each token.
    """
    scores = scores.reshape(-1, scores.shape[-1])
    highest = jax.lax.top_k(scores + bias[None], k)[0]
    return jnp.sum(highest) - k * scores.shape[0] / scores.shape[1] * jnp.sum(bias)


def switches(before: Bool[Array, "*N E"], after: Bool[Array, "*N E"]) -> Float[Array, "E E"]:
    """How many tokens drop expert ``[i, :]`` and take expert ``[:, j]`` from a choice to the next.

    A token that exchanges several experts counts for every pair of a dropped and a taken one. On
    fixed scores and by one common step, tokens move from i to j only where ``A_j < A_i``.

    Reference: as :func:`lagrangian`.

    Args:
        before: a choice.
        after: the choice that follows it.
    """
    dropped, taken = (
        choice.reshape(-1, choice.shape[-1]).astype(jnp.float32)
        for choice in (before & ~after, after & ~before)
    )
    return jnp.einsum("ni,nj->ij", dropped, taken)


def switching_benefit(
    scores: Float[Array, "*N E"],
    *,
    bias: Float[Array, " E"],
    before: Bool[Array, "*N E"],
    after: Bool[Array, "*N E"],
) -> Scalar:
    """``Σ_ie (γ_ie + p_e) (x'_ie - x_ie)``: what the choice x' for p has more than the last one, x.

    It is 0 or more where x' is the best choice for p, and of a step of rate ε
    ``G(p') - G(p) = -ε Σ_e (A_e - L)^2 + benefit``.

    Reference: as :func:`lagrangian`.

    Args:
        scores: γ, the same in both.
        bias: p of the later choice.
        before: x.
        after: x'.
    """
    width = scores.shape[-1]
    change = after.astype(scores.dtype) - before.astype(scores.dtype)
    return jnp.sum((scores.reshape(-1, width) + bias[None]) * change.reshape(-1, width))


def regret(values: Float[Array, " S"], *, best: Float[Array, " S"]) -> Float[Array, " S"]:
    """``Σ_{m<=n} (G_m(p_m) - G_m(p*))`` after each step n.

    Reference: as :func:`lagrangian`.

    Args:
        values: the dual of each step's scores at the biases of that step.
        best: at the one p* that is compared with.
    """
    return jnp.cumsum(values - best)

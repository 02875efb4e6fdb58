"""What a model may be fed in place of one token: a mixture of all of them."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, xlogy

from tokenlab.core.arrays import Array, Float, RowKeys

# Shares of a Dirichlet draw below this are taken for it, for float32 may round them to 0.
_SMALLEST = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMixture(abc.ABC):
    """The family of token mixtures: the shares of tokens whose mean embedding is fed."""

    @abc.abstractmethod
    def __call__(self, *, logits: Float[Array, "B V"], keys: RowKeys) -> Float[Array, "B V"]:
        """Shares of each row, not negative, with sum one.

        Args:
            logits: of the model, any float dtype.
            keys: one per row, so that a row's draw does not depend on its neighbours; members that
                draw nothing ignore them.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedToken(TokenMixture):
    """The model's own distribution: ``softmax(z)``, so that ``E[embedding]`` is fed.

    Reference: Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak, "Continuous Chain of Thought
    Enables Parallel Exploration and Reasoning", 2025, arXiv:2505.23648.
    """

    def __call__(self, *, logits: Float[Array, "B V"], keys: RowKeys) -> Float[Array, "B V"]:
        """Float32 probabilities."""
        return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomMixture(TokenMixture, abc.ABC):
    """Mixtures that are drawn, whose density a policy gradient needs."""

    @abc.abstractmethod
    def log_ratio(
        self,
        *,
        mixture: Float[Array, "*N V"],
        new: Float[Array, "*N V"],
        old: Float[Array, "*N V"],
    ) -> Float[Array, "*N"]:
        """How much likelier a drawn mixture is by one policy than by another, in nats.

        Args:
            mixture: what was drawn.
            new: logits of the policy that learns.
            old: logits of the policy that drew.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanOfSamples(RandomMixture):
    """Multi-token sampling: the mean of K tokens that are drawn with replacement.

    Normalised, tokens come from ``q = softmax(z / K)`` and the ratio is ``prod_k q_new / q_old``;
    plain, they come from ``p = softmax(z)`` and the ratio is ``(prod_k p_new / p_old)^(1 / K)``.

    Reference: Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak, "Continuous Chain of Thought
    Enables Parallel Exploration and Reasoning", 2025, arXiv:2505.23648.

    Attributes:
        count: K, at least 1; 1 is sampling a token.
        normalised: which of the two.
    """

    count: int = 3
    normalised: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count {self.count} must be at least 1")

    def _log_shares(self, logits: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
        logits = logits.astype(jnp.float32)
        return jax.nn.log_softmax(logits / self.count if self.normalised else logits, axis=-1)

    def __call__(self, *, logits: Float[Array, "B V"], keys: RowKeys) -> Float[Array, "B V"]:
        """Multiples of 1 / K."""
        draw = jax.vmap(lambda key, row: jax.random.categorical(key, row, shape=(self.count,)))
        tokens = draw(keys, self._log_shares(logits))
        return jnp.mean(jax.nn.one_hot(tokens, logits.shape[-1], dtype=jnp.float32), axis=1)

    def log_ratio(
        self,
        *,
        mixture: Float[Array, "*N V"],
        new: Float[Array, "*N V"],
        old: Float[Array, "*N V"],
    ) -> Float[Array, "*N"]:
        """Of the K tokens, whatever their order; of their geometric mean where plain."""
        times = self.count * mixture if self.normalised else mixture
        return jnp.sum(times * (self._log_shares(new) - self._log_shares(old)), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirichletDraw(RandomMixture):
    """A draw from ``Dirichlet(scale * p)`` over the tokens that are likely enough.

    Probabilities below ``floor`` leave the support; in the ratio of two policies a token stays that
    either of them finds likely, with at least ``floor``. Shares are renormalised on the support.

    Reference: Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak, "Continuous Chain of Thought
    Enables Parallel Exploration and Reasoning", 2025, arXiv:2505.23648.

    Differences from the paper: shares below 1e-6 enter the density as 1e-6.

    Attributes:
        scale: concentration; above 0, and the higher the nearer draws are to ``p``.
        floor: least probability, above 0.
    """

    scale: float = 1.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.scale > 0 and 0 < self.floor < 1):
            raise ValueError(f"scale {self.scale} and floor {self.floor} must be above 0, floor <1")

    def _concentration(
        self, probability: Float[Array, "*N V"], support: Float[Array, "*N V"]
    ) -> Float[Array, "*N V"]:
        kept = jnp.maximum(probability, self.floor) * support
        return self.scale * kept / jnp.sum(kept, axis=-1, keepdims=True)

    def __call__(self, *, logits: Float[Array, "B V"], keys: RowKeys) -> Float[Array, "B V"]:
        """Shares on the support, which always has the likeliest token."""
        p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        support = (p >= jnp.minimum(self.floor, jnp.max(p, axis=-1, keepdims=True))).astype(p.dtype)
        alpha = self._concentration(p, support)
        gamma = jax.vmap(jax.random.loggamma)(keys, jnp.where(support > 0, alpha, 1.0))
        return jax.nn.softmax(jnp.where(support > 0, gamma, -jnp.inf), axis=-1)

    def log_ratio(
        self,
        *,
        mixture: Float[Array, "*N V"],
        new: Float[Array, "*N V"],
        old: Float[Array, "*N V"],
    ) -> Float[Array, "*N"]:
        """Of the densities over the tokens that either policy finds likely."""
        p_new, p_old = (jax.nn.softmax(z.astype(jnp.float32), axis=-1) for z in (new, old))
        likely = jnp.maximum(p_new, p_old)
        least = jnp.minimum(self.floor, jnp.max(likely, axis=-1, keepdims=True))
        support = jax.lax.stop_gradient((likely >= least).astype(jnp.float32))
        return self.log_density(
            mixture=mixture, alpha=self._concentration(p_new, support), support=support
        ) - self.log_density(
            mixture=mixture, alpha=self._concentration(p_old, support), support=support
        )

    @staticmethod
    def log_density(
        *,
        mixture: Float[Array, "*N V"],
        alpha: Float[Array, "*N V"],
        support: Float[Array, "*N V"],
    ) -> Float[Array, "*N"]:
        """``log Dirichlet(alpha)`` at ``mixture``, over the tokens of ``support``."""
        inside = jnp.where(support > 0, alpha, 1.0)
        shares = jnp.maximum(mixture, _SMALLEST)
        terms = support * (xlogy(inside - 1, shares) - gammaln(inside))
        return gammaln(jnp.sum(support * alpha, axis=-1)) + jnp.sum(terms, axis=-1)

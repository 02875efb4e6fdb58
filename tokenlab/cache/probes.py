"""Which queries of a pass are unusual, and how layers share what they may read."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp

from tokenlab.core.arrays import Array, Bool, Float, Int

_MOST_WINDOWS = 1000.0


class Moments(flax.struct.PyTreeNode):
    """Running mean and variance of the columns of queries, of each row.

    Attributes:
        mean: of the means of the windows.
        variance: of all queries.
        windows: windows so far, 1000 at most.
    """

    mean: Float[Array, "B D"]
    variance: Float[Array, "B D"]
    windows: Float[Array, " B"]

    @classmethod
    def none(cls, rows: int, width: int) -> Moments:
        """Of nothing."""
        zero = jnp.zeros((rows, width), jnp.float32)
        return cls(zero, zero, zero[:, 0])

    def then(self, u: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Moments:
        """With one more window of n queries of mean m and variance v, N windows before it.

        The first sets ``mean = m`` and ``variance = v n / (n - 1)``; then
        ``variance = (variance (N - 1/n) + v + (m - mean)^2 / (1 + 1/N)) / (N + 1 - 1/n)`` and
        ``mean = (mean N + m) / (N + 1)``.
        """
        n = jnp.sum(valid, axis=1, dtype=jnp.float32)[:, None]
        m, v = _of_window(u, valid)
        inverse = 1 / jnp.maximum(n, 1)
        before = jnp.maximum(self.windows, 1)[:, None]
        variance = self.variance * (before - inverse) + v
        variance += (m - self.mean) ** 2 / (1 + 1 / before)
        variance /= before + 1 - inverse
        mean = (self.mean * before + m) / (before + 1)
        first = (self.windows == 0)[:, None]
        mean = jnp.where(first, m, mean)
        variance = jnp.where(first, v * n / jnp.maximum(n - 1, 1), variance)
        there = n > 0
        return Moments(
            mean=jnp.where(there, mean, self.mean),
            variance=jnp.where(there, variance, self.variance),
            windows=jnp.minimum(self.windows + there[:, 0], _MOST_WINDOWS),
        )


def _of_window(
    u: Float[Array, "B T D"], valid: Bool[Array, "B T"]
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    there = valid[..., None]
    n = jnp.maximum(jnp.sum(there, axis=1), 1)
    mean = jnp.sum(jnp.where(there, u, 0), axis=1) / n
    apart = jnp.where(there, u - mean[:, None], 0)
    return mean, jnp.sum(apart * apart, axis=1) / n


def probe_weights(
    u: Float[Array, "B T D"], valid: Bool[Array, "B T"], moments: Moments, *, warm: int
) -> Float[Array, "B T"]:
    """``A[t] / Σ A`` with ``A[t] = mean_i (u[t, i] - mean[i])^2 / (var[i] + mean(var) / 100)``.

    Args:
        u: queries.
        valid: those that are none of padding; the others weigh 0.
        moments: before this window.
        warm: windows before which a window's own moments are taken.
    """
    ready = (moments.windows >= jnp.maximum(warm, 1))[:, None]
    own = _of_window(u, valid)
    mean = jnp.where(ready, moments.mean, own[0])
    variance = jnp.where(ready, moments.variance, own[1])
    floor = jnp.mean(variance, axis=1, keepdims=True) / 100 + 1e-12
    bias = jnp.mean((u - mean[:, None]) ** 2 / (variance + floor)[:, None], axis=2)
    bias = jnp.where(valid, bias, 0)
    total = jnp.sum(bias, axis=1, keepdims=True)
    even = valid / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    return jnp.where(total > 0, bias / jnp.where(total > 0, total, 1.0), even)


def layer_budgets(
    mu: Float[Array, "L B"], *, total: int, least: int, most: int
) -> Int[Array, "L B"]:
    """Shares in proportion to ``mu``, layer after layer, of what those before have left.

    ``share[l] = clip(round(R · mu[l] / Σ_{j >= l} mu[j]), least, most)`` and ``R -= share[l]``,
    which begins as ``total``; halves are rounded to even. Equal parts where all mu are 0.
    """
    rest = jnp.flip(jnp.cumsum(jnp.flip(mu, axis=0), axis=0), axis=0)
    left = jnp.full(mu.shape[1:], total, jnp.float32)
    shares = []
    for layer in range(len(mu)):
        part = mu[layer] / jnp.where(rest[layer] > 0, rest[layer], 1.0)
        part = jnp.where(rest[layer] > 0, part, 1 / (len(mu) - layer))
        shares.append(jnp.clip(jnp.round(left * part), least, most))
        left = left - shares[-1]
    return jnp.stack(shares).astype(jnp.int32)

"""Vocabulary projections whose tokens share rows, and their statistics without expanding them."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from kernels_pallas.linear_cross_entropy import TargetLogits
from tokenlab.core.arrays import Array, Float, Hidden, Int, Logits, Tokens

# Bias of a row that no token has; finite, so that its gradients are zero and not NaN.
_NOBODY = -1e30


@flax.struct.dataclass
class SharedRows:
    """A projection of V tokens with K rows: ``logit[v] = hidden · rows[codes[v]] + bias[v]``.

    Attributes:
        rows: the rows, float32.
        codes: which row each token has.
        bias: what tokens of one row differ by, or None for nothing.
    """

    rows: Float[Array, "K D"]
    codes: Int[Array, " V"]
    bias: Float[Array, " V"] | None = None

    def row_bias(self) -> Float[Array, " K"]:
        """``log Σ_{v of row k} exp(bias[v])``, which is the log of the number of its tokens."""
        count = self.rows.shape[0]
        if self.bias is None:
            total = jnp.zeros((count,)).at[self.codes].add(1.0)
            return jnp.where(total > 0, jnp.log(jnp.maximum(total, 1.0)), _NOBODY)
        top = jnp.full((count,), _NOBODY).at[self.codes].max(jax.lax.stop_gradient(self.bias))
        total = jnp.zeros((count,)).at[self.codes].add(jnp.exp(self.bias - top[self.codes]))
        return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), _NOBODY)

    def of_tokens(
        self,
        of_rows: TargetLogits,
        *,
        hidden: Hidden,
        targets: Tokens,
        row_bias: Float[Array, " K"],
    ) -> TargetLogits:
        """Statistics over tokens, from those over rows with :meth:`row_bias` added.

        ``log Σ_v exp logit[v]`` is that of the rows as it is.

        Args:
            of_rows: with ``codes[targets]`` as targets.
            hidden: last hidden states.
            targets: token ids.
            row_bias: what :meth:`row_bias` gave.
        """
        share = jnp.zeros(row_bias.shape).at[self.codes].add(1.0 / self.codes.shape[0])
        mean_row = (share @ self.rows).astype(hidden.dtype)
        mean = jnp.einsum("btd,d->bt", hidden, mean_row, preferred_element_type=jnp.float32)
        own = -jnp.take(row_bias, jnp.take(self.codes, targets, mode="clip"))
        if self.bias is not None:
            own += jnp.take(self.bias, targets, mode="clip")
            mean += jnp.mean(self.bias)
        return TargetLogits(target=of_rows.target + own, log_sum_exp=of_rows.log_sum_exp, mean=mean)

    def logits(self, hidden: Hidden) -> Logits:
        """Float32 logits of all tokens: K products per position, then a gather."""
        rows = self.rows.astype(hidden.dtype)
        logits = jnp.einsum("btd,kd->btk", hidden, rows, preferred_element_type=jnp.float32)
        logits = jnp.take(logits, self.codes, axis=-1)
        return logits if self.bias is None else logits + self.bias[None, None]

    def expanded(self) -> Float[Array, "V D"]:
        """A row per token, without the biases: for what knows only plain projections."""
        return jnp.take(self.rows, self.codes, axis=0)

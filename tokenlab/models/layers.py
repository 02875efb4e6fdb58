"""The small parts: projection, norm, rotary positions, feed-forward layers.

Parameters are float32; every part computes in the dtype of its input.
"""

from __future__ import annotations

import abc
import dataclasses
import fnmatch

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int
from tokenlab.core.parameters import dense_init, parameter


class Linear(nn.Module):
    """``y = x @ kernel``, or ``y = x @ kernel + bias``.

    Attributes:
        features: output width.
        axes: logical names of the kernel's two axes.
        bias: whether a bias is added.
        zero: whether the kernel starts at zero.
        adapter: what is added to the kernel if it is for a projection of this name, or None.
    """

    features: int
    axes: tuple[str, str] = ("embed", "mlp")
    bias: bool = False
    zero: bool = False
    adapter: LowRank | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Projects the last axis."""
        self.sow("intermediates", "inputs", x)  # for calibration; kept only where asked for
        shape = (x.shape[-1], self.features)
        init = nn.initializers.zeros if self.zero else dense_init
        kernel = parameter(self, "kernel", init, shape, self.axes)
        # One matrix of all tokens: XLA:CPU runs [B, T, D] @ [D, F] far below [B*T, D] @ [D, F].
        flat = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)
        if self.bias:
            bias = parameter(self, "bias", nn.initializers.zeros, shape[1:], self.axes[1:])
            flat += bias.astype(x.dtype)[None]
        out = flat.reshape(*x.shape[:-1], self.features)
        if self.adapter is None or not self.adapter.adapts(self.name):
            return out
        return out + self.adapter.copy(parent=self, name="adapter")(x, axes=self.axes, like=out)


class LowRank(nn.Module):
    """A change of low rank to a kernel: ``y += alpha / rank * (x A) B``, with B zero at the start.

    ``models.adapted`` puts it into a model, ``models.merged`` adds it to the kernels.

    Reference: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: Low-Rank Adaptation of
    Large Language Models", 2021, arXiv:2106.09685.

    Differences from the paper: none known; dropout is left out.

    Attributes:
        rank: columns of A.
        alpha: scale of the change at rank 1.
        targets: patterns (``*`` is any text) of the names of projections that are changed: ``q``,
            ``k``, ``v`` and ``out`` of attention, ``gate``, ``up`` and ``down``.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*",)

    @nn.nowrap
    def adapts(self, name: str | None) -> bool:
        """Whether it changes the projection ``name``."""
        return any(fnmatch.fnmatchcase(str(name), target) for target in self.targets)

    @nn.nowrap
    def flops(self, name: str, inputs: int, outputs: int) -> int:
        """Operations of a token that it adds to the projection ``name``."""
        return 2 * self.rank * (inputs + outputs) if self.adapts(name) else 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, axes: tuple[str, str], like: Float[Array, "B T F"]
    ) -> Float[Array, "B T F"]:
        """What is added to ``x @ kernel``.

        Args:
            x: input of the layer.
            axes: logical names of the kernel's axes.
            like: the output of the layer, for its width.
        """
        narrow = Linear(self.rank, axes=(axes[0], "norm"), name="a")(x)
        wide = Linear(like.shape[-1], axes=("norm", axes[1]), zero=True, name="b")(narrow)
        return self.alpha / self.rank * wide


class RMSNorm(nn.Module):
    """Root-mean-square norm: ``x / sqrt(mean(x^2) + epsilon) * scale``, in float32.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019,
    arXiv:1910.07467.

    Attributes:
        epsilon: added to the mean square.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        """Normalises the last axis."""
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), ("norm",))
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * inverse * scale).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryScaling(abc.ABC):
    """The family of changes to rotary frequencies by which a model reads longer documents."""

    @abc.abstractmethod
    def __call__(self, frequency: Float[Array, " F"]) -> Float[Array, " F"]:
        """The frequencies to turn by, in radians per position."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(RotaryScaling):
    """Divides every frequency, as if positions lay closer together.

    Reference: Chen, Wong, Chen, Tian, "Extending Context Window of Large Language Models via
    Positional Interpolation", 2023, arXiv:2306.15595.

    Attributes:
        factor: the divisor.
    """

    factor: float

    def __call__(self, frequency: Float[Array, " F"]) -> Float[Array, " F"]:
        """``frequency / factor``."""
        return frequency / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RotaryScaling):
    """Divides slow frequencies, keeps fast ones, and blends between.

    With ``n = original_length * frequency / 2π`` turns within the original context,
    ``s = clip((n - low) / (high - low), 0, 1)`` and ``frequency * (s + (1 - s) / factor)``.

    Reference: Grattafiori et al., "The Llama 3 Herd of Models", 2024, arXiv:2407.21783; the formula
    is that of the released code.

    Attributes:
        factor: divisor of slow frequencies.
        low: turns below which a frequency is slow.
        high: turns above which a frequency is fast.
        original_length: context in tokens before the extension.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __call__(self, frequency: Float[Array, " F"]) -> Float[Array, " F"]:
        """Frequencies by the number of turns they make."""
        turns = self.original_length * frequency / (2 * jnp.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequency * (kept + (1 - kept) / self.factor)


def rotate(
    x: Float[Array, "B T H E"],
    *,
    positions: Int[Array, "B T"],
    base: float,
    scaling: RotaryScaling | None = None,
) -> Float[Array, "B T H E"]:
    """Rotary position embedding: turns pair ``(x_i, x_{i+E/2})`` by ``position * base^(-2i/E)``.

    Args:
        x: queries or keys; E is even.
        positions: position of each token within its document.
        base: wavelength base of the slowest pair.
        scaling: change of the frequencies.

    Reference:
        Su, Lu, Pan, Murtadha, Wen, Liu, "RoFormer: Enhanced Transformer with Rotary Position
        Embedding", 2021, arXiv:2104.09864, equation 34 (halves layout).
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency = scaling(frequency)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """:func:`rotate` of one kind of layer.

    Attributes:
        base: wavelength base of the slowest pair.
        scaling: change of the frequencies.
    """

    base: float
    scaling: RotaryScaling | None = None

    def __call__(
        self, x: Float[Array, "B T H E"], *, positions: Int[Array, "B T"]
    ) -> Float[Array, "B T H E"]:
        """``x`` turned by its positions."""
        return rotate(x, positions=positions, base=self.base, scaling=self.scaling)


class FeedForward(nn.Module, abc.ABC):
    """The feed-forward family: mixes the channels of each token by itself."""

    @abc.abstractmethod
    def __call__(
        self, x: Hidden, *, valid: Bool[Array, "B T"] | None = None, train: bool = False
    ) -> Hidden:
        """The layer's contribution to the residual stream.

        What else there is to say of the tokens, ``core.reports.report`` takes.

        Args:
            x: normalised tokens.
            valid: tokens that are not padding; None is all.
            train: whether random choices are made (stream ``routes``).
        """

    @abc.abstractmethod
    def flops(self, dim: int) -> int:
        """Floating-point operations of the matrix products, per token of a width-D stream.

        Those that depend on the token are reported as ``flops`` instead.
        """


class GatedFeedForward(FeedForward):
    """Gated feed-forward: ``(activation(x W_gate) * (x W_up)) W_down``.

    Reference: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.

    Attributes:
        hidden_dim: width of the gated layer.
        adapter: what is added to kernels, or None.
    """

    hidden_dim: int
    adapter: LowRank | None = None

    @abc.abstractmethod
    def activation(self, gate: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """The nonlinearity of the gate."""

    @nn.compact
    def __call__(
        self, x: Hidden, *, valid: Bool[Array, "B T"] | None = None, train: bool = False
    ) -> Hidden:
        """Applies the gated layer to every token."""
        gate = Linear(self.hidden_dim, adapter=self.adapter, name="gate")(x)
        up = Linear(self.hidden_dim, adapter=self.adapter, name="up")(x)
        hidden = self.activation(gate) * up
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
        down = Linear(x.shape[-1], axes=("mlp", "embed"), adapter=self.adapter, name="down")
        return down(hidden)

    def flops(self, dim: int) -> int:
        """Three projections, with what is added to them."""
        plain, names = 2 * 3 * dim * self.hidden_dim, ("gate", "up", "down")
        if self.adapter is None:
            return plain
        return plain + sum(self.adapter.flops(name, dim, self.hidden_dim) for name in names)


class SwiGLU(GatedFeedForward):
    """Gated by ``silu(x) = x sigmoid(x)``.

    Reference: as ``GatedFeedForward``: arXiv:2002.05202.
    """

    @nn.nowrap
    def activation(self, gate: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """``silu(gate)``."""
        return nn.silu(gate)


class GeGLU(GatedFeedForward):
    """Gated by the tanh form of the Gaussian error linear unit, as Gemma is.

    Reference: as ``GatedFeedForward``: arXiv:2002.05202.
    """

    @nn.nowrap
    def activation(self, gate: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """``gelu(gate)``, by tanh."""
        return nn.gelu(gate, approximate=True)

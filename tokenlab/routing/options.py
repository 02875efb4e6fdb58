"""The option family: which form of a unit a token gets, the unit itself or a cheaper stand-in."""

from __future__ import annotations

import abc
import dataclasses
import math
import zlib
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.core.arrays import Array, Bool, Float, Hidden, Int, Scalar
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import parameter
from tokenlab.core.weighted import Weighted
from tokenlab.routing.chance import draws
from tokenlab.routing.scores import LinearScores, Scores

# The collection by which a caller fixes the option of every token, in the place of a router.
GIVEN = "given_options"
OptionScores = Float[Array, "B T C"]


@flax.struct.dataclass
class OptionChoice:
    """What a router decides; option 0 is the unit itself, and padding gets none.

    Attributes:
        weights: float32 factor of each option's result.
        probabilities: float32 chance of each option, with sum 1.
        aux: losses of the router's own parameters.
    """

    weights: OptionScores
    probabilities: OptionScores
    aux: dict[str, Weighted] = flax.struct.field(default_factory=dict)

    @classmethod
    def of(
        cls, option: Int[Array, "B T"], *, options: int, valid: Bool[Array, "B T"]
    ) -> OptionChoice:
        """The one that stands fixed for each token, of so many."""
        exact = jax.nn.one_hot(option, options, dtype=jnp.float32)
        return cls(weights=jnp.where(valid[..., None], exact, 0.0), probabilities=exact)


class OptionRouter(nn.Module, abc.ABC):
    """The option family.

    Outside training a token's choice is one option, and depends on that token alone.
    """

    @abc.abstractmethod
    def __call__(
        self,
        x: Hidden,
        *,
        forecast: Hidden | None,
        options: int,
        valid: Bool[Array, "B T"],
        train: bool,
    ) -> OptionChoice:
        """Chooses for every token.

        Args:
            x: what the unit reads, 0 where there is padding.
            forecast: what the first stand-in makes of it, or None where that is nothing.
            options: how many there are to choose among.
            valid: tokens that are not padding.
            train: whether options may be mixed, or drawn by their scores (stream ``routes``).

        Raises:
            UserError: the router is made for other options.
        """

    @nn.nowrap
    def sees_forecast(self) -> bool:
        """Whether the first stand-in runs on every token for the router to see."""
        return False

    @nn.nowrap
    def flops(self, dim: int, options: int) -> int:
        """Floating-point operations of a token."""
        return 0


class FixedOption(OptionRouter):
    """The same option for every token: the whole model, or the cheapest one.

    Reference: the all-big and all-small models of Alizadeh et al., "Duo-LLM: A Framework for
    Studying Adaptive Computation in Large Language Models", 2024, arXiv:2410.10846.

    Attributes:
        option: which, 0 for the unit itself.
    """

    option: int = 0

    def __call__(
        self,
        x: Hidden,
        *,
        forecast: Hidden | None,
        options: int,
        valid: Bool[Array, "B T"],
        train: bool,
    ) -> OptionChoice:
        """One of the options."""
        if not 0 <= self.option < options:
            raise UserError(f"router.option is {self.option}; use 0 to {options - 1}")
        return OptionChoice.of(jnp.full(valid.shape, self.option), options=options, valid=valid)


class RandomOption(OptionRouter):
    """Any option, by chance, for each token or each row of each layer by itself.

    Draws come from the stream ``routes``. Where the caller gives none, as in decoding, they are a
    hash of the bits of the token's stream and the layer's name, so that the same input gives the
    same route: in the first layer a token then has the same option wherever it stands, and passes
    that round otherwise choose otherwise.

    Reference: the first stage of Alizadeh et al., "Duo-LLM: A Framework for Studying Adaptive
    Computation in Large Language Models", 2024, arXiv:2410.10846.

    Differences from the paper: more options than two, and any chances.

    Attributes:
        chances: of each option, with sum 1.
        granularity: what shares a draw; for whole rows the stream ``routes`` is needed.
    """

    chances: tuple[float, ...] = (0.5, 0.5)
    granularity: Literal["token", "row"] = "token"

    def __post_init__(self) -> None:
        if min(self.chances) < 0 or not math.isclose(sum(self.chances), 1.0, abs_tol=1e-6):
            raise UserError(f"chances {self.chances} must not be negative, and have sum 1")
        super().__post_init__()

    def __call__(
        self,
        x: Hidden,
        *,
        forecast: Hidden | None,
        options: int,
        valid: Bool[Array, "B T"],
        train: bool,
    ) -> OptionChoice:
        """Independent draws.

        Raises:
            UserError: a row is to share a draw where there is no stream to draw it from.
        """
        if len(self.chances) != options:
            raise UserError(f"router.chances has {len(self.chances)} for {options} options")
        if train or self.has_rng("routes"):
            shape = valid.shape if self.granularity == "token" else (valid.shape[0], 1)
            drawn = jax.random.uniform(self.make_rng("routes"), shape)
        elif self.granularity == "row" and not self.is_initializing():
            raise UserError(
                "rows can share a draw of the stream 'routes' only; give the context a key, or use "
                "granularity='token', FixedOption, or given options"
            )
        else:
            drawn = draws(x, salt=zlib.crc32("/".join(self.path).encode()))
        edges = jnp.cumsum(jnp.asarray(self.chances, jnp.float32))[:-1]
        option = jnp.sum(drawn[..., None] >= edges[None, None], axis=-1)
        choice = OptionChoice.of(
            jnp.broadcast_to(option, valid.shape), options=options, valid=valid
        )
        shares = jnp.broadcast_to(jnp.asarray(self.chances, jnp.float32), choice.weights.shape)
        return dataclasses.replace(choice, probabilities=shares)


class LearnedOption(OptionRouter):
    """The option of highest score; in training a mixture by ``softmax(u / T)``, or a draw from it.

    ``soft`` mixes the results of all options by their chances. ``drawn`` takes one, the largest of
    ``(u + Gumbel noise) / T``, and passes the gradient of their softmax. Neither noise nor mixture
    outside training.

    With ``coolest`` the temperature is a parameter that its own loss takes down:
    ``AuxiliaryTerm(name="temperature")`` and ``Group(parameters=("*/routing/temperature",),
    optimizer=SGD(learning_rate=Constant(peak=4e-4)))`` are ``T -= 4e-4`` after every step until it
    is ``coolest``.

    Reference: the third stage of Alizadeh et al., "Duo-LLM: A Framework for Studying Adaptive
    Computation in Large Language Models", 2024, arXiv:2410.10846 (``soft``, linear); Han, Liang,
    Xuan, Wu, Zhang, Shen, "Informed Routing in LLMs: Smarter Token-Level Computation for Faster
    Inference", 2025, arXiv:2510.13831 (``drawn``, with the forecast).

    Differences from the paper: the temperature is a parameter, not a function of the step.

    Attributes:
        head: gives the scores ``u``.
        mixing: how options are mixed in training.
        temperature: T, or what it starts from.
        coolest: where T ends; None keeps it.
        with_forecast: whether scores are of what the unit reads beside what the first stand-in
            makes of it.
    """

    head: Scores = LinearScores()
    mixing: Literal["soft", "drawn"] = "soft"
    temperature: float = 1.0
    coolest: float | None = None
    with_forecast: bool = False

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        *,
        forecast: Hidden | None,
        options: int,
        valid: Bool[Array, "B T"],
        train: bool,
    ) -> OptionChoice:
        """Each token by its own scores; equal ones go to the earlier option."""
        if self.with_forecast:
            if forecast is None:
                raise UserError(
                    "with_forecast=True needs a stand-in that is not None to come first"
                )
            x = jnp.concatenate([x, forecast], axis=-1)
        scores = self.head.copy(parent=self, name="scores")(x, choices=options)
        warmth, aux = self._warmth()
        chances = nn.softmax(scores / warmth)
        if not train:
            choice = OptionChoice.of(jnp.argmax(scores, axis=-1), options=options, valid=valid)
            return dataclasses.replace(choice, probabilities=chances, aux=aux)
        if self.mixing == "soft":
            weights = chances
        else:
            noise = jax.random.gumbel(self.make_rng("routes"), scores.shape)
            weights = straight_through((scores + noise) / warmth)
        weights = jnp.where(valid[..., None], weights, 0.0)
        return OptionChoice(weights=weights, probabilities=chances, aux=aux)

    def _warmth(self) -> tuple[Scalar | float, dict[str, Weighted]]:
        if self.coolest is None:
            return self.temperature, {}
        start = nn.initializers.constant(self.temperature)
        warmth = parameter(self, "temperature", start, (1,), ("norm",))[0]
        one = jnp.float32(1)
        left = Weighted(total=jnp.maximum(warmth - self.coolest, 0.0), weight=one)
        held = jnp.maximum(jax.lax.stop_gradient(warmth), self.coolest)
        return held, {"temperature": left}

    @nn.nowrap
    def sees_forecast(self) -> bool:
        """Where scores are of the forecast."""
        return self.with_forecast

    @nn.nowrap
    def flops(self, dim: int, options: int) -> int:
        """Those of the scores."""
        return self.head.flops(2 * dim if self.with_forecast else dim, options)


def straight_through(logits: OptionScores) -> OptionScores:
    """One at the largest, exactly 0 elsewhere, with the gradient of the softmax.

    Reference: Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", 2016,
    arXiv:1611.01144.

    Args:
        logits: float32; with Gumbel noise, what is taken is a draw.
    """
    soft = nn.softmax(logits)
    hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=soft.dtype)
    return hard + (soft - jax.lax.stop_gradient(soft))

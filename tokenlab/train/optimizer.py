"""Optimisers and schedules as parts; optax does the work."""

from __future__ import annotations

import abc
import dataclasses
import fnmatch
import functools
from collections.abc import Hashable

import jax
import optax
import optax.contrib
from jaxtyping import PyTree

from tokenlab.core.duration import Clock, Duration, Fraction
from tokenlab.core.errors import UserError
from tokenlab.train.forgetting import Forgetting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """The schedule family: a number as a function of the step.

    Attributes:
        peak: highest value.
    """

    peak: float

    @abc.abstractmethod
    def build(self, clock: Clock) -> optax.Schedule:
        """The schedule in steps of this run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Linear warm-up, then the peak.

    Attributes:
        warmup: length of the rise from 0.
    """

    warmup: Duration = 0

    def build(self, clock: Clock) -> optax.Schedule:
        """The schedule in steps of this run."""
        return _rise(self.peak, clock.steps(self.warmup))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to ``floor * peak`` at the last step.

    Attributes:
        warmup: length of the rise from 0.
        floor: final value as a share of the peak.
    """

    warmup: Duration = Fraction(of_run=0.02)
    floor: float = 0.1

    def build(self, clock: Clock) -> optax.Schedule:
        """The schedule in steps of this run."""
        total, warmup = clock.steps(Fraction(of_run=1.0)), clock.steps(self.warmup)
        return optax.warmup_cosine_decay_schedule(
            0.0, self.peak, warmup, max(total, warmup + 1), self.floor * self.peak
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Linear warm-up, a plateau at the peak, and a linear decay at the end.

    Reference: Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with
    Scalable Training Strategies", 2024, arXiv:2404.06395, section 4.

    Attributes:
        warmup: length of the rise from 0.
        decay: length of the final decay.
        floor: final value as a share of the peak.
    """

    warmup: Duration = Fraction(of_run=0.02)
    decay: Duration = Fraction(of_run=0.2)
    floor: float = 0.0

    def build(self, clock: Clock) -> optax.Schedule:
        """The schedule in steps of this run."""
        total = clock.steps(Fraction(of_run=1.0))
        warmup, decay = clock.steps(self.warmup), clock.steps(self.decay)
        stable_end = max(warmup, total - decay)
        return optax.join_schedules(
            [
                _rise(self.peak, warmup),
                optax.linear_schedule(self.peak, self.floor * self.peak, max(1, decay)),
            ],
            [stable_end],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerDecay(Schedule):
    """``peak / n^exponent`` at step n, counted from 1: the step sizes of online optimisation.

    With exponent 1 the regret on strongly convex losses grows with the logarithm of n, with
    exponent 1/2 the regret on convex ones with its root.

    Reference: Hazan, Agarwal, Kale, "Logarithmic Regret Algorithms for Online Convex Optimization",
    Machine Learning 69, 2007; Zinkevich, "Online Convex Programming and Generalized Infinitesimal
    Gradient Ascent", ICML 2003.

    Attributes:
        exponent: of the step.
    """

    exponent: float = 1.0

    def build(self, clock: Clock) -> optax.Schedule:
        """The schedule in steps of this run."""
        return lambda step: self.peak / (step + 1.0) ** self.exponent


def _rise(peak: float, warmup: int) -> optax.Schedule:
    # Optax takes a ramp of no steps to stay at its first value for ever.
    return optax.warmup_constant_schedule(0.0 if warmup else peak, peak, warmup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters with an optimiser of their own, such as the biases that balance experts.

    Attributes:
        parameters: patterns (``*`` is any text) of their paths.
        optimizer: what moves them, by its own learning rate.
    """

    parameters: tuple[str, ...]
    optimizer: Optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
    """The optimiser family.

    Attributes:
        learning_rate: its schedule.
        trained: patterns (``*`` is any text) of the paths of parameters that move, such as
            ``*/feedforward/*``; the rest stays as it is.
        groups: parameters with optimisers of their own, which ``trained`` need not name; the first
            group that names a parameter has it.
        clip_norm: bound on the gradient's global norm, or None.
        forgetting: trained parameters that are drawn anew now and then, or None.
    """

    learning_rate: Schedule
    trained: tuple[str, ...] = ("*",)
    groups: tuple[Group, ...] = ()
    clip_norm: float | None = None
    forgetting: Forgetting | None = None

    def build(self, clock: Clock) -> optax.GradientTransformation:
        """The optax transformation in steps of this run; it keeps nothing of what it freezes.

        Raises:
            UserError: on its first use, a pattern names no parameter.
        """
        moving = self._moving(clock)
        if self.trained == ("*",) and not self.groups:
            return moving
        parts: dict[Hashable, optax.GradientTransformation] = {
            f"group_{i}": group.optimizer._moving(clock) for i, group in enumerate(self.groups)
        }
        parts |= {"trained": moving, "frozen": optax.set_to_zero()}
        return optax.partition(parts, functools.partial(_labels, self._patterns()))

    def _patterns(self) -> dict[str, tuple[str, ...]]:
        groups = {f"group_{i}": group.parameters for i, group in enumerate(self.groups)}
        return groups | {"trained": self.trained}

    def moves(self, params: PyTree) -> PyTree:
        """Whether each parameter is moved: trained, or in a group.

        Raises:
            UserError: a pattern names no parameter.
        """
        return jax.tree.map(lambda label: label != "frozen", _labels(self._patterns(), params))

    def _moving(self, clock: Clock) -> optax.GradientTransformation:
        """What moves the trained parameters, forgetting included."""
        schedule = self.learning_rate.build(clock)
        if self.forgetting is None:
            return self.moving(schedule)
        # One count of steps serves all leaves of a state, so what is forgotten has its own state;
        # the norm that clips is still that of all.
        unclipped = dataclasses.replace(self, clip_norm=None).moving(schedule)
        labels = functools.partial(
            _labels, {"forgotten": self.forgetting.parameters, "kept": ("*",)}
        )
        parts = optax.partition({"forgotten": unclipped, "kept": unclipped}, labels)
        return self.forgetting.around(
            optax.chain(_clip(self.clip_norm), parts), labels=labels, clock=clock
        )

    @abc.abstractmethod
    def moving(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """The transformation of the parameters that are trained, clipping included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay on matrices and clipping by global norm.

    Reference: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017,
    arXiv:1711.05101.

    Attributes:
        b1: decay of the first moment.
        b2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decay per unit of learning rate; norms and biases are spared.
        clip_norm: bound on the gradient's global norm, or None.
    """

    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def moving(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """The transformation of the parameters that are trained."""
        adam = optax.adamw(
            schedule,
            b1=self.b1,
            b2=self.b2,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask=decayed,
        )
        return optax.chain(_clip(self.clip_norm), adam)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Steps against the gradient, or against its sign: ``p -= rate * g``.

    Reference: Robbins and Monro, "A Stochastic Approximation Method", 1951; with signs, Bernstein,
    Wang, Azizzadenesheli, Anandkumar, "signSGD: Compressed Optimisation for Non-Convex Problems",
    2018, arXiv:1802.04434.

    Attributes:
        sign: whether only the sign of each entry counts.
    """

    sign: bool = False

    def moving(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """The transformation of the parameters that are trained."""
        sized = optax.scale_by_sign() if self.sign else optax.identity()
        return optax.chain(_clip(self.clip_norm), sized, optax.scale_by_learning_rate(schedule))


def cooling(*, hottest: float, coolest: float, steps: int) -> Group:
    """What takes the temperature of ``LearnedOption(temperature=hottest, coolest=...)`` down.

    It falls evenly over the first four fifths of the run. The objective needs
    ``AuxiliaryTerm(name="temperature")``.

    Args:
        hottest: what it starts from.
        coolest: what it ends at.
        steps: of the run.
    """
    fall = SGD(learning_rate=Constant(peak=(hottest - coolest) / (0.8 * steps)))
    return Group(parameters=("*/routing/temperature",), optimizer=fall)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Momentum made orthogonal by Newton-Schulz on hidden matrices, AdamW on the rest.

    Updates are scaled by ``0.2 * sqrt(max(fan_in, fan_out))``, which gives them the size of
    AdamW's, so that one schedule serves both.

    Reference: Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv:2502.16982 (after
    Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024).

    Differences from the paper: none known; the embedding and the head are left to AdamW, as there.

    Attributes:
        momentum: decay of the momentum, Nesterov's.
        b1: decay of AdamW's first moment.
        b2: decay of AdamW's second moment.
        weight_decay: decay per unit of learning rate; norms and biases are spared.
        clip_norm: bound on the gradient's global norm, or None.
    """

    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def moving(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """The transformation of the parameters that are trained."""
        # Optax's own split gives the rest Nesterov momentum and decays norms there.
        muon = optax.contrib.muon(
            learning_rate=-1.0,  # keeps the sign, for the rate at the end of the chain
            beta=self.momentum,
            muon_weight_dimension_numbers=_last_two_axes,
            consistent_rms=0.2,
        )
        adam = optax.scale_by_adam(self.b1, self.b2)
        return optax.chain(
            _clip(self.clip_norm),
            optax.partition({"muon": muon, "adam": adam}, _muon_or_adam),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(schedule),
        )


def _labels(patterns: dict[str, tuple[str, ...]], params: PyTree) -> PyTree:
    """The first label whose patterns name a parameter, else ``"frozen"``."""
    unused = {pattern for of_label in patterns.values() for pattern in of_label}

    def label(path: tuple, _: jax.Array) -> str:
        name, first = "/".join(_names(path)), "frozen"
        for label, of_label in reversed(patterns.items()):
            hits = {pattern for pattern in of_label if fnmatch.fnmatchcase(name, pattern)}
            unused.difference_update(hits)
            first = label if hits else first
        return first

    labels = jax.tree_util.tree_map_with_path(label, params)
    if unused:
        raise UserError(f"the optimizer names no parameter by {', '.join(sorted(unused))}")
    return labels


def _clip(norm: float | None) -> optax.GradientTransformation:
    return optax.identity() if norm is None else optax.clip_by_global_norm(norm)


def _muon_or_adam(params: PyTree) -> PyTree:
    """``"muon"`` for hidden matrices, stacked layers included, ``"adam"`` elsewhere."""

    def label(path: tuple, leaf: jax.Array) -> str:
        hidden = any(name.startswith("block") for name in _names(path))
        return "muon" if hidden and leaf.ndim >= 2 and _is_decayed(path) else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _last_two_axes(params: PyTree) -> PyTree:
    dimensions = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda leaf: dimensions(leaf.ndim - 2, leaf.ndim - 1), params)


def decayed(params: PyTree) -> PyTree:
    """Which parameters weight decay acts on: all but scales, biases, rates, temperatures, codes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_decayed(path), params)


def _is_decayed(path: tuple) -> bool:
    spared = {"scale", "bias", "hidden_bias", "threshold", "codes", "log_rate", "temperature"}
    return not spared & set(_names(path))


def _names(path: tuple) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")

"""Units of a layer that have cheaper stand-ins, one of which may run on a token in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab.cache import Heads, LayerCache, Picked, SharedKeys
from tokenlab.core.arrays import Array, Bool, Float, Hidden, Positions, Prompt, Scalar, Segments
from tokenlab.core.errors import UserError
from tokenlab.core.reports import report
from tokenlab.core.weighted import Weighted
from tokenlab.models.attention import Attention, Memory, Mixer
from tokenlab.models.layers import FeedForward, Linear
from tokenlab.routing import GIVEN, FixedOption, OptionChoice, OptionRouter, Route

StandIns = tuple[FeedForward | None, ...]
Made = Sequence[Hidden | None]


class Forecaster(FeedForward):
    """A linear map of low rank, ``(x W_1) W_2``: what a unit is likely to add to a token.

    Reference: the lightweight feature forecaster of Han, Liang, Xuan, Wu, Zhang, Shen, "Informed
    Routing in LLMs: Smarter Token-Level Computation for Faster Inference", 2025, arXiv:2510.13831.

    Attributes:
        rank: width between the two maps.
    """

    rank: int = 64

    @nn.compact
    def __call__(
        self, x: Hidden, *, valid: Bool[Array, "B T"] | None = None, train: bool = False
    ) -> Hidden:
        """Applies it to every token."""
        narrow = Linear(self.rank, axes=("embed", "norm"), name="narrow")(x)
        return Linear(x.shape[-1], axes=("norm", "embed"), name="wide")(narrow)

    def flops(self, dim: int) -> int:
        """Two products."""
        return 2 * 2 * dim * self.rank


class RoutedFeedForward(FeedForward):
    """A feed-forward layer, or a cheaper one in its place, by token: ``Σ_i w_i F_i(x)``.

    Option 0 is the unit, option i the i-th stand-in, None being nothing at all. Where the caller
    gives the collection ``routing.GIVEN``, it and not the router says which (``given_options``).

    Reported: the losses of the router; ``aux["executed"]``, the share of tokens that the unit runs
    on, for ``BudgetPenalty``; figures ``option`` and ``option_entropy`` of each token; and the
    operations of what was chosen. Where no token is gathered, also of the first stand-in, over the
    tokens that the unit runs on and without a gradient to the unit: ``aux["forecast_error"]``, the
    mean of ``|F_1(x) - F_0(x)|²``; ``forecast_unexplained``, its share of ``|F_0(x)|²``;
    ``forecast_distance``, of the absolute differences; ``forecast_cosine``.

    With a ``capacity``, passes outside training gather the tokens of the unit into as many slots,
    and run all tokens where a row has more: nothing is dropped. What the unit itself reports is
    then lost, so a unit that reports, such as ``MixtureOfExperts``, should have none.

    Reference: Alizadeh et al., "Duo-LLM: A Framework for Studying Adaptive Computation in Large
    Language Models", 2024, arXiv:2410.10846; Han, Liang, Xuan, Wu, Zhang, Shen, "Informed Routing
    in LLMs: Smarter Token-Level Computation for Faster Inference", 2025, arXiv:2510.13831.

    Differences from the paper: stand-ins run on all tokens, whatever was chosen; the ledger counts
    what was chosen.

    Attributes:
        unit: the layer.
        stand_ins: cheaper ones; None adds nothing.
        router: chooses.
        capacity: share of a row's tokens that there are slots for outside training; None runs all.
    """

    unit: FeedForward
    stand_ins: StandIns = (None,)
    router: OptionRouter = FixedOption()
    capacity: float | None = None

    def __post_init__(self) -> None:
        _check(self.stand_ins, self.capacity)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Hidden, *, valid: Bool[Array, "B T"] | None = None, train: bool = False
    ) -> Hidden:
        """The chosen options of every token; 0 for padding."""
        valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
        x = jnp.where(valid[..., None], x, 0)
        made = _made(self, x, valid, train)
        choice = _chosen(self, x, made, valid, train)
        runs = choice.weights[..., 0] > 0
        slots = _slots(self.capacity, x.shape[1])
        if train or self.is_initializing() or slots == x.shape[1]:
            result = self.unit(x, valid=valid if train else runs, train=train)
            errors = _errors(made[0], result, valid if train else runs)
        else:
            result, errors = self._gathered(x, runs, slots), {}
        dim = x.shape[-1]
        _report(self, choice, valid, dim=dim, unit_flops=self.unit.flops(dim), errors=errors)
        return _mixed(choice.weights, [result, *made], x)

    def _gathered(self, x: Hidden, runs: Bool[Array, "B T"], slots: int) -> Hidden:
        """The unit on the tokens of ``runs``, 0 elsewhere; on all if some row has more."""

        def few(unit: FeedForward, x: Hidden) -> Hidden:
            gates = jnp.ones(runs.shape, jnp.float32)
            route = Route.of(runs, gates, capacity=slots, aux={})
            update = unit(route.gather(x), valid=route.valid())
            return route.scatter_add(jnp.zeros_like(x), update)

        def all_of_them(unit: FeedForward, x: Hidden) -> Hidden:
            return unit(x, valid=runs)

        fits = jnp.all(jnp.sum(runs, axis=1) <= slots)
        return nn.cond(fits, few, all_of_them, self.unit, x)

    @nn.nowrap
    def flops(self, dim: int) -> int:
        """Of the router and what it sees; those of the options depend on the token."""
        return _routing_flops(self.router, self.stand_ins, dim)


class RoutedMixer(Mixer):
    """Attention, or a cheaper stand-in for what a token gets of it.

    A token that the unit does not run on has no query, scores or output projection, but keys and
    values for others as ever. Options, reports and ``capacity`` are those of
    :class:`RoutedFeedForward`; the figure ``asked`` says which tokens asked.

    Reference: Han, Liang, Xuan, Wu, Zhang, Shen, "Informed Routing in LLMs: Smarter Token-Level
    Computation for Faster Inference", 2025, arXiv:2510.13831.

    Differences from the paper: keys and values are never left out.

    Attributes:
        unit: the attention.
        stand_ins: cheaper ones; None adds nothing.
        router: chooses.
        capacity: share of a row's tokens that there are slots for outside training; None runs all.
    """

    unit: Attention
    stand_ins: StandIns = (None,)
    router: OptionRouter = FixedOption()
    capacity: float | None = None

    def __post_init__(self) -> None:
        _check(self.stand_ins, self.capacity)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        *,
        positions: Positions,
        segments: Segments,
        cache: Memory | None = None,
        prompt: Prompt | None = None,
        train: bool = False,
    ) -> tuple[Hidden, Memory | None]:
        """The chosen options of every token; 0 for padding.

        Args:
            x: normalised residual stream.
            positions: position of each token in its document.
            segments: 0 for padding.
            cache: this layer's cache.
            prompt: not read.
            train: whether options may be mixed or drawn.

        Raises:
            UserError: it stands in a loop that shares keys.
        """
        if isinstance(cache, SharedKeys):
            raise UserError("RoutedMixer asks for keys of its own; use keys='recursion_wise'")
        valid = segments > 0
        x = jnp.where(valid[..., None], x, 0)
        made = _made(self, x, valid, train)
        choice = _chosen(self, x, made, valid, train)
        runs, errors = choice.weights[..., 0] > 0, {}
        whole = train or self.capacity is None or self.is_initializing()
        if cache is None and whole:
            result, _ = self.unit(x, positions=positions, segments=segments)
            errors = _errors(made[0], result, valid)
        else:
            result, cache = self._asked(x, runs, cache, positions=positions, segments=segments)
        dim = x.shape[-1]
        asking = self.unit.flops(dim, projects=False)
        _report(self, choice, valid, dim=dim, unit_flops=asking, errors=errors, asked=runs)
        return _mixed(choice.weights, [result, *made], x), cache

    def _asked(
        self,
        x: Hidden,
        runs: Bool[Array, "B T"],
        cache: LayerCache | None,
        *,
        positions: Positions,
        segments: Segments,
    ) -> tuple[Hidden, LayerCache | None]:
        """Attention of the tokens of ``runs`` alone, 0 elsewhere, over keys of all."""

        def in_slots(count: int, unit: Attention, x: Hidden, cache: Any) -> tuple[Hidden, Any]:
            gates = jnp.ones(runs.shape, jnp.float32)
            picked = Picked(Route.of(runs, gates, capacity=count, aux={}).index, runs)
            keys = SharedKeys(cache=cache, asks=picked)
            out, after = unit(x, positions=positions, segments=segments, cache=keys)
            assert isinstance(after, SharedKeys)
            kept = None if cache is None else after.finished()
            return picked.spread(out, jnp.zeros_like(x)), kept

        def few(unit: Attention, x: Hidden, cache: Any) -> tuple[Hidden, Any]:
            return in_slots(slots, unit, x, cache)

        def all_of_them(unit: Attention, x: Hidden, cache: Any) -> tuple[Hidden, Any]:
            return in_slots(x.shape[1], unit, x, cache)

        slots = _slots(self.capacity, x.shape[1])
        if slots == x.shape[1]:
            return all_of_them(self.unit, x, cache)
        fits = jnp.all(jnp.sum(runs, axis=1) <= slots)
        return nn.cond(fits, few, all_of_them, self.unit, x, cache)

    def heads(self, dim: int) -> Heads:
        """Those of the unit."""
        return self.unit.heads(dim)

    def flops(self, dim: int, *, projects: bool = True) -> int:
        """Keys and values, the router and what it sees; the rest depends on the token."""
        keys = self.unit.flops(dim) - self.unit.flops(dim, projects=False) if projects else 0
        return keys + _routing_flops(self.router, self.stand_ins, dim)

    def flops_per_pair(self, dim: int) -> int:
        """As the unit."""
        return self.unit.flops_per_pair(dim)

    def pairs(
        self,
        *,
        active: Bool[Array, "R B T"],
        read: Bool[Array, "R B T"],
        positions: Positions,
        segments: Segments,
    ) -> Scalar:
        """As the unit."""
        where = {"positions": positions, "segments": segments}
        return self.unit.pairs(active=active, read=read, **where)


def _check(stand_ins: StandIns, capacity: float | None) -> None:
    if not stand_ins:
        raise UserError("stand_ins is empty; give a cheaper layer, or None for nothing")
    if capacity is not None and not 0 < capacity <= 1:
        raise UserError(f"capacity {capacity} must be above 0 and at most 1, or None")


def _slots(capacity: float | None, length: int) -> int:
    return length if capacity is None else max(1, math.ceil(capacity * length))


def _made(layer: Any, x: Hidden, valid: Bool[Array, "B T"], train: bool) -> list[Hidden | None]:
    """What each stand-in makes of every token."""

    # Copies, for Linen has one set of parameters for a module that stands in two places.
    def run(i: int, part: FeedForward) -> Hidden:
        own = part.copy(parent=layer, name=f"stand_in_{i}")
        return own(x, valid=valid, train=train)

    return [None if part is None else run(i, part) for i, part in enumerate(layer.stand_ins)]


def _chosen(
    layer: Any, x: Hidden, made: Made, valid: Bool[Array, "B T"], train: bool
) -> OptionChoice:
    options = 1 + len(made)
    if layer.has_variable(GIVEN, "option"):
        option = jnp.broadcast_to(layer.get_variable(GIVEN, "option"), valid.shape)
        return OptionChoice.of(option, options=options, valid=valid)
    router = layer.router.copy(parent=layer, name="routing")
    return router(x, forecast=made[0], options=options, valid=valid, train=train)


def _mixed(weights: Float[Array, "B T C"], results: Made, x: Hidden) -> Hidden:
    total = jnp.zeros(x.shape, jnp.float32)
    for i, result in enumerate(results):
        if result is not None:
            total += weights[..., i, None] * result.astype(jnp.float32)
    return total.astype(x.dtype)


def _errors(made: Hidden | None, result: Hidden, tokens: Bool[Array, "B T"]) -> dict[str, Weighted]:
    """How far the first stand-in is from the unit, in several measures."""
    if made is None:
        return {}
    ours = made.astype(jnp.float32)
    wanted = jax.lax.stop_gradient(result).astype(jnp.float32)
    counted = tokens.astype(jnp.float32)
    square, size = jnp.sum((ours - wanted) ** 2, axis=-1), jnp.sum(wanted**2, axis=-1)
    lengths = jnp.sqrt(jnp.maximum(jnp.sum(ours**2, axis=-1) * size, jnp.finfo(size.dtype).tiny))
    error = Weighted.of(square, counted)
    return {
        "forecast_error": error,
        "forecast_unexplained": Weighted(
            total=jax.lax.stop_gradient(error.total), weight=Weighted.of(size, counted).total
        ),
        "forecast_distance": Weighted.of(jnp.mean(jnp.abs(ours - wanted), axis=-1), counted),
        "forecast_cosine": Weighted.of(jnp.sum(ours * wanted, axis=-1) / lengths, counted),
    }


def _report(
    layer: Any,
    choice: OptionChoice,
    valid: Bool[Array, "B T"],
    *,
    dim: int,
    unit_flops: int,
    errors: Mapping[str, Weighted],
    asked: Bool[Array, "B T"] | None = None,
) -> None:
    weights, p = choice.weights, choice.probabilities
    executed = Weighted.of(weights[..., 0], valid.astype(jnp.float32))
    aux = {"executed": executed, **choice.aux, **errors}
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)), axis=-1)
    figures = {
        "option": jnp.argmax(weights, axis=-1).astype(jnp.float32),
        "option_entropy": jnp.where(valid, entropy, 0.0),
    }
    if asked is not None:
        figures["asked"] = asked.astype(jnp.float32)
    costs = [unit_flops, *(0 if part is None else part.flops(dim) for part in layer.stand_ins)]
    if layer.router.sees_forecast():
        costs[1] = 0  # It runs on every token, which ``flops`` counts.
    ran = jnp.sum(weights > 0, axis=(0, 1), dtype=jnp.float32)
    report(layer, aux=aux, figures=figures, flops=jnp.sum(ran * jnp.asarray(costs, jnp.float32)))


def _routing_flops(router: OptionRouter, stand_ins: StandIns, dim: int) -> int:
    first = stand_ins[0]
    seen = first.flops(dim) if router.sees_forecast() and first is not None else 0
    return router.flops(dim, 1 + len(stand_ins)) + seen

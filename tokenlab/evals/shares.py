"""Models that run some of their units on some of their tokens, compared at equal shares."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float, Scalar
from tokenlab.core.context import Context, View
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import name_of
from tokenlab.models import Transformer
from tokenlab.objectives.budget import mean_share

_HIGHEST = 20.0  # of what is added to scores


@flax.struct.dataclass
class RoutedPass:
    """What a pass over some rows gave and cost.

    Attributes:
        nats: mean loss.
        flops: operations, as the ledger counts them.
        units_run: share of units that run, over units and tokens; None where all do.
        means: of what layers report, ``"executed"`` and errors of forecasts among it, one of each
            unit.
    """

    nats: Scalar
    flops: Scalar | float
    units_run: Scalar | None
    means: dict[str, Float[Array, " U"]]


@functools.partial(jax.jit, static_argnums=0)
def routed_pass(model: Transformer, params: PyTree, batch: Mapping[str, Array]) -> RoutedPass:
    """A pass outside training, with draws of the same key every time.

    Args:
        model: with stand-ins, or without.
        params: its parameters.
        batch: ``tokens``, ``targets``, ``positions``, ``segments``.
    """
    views = {"policy": View(model=model, params=params)}
    context = Context(batch=batch, views=views, key=jax.random.key(0))
    trace = context.output().trace
    ledger = model.ledger(trace, positions=batch["positions"], segments=batch["segments"])
    return RoutedPass(
        nats=-jnp.mean(context.token_logp()),
        flops=ledger.flops,
        units_run=mean_share(trace.aux["executed"]) if "executed" in trace.aux else None,
        means={name: each.total / each.weight for name, each in trace.aux.items()},
    )


def at_share(
    model: Transformer, params: PyTree, batch: Mapping[str, Any], *, share: float
) -> PyTree:
    """``params`` with one number added to all scores of running a unit: as many run as asked.

    It is found by bisection on the rows that are given, without a look at their targets; the least
    number at which no fewer run.

    Args:
        model: whose units have a ``LearnedOption`` with a bias.
        params: its parameters.
        batch: as of :func:`routed_pass`.
        share: of units, over units and tokens.

    Raises:
        UserError: the scores have no bias to add it to.
    """
    if not any(_is_bias(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)):
        raise UserError("the routers' scores have no bias to shift; use head=NarrowScores()")
    low, high = -_HIGHEST, _HIGHEST
    for _ in range(18):
        middle = (low + high) / 2
        found = routed_pass(model, _shifted(params, middle), batch).units_run
        assert found is not None, "a model with stand-ins"
        low, high = (middle, high) if float(found) < share else (low, middle)
    return _shifted(params, high)


def _shifted(params: PyTree, by: float) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.at[0].add(by) if _is_bias(path) else leaf, params
    )


def _is_bias(path: tuple) -> bool:
    return name_of(path).endswith("routing/scores/bias")

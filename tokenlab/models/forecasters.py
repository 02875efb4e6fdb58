"""Fitting what stands in for a unit to what the unit does, in closed form."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float, Int, PRNGKeyArray
from tokenlab.core.errors import UserError
from tokenlab.models.routed import Unit, given_options, units, with_base, with_stand_ins
from tokenlab.models.stand_ins import Forecaster
from tokenlab.models.transformer import Transformer

# Eigenvalues of the inputs' moments below this share of the largest are taken for 0.
_SMALLEST = 1e-10


class LowRankMap(NamedTuple):
    """A linear map ``x @ narrow @ wide``.

    Attributes:
        narrow: from the inputs.
        wide: to the outputs.
    """

    narrow: Float[np.ndarray, "D R"]
    wide: Float[np.ndarray, "R F"]


def reduced_rank(
    inputs: Float[np.ndarray, "D D"], cross: Float[np.ndarray, "D F"], *, rank: int
) -> LowRankMap:
    """The map of at most ``rank`` that predicts Y of X with the least squared error.

    With B the least-squares map and V the top eigenvectors of ``(X B)ᵀ X B`` it is ``B V Vᵀ``.

    Reference: Izenman, "Reduced-rank regression for the multivariate linear model", Journal of
    Multivariate Analysis 5, 1975.

    Args:
        inputs: ``Xᵀ X``.
        cross: ``Xᵀ Y``.
        rank: columns between the two factors.
    """
    values, vectors = np.linalg.eigh(inputs)
    there = values > _SMALLEST * max(values[-1], np.finfo(np.float64).tiny)
    inverse = np.divide(1.0, values, out=np.zeros_like(values), where=there)
    best = vectors @ (inverse[:, None] * (vectors.T @ cross))
    top = np.linalg.eigh(cross.T @ best)[1][:, ::-1][:, :rank]
    return LowRankMap(best @ top, top.T)


def fit_forecasters(
    model: Transformer,
    params: PyTree,
    rows: Int[Array, "N T"] | Int[np.ndarray, "N T"],
    *,
    batch_size: int = 4,
) -> PyTree:
    """``params`` with forecasters that are the best of their rank on the inputs of the whole model.

    It is the minimum of ``AuxiliaryTerm(name="forecast_error")`` under ``FixedOption()``, to which
    training comes close. Moments are summed in float64.

    Reference: the first stage of Han, Liang, Xuan, Wu, Zhang, Shen, "Informed Routing in LLMs:
    Smarter Token-Level Computation for Faster Inference", 2025, arXiv:2510.13831.

    Differences from the paper: in closed form and not by gradient.

    Args:
        model: whose units have a ``Forecaster`` as their first stand-in, with unrolled layers.
        params: its parameters.
        rows: token ids without padding, one document each.
        batch_size: rows of a pass.

    Raises:
        UserError: another kind of stand-in comes first, or there is none.
    """
    kinds, found = model.block.kinds(), units(model)
    if not found:
        raise UserError("the model has no stand-ins; make some with with_stand_ins(...)")
    ranks = []
    for unit in found:
        first = getattr(kinds[unit.layer % len(kinds)], unit.part).stand_ins[0]
        if not isinstance(first, Forecaster):
            raise UserError(
                f"the first stand-in of {unit.part} is no Forecaster, so none is fitted"
            )
        ranks.append(first.rank)
    sums = None
    for start in range(0, len(rows), batch_size):
        part = jnp.asarray(rows[start : start + batch_size], jnp.int32)
        new = jax.tree.map(lambda x: np.asarray(x, np.float64), _moments(model, params, part))
        sums = new if sums is None else jax.tree.map(np.add, sums, new)
    assert sums is not None
    layers = dict(params)
    for unit, rank, (inputs, cross) in zip(found, ranks, sums, strict=True):
        name, fitted = f"block_{unit.layer}", reduced_rank(inputs, cross, rank=rank)
        kernels = {
            which: {"kernel": jnp.asarray(kernel, jnp.float32)}
            for which, kernel in zip(LowRankMap._fields, fitted, strict=True)
        }
        part = layers[name][unit.part] | {"stand_in_0": kernels}
        layers[name] = layers[name] | {unit.part: part}
    return layers


def with_forecasters(
    model: Transformer,
    params: PyTree,
    rows: Int[Array, "N T"] | Int[np.ndarray, "N T"],
    *,
    rank: int,
    key: PRNGKeyArray,
) -> tuple[Transformer, PyTree]:
    """The same function, with a forecaster of every unit that is fitted and not used.

    Args:
        model: without stand-ins, with unrolled layers.
        params: its parameters, which are copied.
        rows: as of :func:`fit_forecasters`.
        rank: of the forecasters.
        key: of what is drawn and then fitted.
    """
    parts = (Forecaster(rank=rank),)
    whole = with_stand_ins(model, mixer=parts, feedforward=parts)
    return whole, fit_forecasters(whole, with_base(whole, params, key=key), rows)


@functools.partial(jax.jit, static_argnums=0)
def _moments(
    model: Transformer, params: PyTree, tokens: Int[Array, "N T"]
) -> list[tuple[Float[Array, "D D"], Float[Array, "D D"]]]:
    """``Xᵀ X`` and ``Xᵀ Y`` of every unit, where all units run on all tokens."""
    found = units(model)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    _, kept = model.apply(
        {"params": params} | given_options(model, jnp.zeros(len(found), jnp.int32)),
        tokens,
        positions=positions,
        segments=jnp.ones_like(tokens),
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: _is_shown(module.path),
    )
    return [_moment(kept["intermediates"][f"block_{unit.layer}"], unit) for unit in found]


def _is_shown(path: Sequence[str]) -> bool:
    inside = tuple(path[1:])
    parts = ("mixer", "feedforward")
    return inside in {(f"{part}_norm",) for part in parts} | {(part, "unit") for part in parts}


def _moment(layer: PyTree, unit: Unit) -> tuple[Float[Array, "D D"], Float[Array, "D D"]]:
    (x,) = layer[f"{unit.part}_norm"]["__call__"]
    (y,) = layer[unit.part]["unit"]["__call__"]
    y = y[0] if unit.part == "mixer" else y
    x, y = (each.reshape(-1, each.shape[-1]).astype(jnp.float32) for each in (x, y))
    highest = jax.lax.Precision.HIGHEST
    return (
        jnp.matmul(x.T, x, precision=highest),
        jnp.matmul(x.T, y, precision=highest),
    )

"""Looped models that begin as trained ones with a layer of each."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tokenlab.core.errors import UserError
from tokenlab.depth.recursive import Recursive

From = Literal["average", "stepwise", "lower"]


def share_layers(
    params: PyTree, *, depth: Recursive, num_layers: int, how: From = "average"
) -> PyTree:
    """Parameters of a recursive model from those of a trained one without sharing.

    The ends are taken as they are. Each shared layer is the ``average`` of the layers that it
    stands for; or the shared layers are chosen at even steps from the first of the loop to the
    last, ``stepwise``; or they are the ``lower`` ones. Where all layers of the loop are equal, all
    three give the function of the trained model.

    Args:
        params: with ``block_0``, ``block_1``, ... of ``Sequential(scan=False)``.
        depth: of the model that is begun; routers keep their own start.
        num_layers: nominal layers of both.
        how: where shared layers come from.

    Raises:
        UserError: the parameters have other layers.

    Reference: Bae et al., "Relaxed Recursive Transformers: Effective Parameter Sharing with
    Layer-wise LoRA", 2024, arXiv:2410.20672, section 2.3.
    """
    blocks = {name for name in params if name.startswith("block")}
    if blocks != {f"block_{i}" for i in range(num_layers)}:
        raise UserError(
            f"the parameters have {', '.join(sorted(blocks)) or 'no layers'}, not block_0 to "
            f"block_{num_layers - 1}; give those of Sequential(scan=False) of {num_layers} layers"
        )
    places = depth.places(num_layers)
    looped = sorted(place for each in places for place in each)
    ends = {"block_first": looped[0] - 1, "block_last": looped[-1] + 1}
    begun = {name: value for name, value in params.items() if name not in blocks}
    begun |= {name: params[f"block_{i}"] for name, i in ends.items() if 0 <= i < num_layers}
    for i, each in enumerate(_sources(places, looped, how)):
        layers = [params[f"block_{place}"] for place in each]
        begun[f"block_{i}"] = jax.tree.map(lambda *of: sum(of) / jnp.float32(len(of)), *layers)
    return begun


def _sources(
    places: tuple[tuple[int, ...], ...], looped: list[int], how: From
) -> list[tuple[int, ...]]:
    if how == "average":
        return list(places)
    count = len(places)
    if how == "lower":
        return [(place,) for place in looped[:count]]
    step = (len(looped) - 1) / max(1, count - 1)
    return [(looped[round(i * step)],) for i in range(count)]

"""What the layers of a model report beside the residual stream: losses, work, figures of tokens.

A layer calls :func:`report`; the model that holds it gathers. Nothing is recorded, and nothing
computed, where the caller does not make the collection ``REPORTS`` mutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, Float, Scalar
from tokenlab.core.weighted import Weighted

REPORTS = "reports"
_FLOPS, _PAIRS = "flops", "pairs"


@flax.struct.dataclass
class Reports:
    """The reports of all layers of one pass, in the order of the layers' names.

    Attributes:
        aux: auxiliary losses by name, one entry per layer that reports it.
        figures: figures of tokens by name, such as how many experts each ran.
        flops: operations that depend on the tokens, which ``flops`` of a layer leaves out.
        pairs: query-key pairs that depend on the tokens, which ``Mixer.pairs`` leaves out.
    """

    aux: dict[str, Weighted]
    figures: dict[str, Float[Array, "L B T"]]
    flops: Scalar
    pairs: Scalar | float


def report(
    layer: nn.Module,
    *,
    aux: Mapping[str, Weighted] | None = None,
    figures: Mapping[str, Float[Array, "B T"]] | None = None,
    flops: Scalar | None = None,
    pairs: Scalar | None = None,
) -> None:
    """Reports of one call of ``layer``; the arguments are those of :class:`Reports`."""
    for part in (aux, figures):
        for name, value in (part or {}).items():
            layer.sow(REPORTS, name, value)
    for name, count in ((_FLOPS, flops), (_PAIRS, pairs)):
        if count is not None:
            layer.sow(REPORTS, name, count)


def gathered(variables: Mapping[str, PyTree]) -> Reports:
    """The reports among a module's variables; empty where none was made."""
    found: dict[str, list[Any]] = {}
    _collect(variables.get(REPORTS, {}), found)
    flops, pairs = (
        sum((jnp.sum(one) for one in found.pop(name, [])), start=jnp.float32(0))
        for name in (_FLOPS, _PAIRS)
    )
    aux = {name: of for name, of in found.items() if isinstance(of[0], Weighted)}
    return Reports(
        aux={name: jax.tree.map(_flat, *of) for name, of in aux.items()},
        figures={name: _stacked(of) for name, of in found.items() if name not in aux},
        flops=flops,
        pairs=pairs,
    )


def _collect(tree: Mapping[str, Any], found: dict[str, list[Any]]) -> None:
    for name, entry in sorted(tree.items(), key=lambda item: (len(item[0]), item[0])):
        if isinstance(entry, tuple):  # of the calls of one layer
            found.setdefault(name, []).extend(entry)
        else:
            _collect(entry, found)


def _flat(*sums: Array) -> Float[Array, " L"]:
    """Layers that run as one loop report all their sums at once."""
    return jnp.concatenate([jnp.ravel(one) for one in sums])


def _stacked(tokens: list[Array]) -> Float[Array, "L B T"]:
    return jnp.concatenate([each.reshape(-1, *each.shape[-2:]) for each in tokens])

"""Low-rank adapters of a whole model: put in, started from its weights, and merged back."""

from __future__ import annotations

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array, PRNGKeyArray
from tokenlab.core.errors import UserError
from tokenlab.core.parameters import name_of, named, taken_over
from tokenlab.models.layers import LowRank
from tokenlab.models.transformer import Block, Transformer, layered

# What an optimiser trains of an adapted model: ``AdamW(trained=ADAPTERS)``.
ADAPTERS = ("*/adapter/*",)


def adapted(
    model: Transformer, params: PyTree, adapter: LowRank, *, key: PRNGKeyArray
) -> tuple[Transformer, PyTree]:
    """The same function, with adapters at the projections of attention and feed-forward layers.

    An optimiser with ``trained=ADAPTERS`` leaves everything else as it is.

    Args:
        model: a published model or one that was trained here.
        params: its parameters, which are copied.
        adapter: what is added, and where.
        key: of the first values.

    Returns:
        The model and its parameters; those of adapters are float32.

    Raises:
        UserError: a target names no projection of the model.

    Reference: as ``LowRank``: arXiv:2106.09685.
    """
    model = with_adapter(model, adapter)
    return model, taken_over(drawn(model, key), params)


def with_adapter(model: Transformer, adapter: LowRank | None) -> Transformer:
    """The model with ``adapter`` in all its layers, or without adapters.

    Of units that have stand-ins, the units themselves.

    Raises:
        UserError: a target names no projection of the model.
    """

    def part(layer: Any) -> Any:
        if hasattr(layer, "unit"):
            return layer.clone(unit=part(layer.unit))
        return layer.clone(adapter=adapter) if hasattr(layer, "adapter") else layer

    def block(kind: Block) -> Block:
        return kind.clone(mixer=part(kind.mixer), feedforward=part(kind.feedforward))

    blocks = tuple(map(block, model.block.kinds()))
    model = model.clone(block=layered(blocks))
    if adapter is not None:
        names = {path.split("/")[-4] for path in named(_shapes(model)) if "/adapter/a/" in path}
        for target in adapter.targets:
            if not fnmatch.filter(names, target):
                raise UserError(
                    f"LowRank.targets has {target!r}, which no projection of this model is called; "
                    "use q, k, v, out, gate, up, down or *"
                )
    return model


def merged(model: Transformer, params: PyTree) -> tuple[Transformer, PyTree]:
    """The same function in plain weights: ``kernel + alpha / rank * A B``, without adapters.

    Args:
        model: with adapters.
        params: its parameters. Those of other models that were trained with them are left out.

    Returns:
        The model without adapters, and its parameters in their dtypes.

    Raises:
        UserError: parameters of the model are missing.
    """
    given, kinds = named(params), model.block.kinds()

    def whole(path: tuple, _: jax.ShapeDtypeStruct) -> Array:
        name = name_of(path)
        if name not in given:
            raise UserError(f"parameter {name!r} of the model is missing; give whole ones")
        kernel, stem = given[name], name.removesuffix("kernel") + "adapter"
        if f"{stem}/a/kernel" not in given:
            return kernel
        layer, part = name.split("/")[:2]
        number = int(layer.removeprefix("block").removeprefix("_") or 0)
        unit = getattr(kinds[number % len(kinds)], part)
        adapter = getattr(unit, "unit", unit).adapter
        a, b = (given[f"{stem}/{side}/kernel"] for side in "ab")
        change = jnp.einsum("...dr,...rf->...df", a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel + adapter.alpha / adapter.rank * change).astype(kernel.dtype)

    plain = with_adapter(model, None)
    return plain, jax.tree_util.tree_map_with_path(whole, _shapes(plain))


def drawn(model: Transformer, key: PRNGKeyArray) -> PyTree:
    """First parameters, without the names of their axes."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = model.init(key, tokens, positions=tokens, segments=tokens + 1)
    return nn.meta.unbox(variables["params"])


def _shapes(model: Transformer) -> PyTree:
    return jax.eval_shape(lambda: drawn(model, jax.random.key(0)))

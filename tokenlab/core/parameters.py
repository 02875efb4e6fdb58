"""How modules make parameters: float32, with logical names on their axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array
from tokenlab.core.errors import UserError

dense_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def parameter(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> Array:
    """A float32 parameter of ``module`` whose axes carry logical names."""
    boxed = nn.with_logical_partitioning(init, axes)
    return cast(Array, module.param(name, boxed, shape, jnp.float32))


def name_of(path: tuple) -> str:
    """A parameter's place in the tree, such as ``block_0/mixer/q/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(params: PyTree) -> dict[str, Any]:
    """The leaves by their names."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def taken_over(params: PyTree, others: PyTree, *, within: Sequence[str] = ()) -> PyTree:
    """Copies of ``params``, and where another model has a parameter of that name, of its.

    Args:
        params: of the model that starts.
        others: of the model that it starts from.
        within: pieces of names, such as ``/unit/``, that the other model's names have not.

    Raises:
        UserError: the shapes of two parameters of one name differ.
    """
    theirs = named(others)

    def taken(path: tuple, leaf: Array) -> Array:
        name = name_of(path)
        for piece in within:
            name = name.replace(piece, "/")
        # Copies, as training gives its buffers up.
        found = jnp.copy(theirs.get(name, leaf))
        if found.shape != leaf.shape:
            raise UserError(
                f"parameter {name_of(path)!r} has shape {leaf.shape}, and {found.shape} where it "
                "is to be taken from; start from a model of the same geometry"
            )
        return found

    return jax.tree_util.tree_map_with_path(taken, params)

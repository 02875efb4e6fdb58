"""How modules make parameters: float32, with logical names on their axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array

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


def carried(params: PyTree, theirs: PyTree, *, within: Sequence[str]) -> PyTree:
    """``params`` with copies of all that a model has whose modules went into another's.

    Args:
        params: first parameters of the model that has more.
        theirs: parameters of the model that went into it.
        within: pieces of paths, such as ``/unit/``, that the other model's paths have not.
    """
    known = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(theirs)
    }

    def taken(path: tuple, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for piece in within:
            name = name.replace(piece, "/")
        # Copies, as training gives its buffers up.
        return jnp.copy(known.get(name, leaf))

    return jax.tree_util.tree_map_with_path(taken, params)

"""How modules make parameters: float32, with logical names on their axes."""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp
from flax import linen as nn

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

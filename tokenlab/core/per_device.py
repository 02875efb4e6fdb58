"""Calls that every device makes on its own part of the arrays.

The compiler splits what XLA computes, but a kernel is one device's. So operations that have
kernels are called here, with the logical axes of their arguments; the table in force, usually that
of ``tokenlab.train.mesh``, maps those onto the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec

from kernels_pallas.common.dispatch import automatic_axes
from tokenlab.core.arrays import Array

Axes = tuple[str | None, ...]


def mesh_axes(name: str, *sizes: int) -> tuple[str, ...]:
    """The mesh axes that logical axis ``name`` is split over.

    Args:
        name: a logical axis.
        sizes: of every dimension that bears the name; a mesh axis that does not divide them all,
            and those behind it, are left out.
    """
    free = automatic_axes()
    mapped = dict(nn.get_logical_axis_rules()).get(name) or ()
    common = math.gcd(*sizes)
    chosen: list[str] = []
    for axis in (mapped,) if isinstance(mapped, str) else mapped:
        parts = free.get(axis, 1)
        if common % parts:
            break
        if parts > 1:
            chosen.append(axis)
            common //= parts
    return tuple(chosen)


def per_device(
    operation: Callable[..., Any],
    *,
    axes: Mapping[str, Axes],
    out: Axes | tuple[Axes, ...],
    **arrays: Array,
) -> Any:
    """``operation(**arrays)``, each device on its part; the plain call where there is one device.

    A dimension without a logical axis, or whose sizes do not divide evenly, is whole on every
    device.

    Args:
        operation: takes the arrays by name. Along a split dimension, its result on a part must
            be that part of its result.
        axes: logical axes of each array's dimensions.
        out: logical axes of the result and of any others like it, or of each of several.
        **arrays: the arrays.
    """
    if not automatic_axes():
        return operation(**arrays)
    sizes: dict[str, list[int]] = {}
    for name, array in arrays.items():
        for axis, size in zip(axes[name], array.shape, strict=True):
            if axis is not None:
                sizes.setdefault(axis, []).append(size)
    placed = {axis: mesh_axes(axis, *found) for axis, found in sizes.items()}

    def spec(names: Axes | tuple[Axes, ...]) -> Any:
        if names and isinstance(names[0], tuple):
            return tuple(spec(cast(Axes, each)) for each in names)
        return PartitionSpec(*(placed[name] if name else None for name in cast(Axes, names)))

    return jax.shard_map(
        lambda arrays: operation(**arrays),
        in_specs=({name: spec(axes[name]) for name in arrays},),
        out_specs=spec(out),
        # Kernels do not say along which axes their results vary.
        check_vma=False,
    )(arrays)

"""What kernels for NVIDIA's Hopper share: when they can run, tiles, and a ring of copies.

A thread block has warpgroups that compute, and one more that does nothing but start copies into a
ring of slots: a slot is filled anew as soon as every computing warpgroup is done with what it held.
"""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from kernels_pallas.common import dispatch

_HOPPER = re.compile(r"\bG?H\d{2,3}\b")


def needs(interpret: Any) -> str | None:
    """Why a kernel for Hopper cannot run here, or ``None``; see ``dispatch.needs``."""
    reason = dispatch.needs("gpu", interpret)
    if reason is not None:
        return reason
    if interpret is True:
        return "it runs in Mosaic-GPU's interpreter; config.interpret takes parameters of that one"
    kind = dispatch.device_kind()
    if not interpret and _HOPPER.search(kind) is None:
        return f"it is written for the tensor cores of Hopper, this is a {kind}"
    return None


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the order that tensor cores read, rows of at most 128 bytes at a time."""
    size = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * size)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load(of: Any, layout: Any) -> Array:
    """All of a reference, from either memory, in registers."""
    # The index is an argument of this function in older versions of JAX only.
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(of, *index, layout=layout, optimized=False)


def slot_of(step: Array, slots: int) -> Array:
    """The slot that holds what a step visits."""
    return lax.rem(step, jnp.int32(slots))


def copy_each(
    steps: Array, slots: int, *copies: tuple[Any, Callable[[Array, Array], None]]
) -> None:
    """``copy(step, slot)`` for every step, once the slot's earlier contents are free.

    Ends when the last contents are free as well.

    Args:
        steps: how many there are.
        slots: likewise.
        *copies: barriers that say for each slot that it is free, and what to copy then.
    """

    def wait(barriers: Any, step: Array) -> None:
        barrier = barriers.at[slot_of(step, slots)]
        pl.when(step >= slots)(functools.partial(plgpu.barrier_wait, barrier))

    def visit(step: Array, _: None) -> None:
        for free, copy in copies:
            wait(free, step)
            copy(step, slot_of(step, slots))

    def drain(step: Array, _: None) -> None:
        for free, _copy in copies:
            wait(free, step)

    lax.fori_loop(jnp.int32(0), steps, visit, None)
    lax.fori_loop(steps, steps + slots, drain, None)

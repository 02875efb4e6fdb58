"""Compiling for an accelerator that is not there, by its real compiler.

With ``libtpu`` installed, XLA:TPU and Mosaic compile to machine code on any machine: a block that
breaks the tiling, too much VMEM or HBM are errors here as they are there.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# One small slice of each generation; tests compile for all of them.
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


class CannotCompile(RuntimeError):
    """The compiler for that device is not installed."""


@functools.cache
def tpu_devices(topology: str) -> tuple[Any, ...]:
    """The devices of an absent TPU slice.

    Args:
        topology: such as ``"v5e:2x2"``.

    Raises:
        CannotCompile: libtpu is not installed, or it does not know the topology.
    """
    # Otherwise libtpu asks a metadata server what machine it is on, and serves one process only;
    # compiling touches no chip.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise CannotCompile(
            f"cannot compile for {topology} ({reason}); pip install -r requirements-tpu.txt"
        ) from error
    return tuple(found.devices)


def compile_tpu(
    function: Callable[..., Any], *arguments: Any, topology: str = TPUS["v5e"], **options: Any
) -> jax.stages.Compiled:
    """Compiles ``function`` for one device of an absent TPU slice.

    Args:
        function: traced anew under a mesh of that device, so that operations choose as they
            would there.
        *arguments: arrays, or ``jax.ShapeDtypeStruct`` in their place, nested or not.
        topology: of the slice.
        **options: keyword arguments of the function, likewise.

    Returns:
        The compiled function, with ``memory_analysis()``, ``cost_analysis()`` and ``as_text()``.

    Raises:
        CannotCompile: there is no compiler for that TPU.
    """
    mesh = Mesh(np.asarray(tpu_devices(topology)[:1]), ("device",))
    placed = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    arguments, options = jax.tree.map(place, (arguments, options))
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments, **options).compile()

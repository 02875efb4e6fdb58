"""Compiling for an accelerator that is not there, by its real compiler.

With ``libtpu`` installed, XLA:TPU and Mosaic compile to machine code on any machine: a block that
breaks the tiling, too much VMEM or HBM are errors here as they are there. With the CUDA plug-in of
JAX and a few of NVIDIA's wheels (``requirements-gpu-aot.txt``), so do XLA:GPU, Mosaic-GPU and
ptxas.
"""

import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# One small slice of each generation; tests compile for all of them.
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


# What the GPU compiler asks a driver for where there is one, by name of the file.
GPUS = ("h100",)


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
    return _compile(tpu_devices(topology)[0], "tpu", function, arguments, options)


@functools.cache
def gpu_devices(name: str) -> tuple[Any, ...]:
    """The absent GPU, alone.

    Args:
        name: one of ``GPUS``.

    Raises:
        CannotCompile: the CUDA plug-in is not installed, or the GPU is not described here.
    """
    if name not in GPUS:
        raise CannotCompile(f"no description of {name!r}; one of {GPUS}")
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise CannotCompile(
            f"cannot compile for {name}: JAX's CUDA plug-in is not installed; make test-gpu-aot"
            " builds an environment that has it, from requirements-gpu-aot.txt"
        )
    target = pathlib.Path(__file__).with_name(f"{name}.txtpb").read_text()
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=name, target_config=target, topology="1x1x1"
        )
    except NotImplementedError as error:
        raise CannotCompile(
            f"cannot compile for {name}: JAX's CUDA plug-in did not start; with JAX_PLATFORMS=cpu"
            " it asks for no library that only a GPU needs"
        ) from error
    return tuple(found.devices)


def compile_gpu(
    function: Callable[..., Any], *arguments: Any, gpu: str = "h100", **options: Any
) -> jax.stages.Compiled:
    """Compiles ``function`` for an absent GPU.

    What its kernels need is read by :mod:`kernels_pallas.common.resources`.

    Args:
        function: as in :func:`compile_tpu`.
        *arguments: likewise.
        gpu: one of ``GPUS``.
        **options: keyword arguments of the function.

    Returns:
        The compiled function, with ``memory_analysis()`` and ``as_text()``.

    Raises:
        CannotCompile: there is no compiler for that GPU.
    """
    return _compile(gpu_devices(gpu)[0], "cuda", function, arguments, options)


def _compile(
    device: Any, platform: str, function: Callable[..., Any], arguments: Any, options: Any
) -> jax.stages.Compiled:
    mesh = Mesh(np.asarray([device]), ("device",))
    placed = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)

    arguments, options = jax.tree.map(place, (arguments, options))
    with jax.set_mesh(mesh):
        traced = jax.jit(function).trace(*arguments, **options)
        return traced.lower(lowering_platforms=(platform,)).compile()

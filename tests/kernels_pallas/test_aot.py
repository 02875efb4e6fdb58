"""Compiling for absent TPUs: the real compiler answers, and the platform is the mesh's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from kernels_pallas.common import aot, dispatch

TILED = jax.ShapeDtypeStruct((16, 256), jnp.float32)


def double(x, *, block):
    def kernel(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    spec = pl.BlockSpec(block, lambda i, j: (i, j))
    grid = (x.shape[0] // block[0], x.shape[1] // block[1])
    return pl.pallas_call(kernel, grid=grid, in_specs=[spec], out_specs=spec, out_shape=x)(x)


@pytest.mark.parametrize("topology", aot.TPUS.values(), ids=aot.TPUS)
def test_a_kernel_compiles_for_every_generation(topology):
    compiled = aot.compile_tpu(lambda x: double(x, block=(8, 128)), TILED, topology=topology)
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().argument_size_in_bytes == 16 * 256 * 4


def test_what_the_interpreter_takes_and_a_tpu_does_not_is_an_error():
    with pytest.raises(Exception, match="divisible by 8 and 128"):
        aot.compile_tpu(lambda x: double(x, block=(4, 100)), jax.ShapeDtypeStruct((8, 200), "f4"))


def test_the_platform_is_that_of_the_mesh():
    seen = []

    @jax.jit
    def look(x):
        seen.append(dispatch.platform())
        return x

    look(jnp.ones(2))
    aot.compile_tpu(look, jax.ShapeDtypeStruct((2,), jnp.float32))
    look(jnp.ones(2))
    with jax.set_mesh(jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("x",))):
        look(jnp.ones(2))
    assert seen == ["cpu", "tpu", "cpu"]


def test_an_unknown_topology_is_said():
    with pytest.raises(aot.CannotCompile, match="cannot compile for v9:1x1"):
        aot.compile_tpu(lambda x: x, TILED, topology="v9:1x1")

"""Compiling for absent TPUs: the real compiler answers, and the platform is the mesh's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from kernels_pallas.block_sparse_attention import Causal, block_sparse_attention
from kernels_pallas.common import aot, dispatch
from kernels_pallas.linear_cross_entropy import linear_cross_entropy
from kernels_pallas.token_routing import gather_tokens, scatter_add_tokens

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


def calls():
    """One call of each operation that has a kernel, by name: function, arguments."""
    vectors = jax.ShapeDtypeStruct((4, 256, 2, 64), jnp.bfloat16)
    stream = jax.ShapeDtypeStruct((4, 256, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    gate = jax.ShapeDtypeStruct((4, 256), jnp.float32)
    count = jax.ShapeDtypeStruct((4,), jnp.int32)
    weight = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)

    def attend(q, ids, impl=None):
        return block_sparse_attention(
            q=q, k=q, v=q, q_positions=ids, kv_positions=ids, q_segments=ids, kv_segments=ids,
            rule=Causal(), scale=1.0, impl=impl,
        )  # fmt: skip

    def lose(hidden, ids, weight, impl=None):
        return linear_cross_entropy(hidden=hidden, weight=weight, targets=ids, impl=impl)

    def gather(x, ids, count, impl=None):
        return gather_tokens(x=x, index=ids, count=count, impl=impl)

    def scatter(x, ids, count, gate, impl=None):
        return scatter_add_tokens(residual=x, y=x, gate=gate, index=ids, count=count, impl=impl)

    return {
        "attention": (attend, (vectors, ids)),
        "loss": (lose, (stream, ids, weight)),
        "gather": (gather, (stream, ids, count)),
        "scatter": (scatter, (stream, ids, count, gate)),
    }


@pytest.mark.parametrize("name", calls())
def test_on_several_devices_a_kernel_runs_inside_shard_map_or_says_so(name):
    """Elsewhere the compiler would have to split it, which it cannot; then ``xla`` runs."""
    function, arguments = calls()[name]
    devices = np.asarray(aot.tpu_devices(aot.TPUS["v5e"]))
    mesh = jax.sharding.Mesh(devices, ("data",))
    rows, copied = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs = tuple(copied if leaf.shape == (512, 128) else rows for leaf in arguments)
    placed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
        for x, spec in zip(arguments, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        automatic = jax.jit(function).lower(*placed)
        assert "tpu_custom_call" not in automatic.as_text()
        automatic.compile()
        with pytest.raises(ValueError, match="not manual; call it inside"):
            jax.jit(functools.partial(function, impl="tpu")).lower(*placed)
        mapped = jax.shard_map(function, in_specs=specs, out_specs=rows, check_vma=False)
        manual = jax.jit(mapped).lower(*placed)
        assert "tpu_custom_call" in manual.as_text()
        manual.compile()

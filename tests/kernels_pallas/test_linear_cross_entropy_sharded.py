"""A vocabulary split over mesh axes: the same numbers and gradients as in one piece."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from jax.sharding import PartitionSpec as P

from kernels_pallas.common import aot
from kernels_pallas.linear_cross_entropy import linear_cross_entropy, vocabulary_statistics

AXES = ("slow", "fast")


def _outputs(parameters, targets, *, axes=(), impl="xla"):
    """The float results, and the arg-max."""
    hidden, weight, bias = parameters
    out = vocabulary_statistics(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets,
        softcap=5.0,
        vocabulary_axes=axes,
        impl=impl,
    )
    return jnp.stack(out[:4]), (out.highest, out.best)


def compare_on_eight_devices():
    """Run in a process that has them."""
    keys = jax.random.split(jax.random.key(0), 5)
    parameters = (
        jax.random.normal(keys[0], (2, 12, 16)),
        jax.random.normal(keys[1], (72, 16)).at[50].set(0.0).at[7].set(0.0),
        jax.random.normal(keys[2], (72,)).at[50].set(30.0).at[7].set(30.0),  # equal and highest
    )
    targets = jax.random.randint(keys[3], (2, 12), 0, 72).at[0, :2].set(jnp.array([0, 71]))
    cotangents = jax.random.normal(keys[4], (4, 2, 12))

    @functools.partial(jax.jit, static_argnums=0)
    def both(outputs, parameters):
        values, pull_back, rest = jax.vjp(
            lambda parameters: outputs(parameters, targets), parameters, has_aux=True
        )
        return values, pull_back(cotangents)[0], rest

    whole = both(_outputs, parameters)
    assert np.all(np.asarray(whole[2][1]) == 7)
    mesh = jax.make_mesh((2, 4), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    splits = {"slow": P(None), ("slow", "fast"): P(None), ("fast",): P("slow")}
    with jax.set_mesh(mesh):
        for axes, rows in splits.items():
            axes = (axes,) if isinstance(axes, str) else axes
            mapped = jax.shard_map(
                functools.partial(_outputs, axes=axes),
                in_specs=((rows, P(axes), P(axes)), rows),
                out_specs=(P(None, *rows), rows),
                check_vma=False,
            )
            parts = both(mapped, parameters)
            for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    print("EQUAL", jax.device_count())


def test_parts_of_the_vocabulary_give_what_the_whole_gives():
    """Over one axis, over two, and with the rows split over the other."""
    module = "kernels_pallas.test_linear_cross_entropy_sharded"
    script = f"import tests.{module} as test; test.compare_on_eight_devices()"
    assert "EQUAL 8" in run_on_devices(8, script)


@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
def test_the_kernels_run_on_parts_and_gather_no_weight(generation):
    devices = np.asarray(aot.tpu_devices(aot.TPUS[generation])[:4])
    mesh = jax.sharding.Mesh(devices.reshape(2, -1), ("data", "tensor"))

    def loss(hidden, weight, targets):
        out = linear_cross_entropy(
            hidden=hidden, weight=weight, targets=targets, vocabulary_axes=("tensor",), impl="tpu"
        )
        return out.log_sum_exp - out.target

    def mean(hidden, weight, targets):
        specs = (P("data"), P("tensor"), P("data"))
        mapped = jax.shard_map(loss, in_specs=specs, out_specs=P("data"), check_vma=False)
        return jnp.mean(mapped(hidden, weight, targets))

    def placed(shape, dtype, *spec):
        sharding = jax.sharding.NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    hidden = placed((4, 256, 256), jnp.bfloat16, "data")
    weight = placed((4096, 256), jnp.bfloat16, "tensor")
    targets = placed((4, 256), jnp.int32, "data")
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(mean, (0, 1))).lower(hidden, weight, targets).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "all-reduce" in text and "all-gather" not in text

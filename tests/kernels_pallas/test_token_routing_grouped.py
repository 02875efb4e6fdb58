"""The grouped matrix product against a float64 loop and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generations import every_generation
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.common import aot
from kernels_pallas.token_routing import GroupedMatmulConfig, grouped_matmul
from kernels_pallas.token_routing.specs import GROUPED_SHAPES

N, D, F, E = 40, 24, 16, 4
# Several tiles each way, the last ones partial.
TPU = GroupedMatmulConfig(tiling=(16, 16, 16), interpret=True)
IMPLS = [("ref", None), ("xla", None), ("tpu", TPU)]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


def _arrays(sizes, dtype="float32", seed=0):
    """Rows, NaN after the last group; matrices; sizes; a cotangent, NaN likewise."""
    rng = np.random.default_rng(seed)
    sizes = np.asarray(sizes, np.int32)
    grouped = (np.arange(N) < sizes.sum())[:, None]

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    x, by = (jnp.where(grouped, normal(N, width), jnp.nan) for width in (D, F))
    return x, normal(E, D, F), jnp.asarray(sizes), by


@functools.partial(jax.jit, static_argnames=("impl", "config"))
def _both(x, weights, sizes, by, *, impl, config):
    out, back = jax.vjp(
        lambda x, weights: grouped_matmul(
            x=x, weights=weights, group_sizes=sizes, impl=impl, config=config
        ),
        x,
        weights,
    )
    return out, *back(by)


def _loop(x, weights, sizes, by):
    x, weights, by = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, weights, by))
    out, x_gradient, weights_gradient = np.zeros(by.shape), np.zeros(x.shape), 0 * weights
    expert_of = np.repeat(np.arange(E), sizes)
    for n, expert in enumerate(expert_of):
        out[n] = x[n] @ weights[expert]
        x_gradient[n] = weights[expert] @ by[n]
        weights_gradient[expert] += np.outer(x[n], by[n])
    return out, x_gradient, weights_gradient


def _check(arrays, impl, config):
    out = _both(*arrays, impl=impl, config=config)
    for ours, expected in zip(out, _loop(*arrays), strict=True):
        assert ours.dtype == arrays[0].dtype
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(
            ours.astype(jnp.float32), expected, atol=TOLERANCE[ours.dtype.name] * scale
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("impl", "config"), IMPLS)
def test_values_and_gradients_equal_a_float64_loop(impl, config, dtype):
    for sizes in ([7, 0, 20, 13], [3, 17, 0, 5], [0, 0, 0, 0], [0, N, 0, 0], [1, 1, 1, 1]):
        _check(_arrays(sizes, dtype), impl, config)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_sizes(data):
    edges = sorted(data.draw(st.lists(st.integers(0, N), min_size=E, max_size=E)))
    arrays = _arrays(np.diff([0, *edges]), seed=data.draw(st.integers(0, 1000)))
    for impl, config in IMPLS:
        _check(arrays, impl, config)


@pytest.mark.parametrize(("impl", "config"), IMPLS)
def test_gradients_equal_finite_differences(impl, config):
    x, weights, sizes, by = _arrays([7, 0, 20, 10])
    _, x_gradient, weights_gradient = _both(x, weights, sizes, by, impl=impl, config=config)
    cotangent = np.nan_to_num(np.asarray(by, np.float64))

    def slope(which, at):
        ends, places = [], []
        for step in (0.5, -0.5):
            moved = [x, weights]
            moved[which] = moved[which].at[at].add(step)
            ends.append(np.sum(cotangent * _loop(*moved, sizes, by)[0]))
            places.append(np.float64(moved[which][at]))
        return (ends[0] - ends[1]) / (places[0] - places[1])

    for at in [(0, 0), (6, 23), (7, 3), (36, 5)]:
        np.testing.assert_allclose(x_gradient[at], slope(0, at), rtol=1e-4, atol=1e-5)
    for at in [(0, 0, 0), (1, 2, 3), (2, 23, 15), (3, 7, 7)]:
        np.testing.assert_allclose(weights_gradient[at], slope(1, at), rtol=1e-4, atol=1e-5)


def test_a_mixture_of_dtypes_is_refused_by_the_kernel_alone():
    x, weights, sizes, _ = _arrays([7, 0, 20, 13])
    mixed = functools.partial(
        grouped_matmul, x=x, weights=weights.astype(jnp.bfloat16), group_sizes=sizes, config=TPU
    )
    with pytest.raises(ValueError, match="not float32 and bfloat16"):
        mixed(impl="tpu")
    np.testing.assert_allclose(mixed(impl="xla"), mixed(impl="ref"), atol=1e-4)


@every_generation("float32", "bfloat16")
def test_it_compiles_for_every_generation(topology, dtype):
    shape = GROUPED_SHAPES["experts-64" if dtype == "bfloat16" else "experts-8"]
    arrays = (
        jax.ShapeDtypeStruct((shape.rows, shape.width), dtype),
        jax.ShapeDtypeStruct((shape.experts, shape.width, shape.hidden), dtype),
        jax.ShapeDtypeStruct((shape.experts,), jnp.int32),
        jax.ShapeDtypeStruct((shape.rows, shape.hidden), dtype),
    )
    both = functools.partial(_both, impl="tpu", config=None)
    compiled = aot.compile_tpu(both, *arrays, topology=aot.TPUS[topology])
    assert compiled.memory_analysis().output_size_in_bytes > 0


def test_a_tpu_takes_the_kernel_unasked():
    # Only here: where XLA gives megablox's small index arithmetic to a SparseCore, jaxlib 0.10.2
    # cannot print the compiled program.
    arrays = (
        jax.ShapeDtypeStruct((256, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((4, 128, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((4,), jnp.int32),
        jax.ShapeDtypeStruct((256, 256), jnp.bfloat16),
    )
    both = functools.partial(_both, impl=None, config=None)
    text = aot.compile_tpu(both, *arrays, topology=aot.TPUS["v5e"]).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3

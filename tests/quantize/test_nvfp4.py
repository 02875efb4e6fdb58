"""NVFP4 against its tables and bounds, and against a NumPy version of the format."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.nvfp4_matmul import E2M1, decoded, nvfp4_matmul, packed
from tokenlab.core.errors import UserError
from tokenlab.quantize import NVFP4, fake_nvfp4, nvfp4, tensor_scale

GRID = np.array([*E2M1, *(-value for value in E2M1)], np.float32)


def oracle(x):
    """Blocks of 16 of a vector, in NumPy with ml_dtypes' own rounding."""
    scale = np.float32(np.abs(x).max()) / np.float32(6 * 448)
    out = np.zeros_like(x)
    for start in range(0, len(x), 16):
        block = x[start : start + 16]
        step = np.float32(np.abs(block).max() / (6 * scale)).astype(ml_dtypes.float8_e4m3fn)
        step = np.float32(step) * scale
        if step > 0:
            clipped = np.clip(block / step, -6, 6)
            out[start : start + 16] = (
                clipped.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * step
            )
    return out


def test_a_block_of_the_grid_comes_back_exactly():
    for size in (1.0, 2.0**-5, 448.0):
        made = nvfp4(jnp.asarray(size * GRID))
        np.testing.assert_array_equal(made.values(), size * GRID)
        assert float(made.scales[0]) == 448.0


def test_ties_go_to_the_even_code():
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4}
    block = jnp.array([*ties, *(-tie for tie in ties), 6.0, -6.0], jnp.float32)
    expected = [*ties.values(), *(-value for value in ties.values()), 6.0, -6.0]
    np.testing.assert_array_equal(nvfp4(block).values(), expected)


@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["alike", "apart"])
def test_it_is_the_format(spread):
    rng = np.random.default_rng(0)
    size = np.exp(spread * rng.normal(size=(64, 1))) * np.ones((1, 16))
    x = (rng.normal(size=(64, 16)) * size).reshape(-1).astype(np.float32)
    np.testing.assert_allclose(nvfp4(jnp.asarray(x)).values(), oracle(x), rtol=1e-6)


def test_errors_are_bounded_by_the_block():
    """By 0.1765 of the largest of a block whose scale is a normal number."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(4096, 16)) * np.exp(rng.normal(size=(4096, 1)))).astype(np.float32)
    made = nvfp4(jnp.asarray(x.reshape(-1)))
    error = np.abs(np.asarray(made.values()).reshape(-1, 16) - x).max(axis=1)
    share = error / np.abs(x).max(axis=1)
    normal = np.asarray(made.scales, np.float32) >= 2.0**-6
    assert normal.mean() > 0.99 and share[normal].max() <= 0.1765
    assert share[normal].max() > 0.16  # the bound is near


def test_noise_of_gaussians_is_20_decibels_below():
    x = np.random.default_rng(2).normal(size=1 << 18).astype(np.float32)
    error = np.asarray(nvfp4(jnp.asarray(x)).values()) - x
    assert 10 * np.log10(np.mean(x**2) / np.mean(error**2)) == pytest.approx(20.4, abs=0.3)


def test_zeros_and_blocks_whose_scale_vanishes_are_zero():
    assert not np.any(nvfp4(jnp.zeros((32, 3))).values())
    x = np.full(32, 1e-6, np.float32)
    x[16:] = 1.0
    made = nvfp4(jnp.asarray(x))
    assert float(made.scales[0]) == 0.0
    np.testing.assert_array_equal(made.values()[:16], 0.0)
    np.testing.assert_array_equal(made.values()[16:], 1.0)


def test_a_scale_from_calibration_saturates():
    """What is larger than anything seen before gets the largest code and scale."""
    scale = tensor_scale(jnp.float32(1.0))
    made = nvfp4(jnp.full(16, 100.0), scale=scale)
    np.testing.assert_allclose(made.values(), 1.0, rtol=1e-6)
    inside = jnp.linspace(-1.0, 1.0, 16)
    np.testing.assert_array_equal(nvfp4(inside, scale=scale).values(), nvfp4(inside).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_keep_shape_and_dtype(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, 32), dtype)
    out = fake_nvfp4(x)
    assert out.dtype == x.dtype and out.shape == x.shape
    row = np.asarray(x, np.float32)[1, 2]
    scale = tensor_scale(jnp.max(jnp.abs(x)))
    np.testing.assert_allclose(
        np.asarray(out, np.float32)[1, 2],
        np.asarray(nvfp4(jnp.asarray(row), scale=scale).values()),
        rtol=2**-7 if dtype == "bfloat16" else 1e-6,
    )


def test_the_kernel_multiplies_what_the_quantiser_makes():
    x, weight = (
        jax.random.normal(jax.random.key(k), shape) for k, shape in ((0, (3, 64)), (1, (64, 40)))
    )
    left, right = nvfp4(x.T), nvfp4(weight)
    out = nvfp4_matmul(
        x=packed(left.codes).T,
        x_scales=left.scales.T,
        weight=packed(right.codes),
        weight_scales=right.scales,
        alpha=left.tensor_scale * right.tensor_scale,
    )
    expected = np.asarray(left.values(), np.float64).T @ np.asarray(right.values(), np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    found = NVFP4()(weight=weight)
    np.testing.assert_array_equal(found.values, right.values())
    np.testing.assert_allclose(
        decoded(found.codes) * np.repeat(found.scale, 16, axis=0), found.values, rtol=1e-6
    )


def test_inputs_that_do_not_fill_blocks_are_refused():
    with pytest.raises(UserError, match="40 inputs do not fill them"):
        nvfp4(jnp.ones((40, 2)))

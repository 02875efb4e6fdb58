"""Products of NVFP4 codes: every implementation against float64 loops."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.nvfp4_matmul import (
    E2M1,
    Nvfp4MatmulConfig,
    decoded,
    encoded,
    nvfp4_matmul,
    packed,
    unpacked,
)

KERNEL = Nvfp4MatmulConfig(block_columns=128, interpret=True)
CONFIGS = {"ref": None, "xla": Nvfp4MatmulConfig(block_columns=128), "tpu": KERNEL}
multiply = jax.jit(nvfp4_matmul, static_argnames=("dtype", "impl", "config"))


def make(rows=3, contracted=96, columns=150, seed=0):
    """All bytes and scales of every size, zero and the smallest among them; and the product."""
    rng = np.random.default_rng(seed)

    def scales(*shape):
        drawn = np.minimum(np.exp(rng.normal(size=shape) * 2), 448)
        drawn = drawn.astype(ml_dtypes.float8_e4m3fn)
        drawn.reshape(-1)[:2] = [0.0, 2.0**-9][: drawn.size]
        return drawn

    x = rng.integers(0, 256, (rows, contracted // 2)).astype(np.uint8)
    weight = rng.integers(0, 256, (contracted // 2, columns)).astype(np.uint8)
    arrays = {
        "x": x,
        "x_scales": scales(rows, contracted // 16),
        "weight": weight,
        "weight_scales": scales(contracted // 16, columns),
        "alpha": np.float32(0.37),
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}, product(**arrays)


def number(byte, half):
    code = byte >> 4 if half else byte & 15
    return -E2M1[code - 8] if code > 7 else E2M1[code]


def product(x, x_scales, weight, weight_scales, alpha):
    """Position by position, as the bytes are read."""
    contracted = 2 * x.shape[1]
    left, right = np.zeros((len(x), contracted)), np.zeros((contracted, weight.shape[1]))
    for k in range(contracted):
        for m in range(len(x)):
            left[m, k] = number(x[m, k // 2], k % 2) * float(x_scales[m, k // 16])
        for n in range(weight.shape[1]):
            right[k, n] = number(weight[k // 2, n], k % 2) * float(weight_scales[k // 16, n])
    return float(alpha) * left @ right


cases = functools.cache(make)


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("impl", CONFIGS)
def test_it_is_what_loops_say(impl, rows):
    arrays, expected = cases(rows)
    close(multiply(**arrays, impl=impl, config=CONFIGS[impl]), expected)


# Of one piece and of several, one block of columns and several, a last block that is not full.
SIZES = [(32, 1), (576, 40), (1152, 130)]


@pytest.mark.parametrize(("contracted", "columns"), SIZES)
def test_forms_agree_at_other_sizes(contracted, columns):
    arrays, expected = make(2, contracted, columns)
    for impl, config in CONFIGS.items():
        close(multiply(**arrays, impl=impl, config=config), expected)


@settings(max_examples=4, deadline=None)
@given(
    rows=st.integers(1, 8),
    blocks=st.integers(1, 12),
    columns=st.sampled_from([1, 127, 128, 129, 256]),
    seed=st.integers(0, 99),
)
def test_any_size(rows, blocks, columns, seed):
    arrays, expected = make(rows, 16 * blocks, columns, seed)
    for impl, config in CONFIGS.items():
        close(multiply(**arrays, impl=impl, config=config), expected)


def every_pair_of_codes(impl, config):
    """With every scale: products of 4 and 6 significant bits do not round."""
    x, weight = np.arange(16), np.arange(16)
    left = np.zeros((8, 256), np.uint8)
    every = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    for half in (0, 1):
        left[:, 5] = x[8 * half : 8 * half + 8]
        right = np.zeros((256, 128), np.uint8)
        right[5] = np.resize(weight, 128)
        scales = np.zeros((16, 128), ml_dtypes.float8_e4m3fn)
        scales[0] = np.resize(every, 128)
        out = nvfp4_matmul(
            x=packed(jnp.asarray(left.T)).T,
            x_scales=jnp.ones((8, 16), jnp.float8_e4m3fn),
            weight=packed(jnp.asarray(right)),
            weight_scales=jnp.asarray(scales),
            impl=impl,
            config=config,
        )
        values = np.asarray(decoded(jnp.arange(16, dtype=jnp.uint8)))
        expected = values[left[:, 5], None] * values[right[5]] * scales[0].astype(np.float32)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("impl", CONFIGS)
def test_a_single_code_is_exact(impl):
    every_pair_of_codes(impl, CONFIGS[impl])


def test_codes_come_back():
    codes = jnp.arange(16, dtype=jnp.uint8)
    np.testing.assert_array_equal(unpacked(packed(codes)), codes)
    assert packed(jnp.array([3, 12], jnp.uint8))[0] == 3 + 16 * 12  # the earlier one is low
    # Minus zero is written as zero.
    np.testing.assert_array_equal(encoded(decoded(codes)), jnp.where(codes == 8, 0, codes))
    np.testing.assert_array_equal(encoded(jnp.array([100.0, -100.0, -0.2])), [7, 15, 0])


def test_results_are_rounded_once():
    arrays, expected = cases(3)
    out = nvfp4_matmul(**arrays, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8)


def test_what_cannot_run_is_said(unchecked):
    arrays, _ = cases(3)
    with pytest.raises(ValueError, match="needs a TPU"):
        nvfp4_matmul(**arrays, impl="tpu")
    with pytest.raises(ValueError, match="has no impl='triton'"):
        nvfp4_matmul(**arrays, impl="triton")
    many, _ = make(9, 32, 8)
    with pytest.raises(ValueError, match="9 tokens are more than 8"):
        nvfp4_matmul(**many, impl="tpu", config=KERNEL)
    long, _ = make(1, 1040, 1)
    with pytest.raises(ValueError, match=r"a contraction of 1040 is over .* or no multiple of 128"):
        nvfp4_matmul(**long, impl="tpu", config=KERNEL)
    with pytest.raises(ValueError, match="block_columns=100 is not a multiple of 128"):
        nvfp4_matmul(
            **arrays, impl="tpu", config=Nvfp4MatmulConfig(block_columns=100, interpret=True)
        )
    with pytest.raises(ValueError, match=r"are not .* of one K that is a multiple of 16"):
        nvfp4_matmul(**arrays | {"weight_scales": arrays["weight_scales"][1:]})
    wide = {"weight_scales": arrays["weight_scales"].astype(jnp.float32)}
    with pytest.raises(ValueError, match="scales are float32, not float8_e4m3fn"):
        nvfp4_matmul(**arrays | wide, impl="tpu", config=KERNEL)


def test_the_second_call_compiles_nothing():
    multiply.clear_cache()
    for seed in (0, 1):
        multiply(**make(2, 32, 8, seed)[0], impl="xla")
    assert multiply._cache_size() == 1

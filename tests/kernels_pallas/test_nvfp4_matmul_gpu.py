"""The Hopper kernel of NVFP4 products: interpreted here, and run where there is a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreting_gpu import PLAIN, STRICT, extended

from kernels_pallas.common import dispatch
from kernels_pallas.nvfp4_matmul import Nvfp4MatmulConfig, gpu, nvfp4_matmul
from tests.kernels_pallas.test_nvfp4_matmul import close, every_pair_of_codes, make


@pytest.fixture(params=["interpreted", pytest.param("hardware", marks=pytest.mark.gpu)])
def interpret(request):
    """The ``interpret`` of the kernel: an interpreter, or none."""
    if request.param == "interpreted":
        with extended():
            yield PLAIN
    elif jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    else:
        yield False


def multiply(arrays, interpret, **options):
    config = Nvfp4MatmulConfig(interpret=interpret, **options)
    return jax.block_until_ready(nvfp4_matmul(**arrays, impl="gpu", config=config))


# One step; a last step that shares blocks with the one before; columns in twos of 64.
@pytest.mark.parametrize(
    ("rows", "contracted", "columns"), [(1, 256, 128), (8, 576, 192), (3, 272, 64)]
)
def test_it_is_what_loops_say(interpret, rows, contracted, columns):
    arrays, expected = make(rows, contracted, columns)
    close(multiply(arrays, interpret), expected)


def test_a_single_code_is_exact(interpret):
    """The smallest ones are subnormal in float16."""
    every_pair_of_codes("gpu", Nvfp4MatmulConfig(interpret=interpret))


def test_empty_blocks_and_tokens_are_zero(interpret):
    arrays, _ = make(3, 272, 64)
    arrays["weight_scales"] = arrays["weight_scales"].at[:, 7].set(0.0)
    arrays["x"] = arrays["x"].at[1].set(0)
    out = multiply(arrays, interpret)
    assert np.all(np.isfinite(out)) and np.any(out)
    assert not np.any(out[1]) and not np.any(out[:, 7])


@pytest.mark.parametrize("at_once", [1, 3])
def test_nothing_races_and_every_slot_is_filled_again(monkeypatch, at_once):
    """Seven steps: by one thread block in four slots, or by three of unequal length."""
    monkeypatch.setattr(gpu, "_AT_ONCE", at_once)
    arrays, expected = make(2, 1680, 64)
    with extended() as kernels:
        close(multiply(arrays, STRICT), expected)
    assert [kernel.races_found for kernel in kernels] == [False]


def test_what_cannot_run_is_said(monkeypatch):
    arrays, _ = make(3, 272, 64)
    with pytest.raises(ValueError, match="needs a GPU, this is a cpu"):
        multiply(arrays, False)
    with pytest.raises(ValueError, match="parameters of that one"):
        multiply(arrays, True)
    with pytest.raises(ValueError, match="9 tokens are more than 8"):
        multiply(make(9, 256, 64)[0], PLAIN)
    with pytest.raises(ValueError, match="a contraction of 240 is shorter than 256"):
        multiply(make(1, 240, 64)[0], PLAIN)
    with pytest.raises(ValueError, match="96 columns are no multiple of 64"):
        multiply(make(1, 256, 96)[0], PLAIN)
    with pytest.raises(ValueError, match="64 columns are no multiple of 128"):
        multiply(arrays, PLAIN, block_columns=128)
    with pytest.raises(ValueError, match="block_columns=256 is neither 64 nor 128"):
        multiply(arrays, PLAIN, block_columns=256)
    wide = {"weight_scales": arrays["weight_scales"].astype(jnp.float32)}
    with pytest.raises(ValueError, match="scales are float32, not float8_e4m3fn"):
        multiply(arrays | wide, PLAIN)
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(ValueError, match="tensor cores of Hopper, this is a NVIDIA A100"):
        multiply(arrays, False)

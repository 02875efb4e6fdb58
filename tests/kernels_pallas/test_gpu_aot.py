"""The GPU kernels, compiled to machine code for an H100 that is not there."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.block_sparse_attention import Causal, block_sparse_attention
from kernels_pallas.block_sparse_attention.specs import GPU_SHAPES
from kernels_pallas.common import aot, resources
from kernels_pallas.nvfp4_matmul import nvfp4_matmul
from kernels_pallas.nvfp4_matmul import specs as nvfp4

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
SPECS = "kernels_pallas.block_sparse_attention.specs:program"
PROGRAMS = "tests.kernels_pallas.programs:attention"
KERNELS = [f"block_sparse_attention_{name}" for name in ("backward_kv", "backward_q", "forward")]
MOST_REGISTERS, MOST_SHARED = 255, 227 * 1024

compiles = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_plugins") is None
        or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
        reason="needs NVIDIA's compilers: make test-gpu-aot installs them and runs this",
    ),
]


def gpu_aot(test):
    for mark in compiles:
        test = mark(test)
    return test


def _assert_fits(found, kernels=KERNELS):
    assert [one.kernel for one in found] == list(kernels)
    for one in found:
        assert one.architecture == "sm_90a"
        assert 0 < one.registers <= MOST_REGISTERS
        assert one.spill_bytes == 0, one
        assert 0 < one.shared_bytes <= MOST_SHARED


@pytest.fixture
def checkout(monkeypatch):
    """New processes find the programs of the tests."""
    monkeypatch.chdir(CHECKOUT)


@gpu_aot
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_forward_and_backward_of_every_shape_fit_without_spills(shape):
    found = resources.resources(SPECS, shape=shape, dtype="bfloat16", backward=True, impl="gpu")
    _assert_fits(found)


@gpu_aot
@pytest.mark.parametrize("shape", ["gpu-4096-grouped", "gpu-2048-narrow", "gpu-2048-wide"])
def test_lists_and_softcap_fit_without_spills(checkout, shape):
    """Blocks of 64, for which a thread block has one computing warpgroup."""
    found = resources.resources(PROGRAMS, shape=shape, softcap=30.0, block_shape=[64, 64])
    _assert_fits(found)


@gpu_aot
@pytest.mark.parametrize("shape", ["gpu-4096-grouped", "gpu-2048-wide"])
def test_a_mask_on_every_pair_and_ragged_lengths_in_float16_fit_without_spills(checkout, shape):
    width = GPU_SHAPES[shape].width - 24
    _assert_fits(
        resources.resources(PROGRAMS, shape=shape, dtype="float16", even=True, width=width)
    )


@gpu_aot
def test_a_kernel_that_does_not_fit_is_an_error(checkout):
    with pytest.raises(aot.CannotCompile, match="exceeds available shared memory"):
        resources.resources("tests.kernels_pallas.programs:too_much_shared_memory")


def _attend(q):
    tokens = jnp.zeros(q.shape[:2], jnp.int32)
    names = ("q_positions", "kv_positions", "q_segments", "kv_segments")
    options = dict.fromkeys(names, tokens)
    return block_sparse_attention(q=q, k=q, v=q, rule=Causal(), scale=1.0, **options)


@gpu_aot
def test_a_gpu_takes_the_kernels_of_the_public_function():
    def loss(q):
        return jnp.sum(_attend(q).astype(jnp.float32))

    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    compiled = aot.compile_gpu(jax.grad(loss), q)
    for kernel in KERNELS:
        assert kernel in compiled.as_text()
    # Scores of all pairs would take 2 MB in float32.
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20


@gpu_aot
def test_rows_of_vmap_are_rows_of_the_grid():
    q = jax.ShapeDtypeStruct((3, 1, 256, 2, 64), jnp.bfloat16)
    assert KERNELS[-1] in aot.compile_gpu(jax.vmap(_attend), q).as_text()


@gpu_aot
def test_float32_falls_through_to_xla():
    mesh = jax.sharding.Mesh(list(aot.gpu_devices("h100")), ("device",))
    with jax.set_mesh(mesh):
        traced = jax.jit(_attend).trace(jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32))
    assert "pallas_call" not in str(traced.jaxpr)
    assert "mpmd_map" not in str(traced.jaxpr)


NVFP4 = "kernels_pallas.nvfp4_matmul.specs:program"


@gpu_aot
@pytest.mark.parametrize("shape", nvfp4.SHAPES)
def test_products_of_4_bits_fit_two_to_a_multiprocessor(shape):
    found = resources.resources(NVFP4, shape=shape, dtype="float32", backward=False, impl="gpu")
    _assert_fits(found, ["nvfp4_matmul"])
    # 65,536 registers, of 384 threads each; and shared memory, 1 kB of it the system's.
    assert 2 * 384 * found[0].registers <= 1 << 16
    assert 2 * (found[0].shared_bytes + 1024) <= 228 * 1024


@gpu_aot
@pytest.mark.parametrize("shape", nvfp4.SHAPES)
def test_products_of_4_bits_keep_no_other_form_of_the_weight(shape):
    made = nvfp4.arguments(nvfp4.SHAPES[shape])
    compiled = aot.compile_gpu(lambda arrays: nvfp4_matmul(**arrays), made)
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 1
    # Neither the weight in another form, nor a copy of its codes: tokens and sums of splits only.
    assert compiled.memory_analysis().temp_size_in_bytes < max(made["weight"].size // 8, 1 << 19)


@gpu_aot
def test_another_number_of_tokens_takes_the_other_form_of_products():
    made = nvfp4.arguments(nvfp4.Shape(rows=9, contracted=576, columns=1536))
    text = aot.compile_gpu(lambda arrays: nvfp4_matmul(**arrays), made).as_text()
    assert "mosaic_gpu" not in text


@gpu_aot
def test_memory_is_that_of_the_results():
    compiled = aot.compile_gpu(lambda x: x + 1, jax.ShapeDtypeStruct((16, 256), jnp.float32))
    assert compiled.memory_analysis().output_size_in_bytes == 16 * 256 * 4


def test_without_the_compiler_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    aot.gpu_devices.cache_clear()
    with pytest.raises(aot.CannotCompile, match="make test-gpu-aot"):
        aot.compile_gpu(lambda x: x, jax.ShapeDtypeStruct((2,), jnp.float32))


def test_an_unknown_gpu_is_said():
    with pytest.raises(aot.CannotCompile, match="no description of 'z9'"):
        aot.compile_gpu(lambda x: x, jax.ShapeDtypeStruct((2,), jnp.float32), gpu="z9")


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for attend_mosaic_gpu_kernel
    40 bytes stack frame, 44 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 40 bytes cumulative stack size, 1 bytes smem
"""
LAUNCH = "%7 = gpu.launch async dynamic_shared_memory_size %c167000_i32 args(%84 : !llvm.ptr)\n"


def test_resources_are_read(tmp_path):
    (tmp_path / "attend_0.ptxas").write_text(PTXAS)
    (tmp_path / "attend_0.mlir-passes.log").write_text("module @attend\n" + LAUNCH)
    expected = resources.GpuResources(
        kernel="attend", architecture="sm_90a", registers=168, spill_bytes=44, shared_bytes=167000
    )
    assert resources.read(tmp_path) == [expected]
    assert resources.table([expected]).splitlines()[1].split() == ["attend", "168", "44", "167,000"]
    with pytest.raises(ValueError, match="text has changed"):
        resources.parse(PTXAS, "no launch")


@gpu_aot
def test_the_command_prints_a_table(capsys):
    resources.main(["block_sparse_attention", "--shape", "gpu-2048-narrow"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["kernel", KERNELS[-1]]

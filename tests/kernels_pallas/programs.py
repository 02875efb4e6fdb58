"""Programs whose costs tests read; compiled in processes of their own."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.block_sparse_attention import Causal, partial_attention
from kernels_pallas.block_sparse_attention.specs import GPU_SHAPES
from tests.attending import Even, both_sides


def _multiply(x_ref, y_ref, out_ref, sum_ref):
    step, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(step == last)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def product(*, block, inner):
    """A blocked matrix product of 1024 x 1024 bf16 matrices."""

    def run(x, y):
        return pl.pallas_call(
            _multiply,
            grid=(1024 // block, 1024 // block, 1024 // inner),
            in_specs=[
                pl.BlockSpec((block, inner), lambda i, j, k: (i, k)),
                pl.BlockSpec((inner, block), lambda i, j, k: (k, j)),
            ],
            out_specs=pl.BlockSpec((block, block), lambda i, j, k: (i, j)),
            out_shape=jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16),
            scratch_shapes=[pltpu.VMEM((block, block), jnp.float32)],
            name="product",
        )(x, y)

    matrix = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    return run, (matrix, matrix)


def nothing(**options):
    """A program without a kernel."""
    return (lambda x: x + 1), (jax.ShapeDtypeStruct((8, 128), jnp.float32),)


def broken():
    """A program that does not compile."""
    block = pl.BlockSpec((4, 100), lambda i: (i, 0))

    def run(x):
        return pl.pallas_call(
            lambda a, b: None, grid=(2,), in_specs=[block], out_specs=block, out_shape=x
        )(x)

    return run, (jax.ShapeDtypeStruct((8, 200), jnp.float32),)


def attention(*, shape, dtype="bfloat16", even=False, softcap=None, block_shape=None, width=None):
    """The gradient of ``gpu`` attention, with what is not in its named shapes."""
    named = GPU_SHAPES[shape]
    named = named if width is None else dataclasses.replace(named, width=width, length=1000)
    tokens = jax.ShapeDtypeStruct((named.batch, named.length), jnp.int32)
    q, kv = (
        jax.ShapeDtypeStruct((named.batch, named.length, heads, named.width), dtype)
        for heads in (named.heads, named.kv_heads)
    )

    def loss(arrays, positions, segments, *lists):
        (q, k, v), (blocks,) = arrays, lists or (None,)
        out, log_sum_exp = partial_attention(
            q=q, k=k, v=v, **both_sides(positions, segments), softcap=softcap, scale=0.1,
            rule=Even() if even else Causal(),
            blocks=blocks, block_shape=tuple(block_shape or (128, 128)), impl="gpu",
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(log_sum_exp)

    rows = -(-named.length // (block_shape or [1])[0])
    lists = [] if block_shape is None else [jax.ShapeDtypeStruct((named.batch, rows, 8), jnp.int32)]
    return jax.grad(loss), ((q, kv, kv), tokens, tokens, *lists)


def too_much_shared_memory():
    """A kernel that wants a mebibyte of it."""
    kernel = plgpu.kernel(
        lambda x, out, scratch: plgpu.copy_smem_to_gmem(scratch.at[0], out),
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=[plgpu.SMEM((2048, 128), jnp.float32)],
    )
    return kernel, (jax.ShapeDtypeStruct((128,), jnp.float32),)

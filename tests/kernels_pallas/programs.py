"""Programs whose schedules tests read; compiled in processes of their own."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


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

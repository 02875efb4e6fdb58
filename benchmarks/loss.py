"""linear_cross_entropy against whole logits and jax.nn.log_softmax: time, memory, matmul rate.

python -m benchmarks.loss [--dtype float32] [--repeats 5] [SHAPE ...]
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from benchmarks.timing import in_turn, square_product
from kernels_pallas.linear_cross_entropy import linear_cross_entropy
from kernels_pallas.linear_cross_entropy.specs import SHAPES, Shape


def naive(hidden, weight, targets):
    """Whole logits."""
    logits = jnp.einsum("btd,vd->btv", hidden, weight, preferred_element_type=jnp.float32)
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.take_along_axis(logp, targets[:, :, None], axis=-1))


def ours(hidden, weight, targets):
    """Blocks of the vocabulary."""
    out = linear_cross_entropy(hidden=hidden, weight=weight, targets=targets, impl="xla")
    return jnp.sum(out.log_sum_exp - out.target)


def arrays_of(shape: Shape, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, weight and targets."""
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = (shape.batch, shape.length)
    hidden = jax.random.normal(keys[0], (*tokens, shape.width), dtype)
    weight = jax.random.normal(keys[1], (shape.vocabulary, shape.width), dtype) * 0.05
    return hidden, weight, jax.random.randint(keys[2], tokens, 0, shape.vocabulary)


def measure(name: str, shape: Shape, dtype: str, repeats: int) -> None:
    """Prints the rows of one shape."""
    arrays = arrays_of(shape, dtype)
    product, product_flops = square_product()
    functions, temporary = {"product": product}, {}
    for who, function in (("naive", naive), ("ours", ours)):
        for which, compute in (
            ("forward", function),
            ("forward+backward", jax.grad(function, (0, 1))),
        ):
            compiled = jax.jit(compute).lower(*arrays).compile()
            functions[f"{who} {which}"] = functools.partial(compiled, *arrays)
            temporary[f"{who} {which}"] = compiled.memory_analysis().temp_size_in_bytes
    timings = in_turn(functions, repeats=repeats)

    rate = product_flops / timings["product"].best
    print(f"{name} {dtype}: float32 matrix product {rate / 1e9:.0f} GFLOP/s in the same run")
    projection = 2.0 * arrays[2].size * shape.width * shape.vocabulary
    for which, products in (("forward", (1, 1)), ("forward+backward", (3, 4))):
        theirs, mine = timings[f"naive {which}"], timings[f"ours {which}"]
        memory = temporary[f"ours {which}"] / temporary[f"naive {which}"]
        shares = [
            count * projection / timing.best / rate
            for count, timing in zip(products, (theirs, mine), strict=True)
        ]
        print(
            f"  {which:17} naive {theirs.best:6.3f} s  ours {mine.best:6.3f} s"
            f"  ratio best {mine.best / theirs.best:.2f} median {mine.median / theirs.median:.2f}"
            f"  memory {memory:6.1%} ({temporary[f'ours {which}'] / 2**20:.0f} MiB)"
            f"  share of matmul rate naive {shares[0]:.2f} ours {shares[1]:.2f}"
        )


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for name in options.shapes or [name for name in SHAPES if name.startswith("laptop")]:
        measure(name, SHAPES[name], options.dtype, options.repeats)


if __name__ == "__main__":
    main()

"""Token routing on this CPU: time relative to plain indexing and to a dense mask.

python -m benchmarks.token_routing [--dtype float32] [--repeats 10] [SHAPE ...]

``routed`` is a feed-forward block on the routed tokens alone, gathered and added back;
``masked`` runs it on every token and keeps what was routed.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import in_turn
from kernels_pallas.token_routing import gather_tokens, grouped_matmul, scatter_add_tokens
from kernels_pallas.token_routing.specs import GROUPED_SHAPES, SHAPES, Shape


def _gather(x, y, gate, index, count, inner):
    del y, gate, inner
    return gather_tokens(x=x, index=index, count=count)


def _gather_plain(x, y, gate, index, count, inner):
    del y, gate, inner
    valid = jnp.arange(index.shape[1])[None, :] < count[:, None]
    return jnp.where(valid[:, :, None], jnp.take_along_axis(x, index[:, :, None], axis=1), 0)


def _scatter(x, y, gate, index, count, inner):
    del inner
    return scatter_add_tokens(residual=x, y=y, gate=gate, index=index, count=count)


def _scatter_plain(x, y, gate, index, count, inner):
    del inner
    valid = jnp.arange(index.shape[1])[None, :] < count[:, None]
    rows = jnp.arange(x.shape[0])[:, None]
    gated = jnp.where(valid, gate, 0.0)[:, :, None] * y
    return x.astype(jnp.float32).at[rows, index].add(gated).astype(x.dtype)


def _block(x, inner):
    return jax.nn.gelu(x @ inner[0]) @ inner[1]


def _routed(x, y, gate, index, count, inner):
    rows = _block(_gather(x, y, gate, index, count, inner), inner)
    return _scatter(x, rows, gate, index, count, inner)


def _masked(x, y, gate, index, count, inner):
    rows, length = jnp.arange(x.shape[0])[:, None], x.shape[1]
    valid = jnp.arange(index.shape[1])[None, :] < count[:, None]
    where = jnp.where(valid, index, length)
    gates = jnp.zeros(x.shape[:2]).at[rows, where].set(gate, mode="drop")
    return (x + gates[:, :, None] * _block(x, inner)).astype(x.dtype)


PAIRS = {
    "gather": (_gather, _gather_plain, (0,)),
    "scatter-add": (_scatter, _scatter_plain, (0, 1, 2)),
    "block": (_routed, _masked, (0, 2, 5)),
}


def _arrays(shape: Shape, dtype: str):
    keys = jax.random.split(jax.random.key(0), 4)
    rng = np.random.default_rng(0)
    index = [np.sort(rng.permutation(shape.length)[: shape.slots]) for _ in range(shape.batch)]
    width = shape.width
    return (
        jax.random.normal(keys[0], (shape.batch, shape.length, width), dtype),
        jax.random.normal(keys[1], (shape.batch, shape.slots, width), dtype),
        jax.random.uniform(keys[2], (shape.batch, shape.slots)),
        jnp.asarray(np.stack(index), jnp.int32),
        jnp.full(shape.batch, shape.slots, jnp.int32),
        tuple(
            jax.random.normal(key, sizes, dtype) * width**-0.5
            for key, sizes in zip(
                jax.random.split(keys[3]), ((width, 4 * width), (4 * width, width)), strict=True
            )
        ),
    )


def _again(compiled, arrays, times=5):
    """Several runs, so that what ran before leaves its cold cache to a small part of them."""
    return [compiled(*arrays) for _ in range(times)]


def measure(name: str, shape: Shape, dtype: str, repeats: int) -> None:
    """Prints the rows of one shape."""
    arrays = _arrays(shape, dtype)
    timings = {}
    for pair, (ours, other, by) in PAIRS.items():
        functions = {}
        for who, function in (("ours", ours), ("other", other)):

            def loss(*arrays, function=function):
                return jnp.sum(jnp.square(function(*arrays).astype(jnp.float32)))

            for which, compute in (("forward", function), ("backward", jax.grad(loss, by))):
                compiled = jax.jit(compute).lower(*arrays).compile()
                functions[pair, who, which] = functools.partial(_again, compiled, arrays)
        timings |= in_turn(functions, repeats=repeats)
    print(f"{name} {dtype}: {shape.slots} of {shape.length} tokens; ours / the other")
    for pair, other in (("gather", "indexing"), ("scatter-add", "indexing"), ("block", "masked")):
        ratios = []
        for which in ("forward", "backward"):
            mine, theirs = timings[pair, "ours", which], timings[pair, "other", which]
            ratios.append(
                f"{which} best {mine.best / theirs.best:.2f}"
                f" median {mine.median / theirs.median:.2f}"
            )
        print(f"  {pair:11} against {other:8}  {'  '.join(ratios)}")


def measure_grouped(dtype: str, repeats: int) -> None:
    """Prints the grouped product's time over that of one product of the same size."""
    shape = GROUPED_SHAPES["laptop"]
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (shape.rows, shape.width), dtype)
    weights = jax.random.normal(keys[1], (shape.experts, shape.width, shape.hidden), dtype)
    sizes = jnp.full(shape.experts, shape.rows // shape.experts, jnp.int32)
    grouped = {
        impl: jax.jit(functools.partial(grouped_matmul, impl=impl)) for impl in ("xla", "ref")
    }
    dense = jax.jit(jnp.matmul)
    functions = {
        impl: functools.partial(function, x=x, weights=weights, group_sizes=sizes)
        for impl, function in grouped.items()
    }
    timings = in_turn({**functions, "dense": lambda: dense(x, weights[0])}, repeats=repeats)
    ratios = {impl: timings[impl].best / timings["dense"].best for impl in functions}
    print(
        f"grouped {dtype}: {shape.experts} experts; time over one product of all rows: "
        f"xla {ratios['xla']:.1f}, ref {ratios['ref']:.1f}"
    )


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    for name in options.shapes or ("laptop",):
        measure(name, SHAPES[name], options.dtype, options.repeats)
    measure_grouped(options.dtype, options.repeats)


if __name__ == "__main__":
    main()

"""block_sparse_attention against dense attention: time, memory, share of the matmul rate.

python -m benchmarks.attention [--repeats 10] [--window 128] [SHAPE ...]
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from benchmarks.timing import in_turn, square_product
from kernels_pallas.block_sparse_attention import (
    Causal,
    SlidingWindow,
    block_sparse_attention,
)
from kernels_pallas.block_sparse_attention.specs import SHAPES, Shape


def attend(q, k, v, *, rule, impl):
    """Ours over whole rows of one document."""
    length = q.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length)[None], q.shape[:2])
    segments = jnp.ones_like(positions)
    return block_sparse_attention(
        q=q,
        k=k,
        v=v,
        q_positions=positions,
        kv_positions=positions,
        q_segments=segments,
        kv_segments=segments,
        rule=rule,
        scale=q.shape[3] ** -0.5,
        impl=impl,
    )


def peer(q, k, v, *, rule):
    """JAX's own."""
    window = (rule.size - 1, 0) if isinstance(rule, SlidingWindow) else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window)


def both(function):
    """The function and its gradient."""

    def run(q, k, v):
        out, pull_back = jax.vjp(function, q, k, v)
        return out, pull_back(out)

    return run


def measure(name: str, shape: Shape, rule: Causal | SlidingWindow, repeats: int) -> None:
    """Prints the rows of one shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    arrays = [
        jax.random.normal(key, (shape.batch, shape.length, count, shape.width))
        for key, count in zip(keys, heads, strict=True)
    ]
    product, product_flops = square_product(1024)
    functions, temporary = {"product": product}, {}
    for who, function in (
        ("ref", functools.partial(attend, rule=rule, impl="ref")),
        ("jax.nn", functools.partial(peer, rule=rule)),
        ("ours", functools.partial(attend, rule=rule, impl="xla")),
    ):
        for which, compute in (("forward", function), ("forward+backward", both(function))):
            compiled = jax.jit(compute).lower(*arrays).compile()
            functions[f"{who} {which}"] = functools.partial(compiled, *arrays)
            temporary[f"{who} {which}"] = compiled.memory_analysis().temp_size_in_bytes
    timings = in_turn(functions, repeats=repeats)

    rate = product_flops / timings["product"].best
    print(f"{name} {rule}: float32 matrix product {rate / 1e9:.0f} GFLOP/s in the same run")
    positions = jnp.arange(shape.length)
    pairs = jnp.sum(rule(positions[:, None], positions[None], jnp.ones((1, 1)), jnp.ones((1, 1))))
    one = 2.0 * shape.batch * shape.heads * shape.width * float(pairs)
    for which, products in (("forward", 2), ("forward+backward", 7)):
        ours = timings[f"ours {which}"]
        print(f"  {which}")
        for who in ("ref", "jax.nn", "ours"):
            timing = timings[f"{who} {which}"]
            print(
                f"    {who:7} {timing.best * 1e3:7.1f} ms"
                f"  ours/{who} best {ours.best / timing.best:.2f}"
                f" median {ours.median / timing.median:.2f}"
                f"  memory {temporary[f'{who} {which}'] / 2**20:6.0f} MiB"
                f"  visible pairs' share of matmul rate {products * one / timing.best / rate:.2f}"
            )


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--window", type=int, help="a sliding window instead of causal")
    options = parser.parse_args()
    rule = Causal() if options.window is None else SlidingWindow(size=options.window)
    for name in options.shapes or SHAPES:
        measure(name, SHAPES[name], rule, options.repeats)


if __name__ == "__main__":
    main()

"""Decode attention on this CPU: a full cache against what is selected of it, and a peer.

python -m benchmarks.decode_attention [--dtype float32] [--repeats 10] [--slots 32768]

``full`` reads every slot, ``an eighth`` a cache that is filled to an eighth (the same program),
``selected`` 2048 tokens for each key head, ``pages`` as many in pages of 16. ``jax.nn`` is
``jax.nn.dot_product_attention`` over every slot, in the layout that it takes.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import in_turn
from kernels_pallas.decode_attention import decode_attention, token_scores
from kernels_pallas.decode_attention.specs import SHAPES, Shape


def _arrays(shape: Shape, dtype: str):
    """Queries, keys, values heads first; a full row."""
    keys = jax.random.split(jax.random.key(0), 3)
    pool = shape.batch, shape.kv_heads, shape.slots, shape.width
    k, v = (jax.random.normal(key, pool).astype(dtype) for key in keys[1:])
    q = jax.random.normal(keys[0], (shape.batch, shape.queries, shape.heads, shape.width))
    return q.astype(dtype), k, v


def _selected(shape: Shape, unit: int, count: int):
    rng = np.random.default_rng(0)
    lists = [
        rng.permutation(shape.slots // unit)[:count] for _ in range(shape.batch * shape.kv_heads)
    ]
    return jnp.asarray(np.stack(lists), jnp.int32).reshape(shape.batch, shape.kv_heads, count)


def _attend(q, k, v, lengths, selected=None, pages=None, *, unit=1, impl="xla"):
    return decode_attention(
        q=q, k=k, v=v, lengths=lengths, q_positions=lengths[:, None] - 1, pages=pages,
        selected=selected, unit=unit, scale=q.shape[3] ** -0.5, impl=impl,
    )  # fmt: skip


def _vote(q, k, lengths):
    return token_scores(
        q=q, k=k, lengths=lengths, q_positions=lengths[:, None] - 1, scale=q.shape[3] ** -0.5
    )


def _peer(q, k, v):
    return jax.nn.dot_product_attention(q, k, v)


def calls(shape: Shape, dtype: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """What is compared, by name: functions and their arguments."""
    q, k, v = _arrays(shape, dtype)
    full = jnp.full(shape.batch, shape.slots)
    tokens, units = (_selected(shape, unit, 2048 // unit) for unit in (1, 16))
    pool = [
        jnp.moveaxis(x.reshape(*x.shape[:2], -1, 16, x.shape[3]), 2, 1).reshape(
            -1, shape.kv_heads, 16, shape.width
        )
        for x in (k, v)
    ]
    pages = jnp.arange(shape.batch * shape.slots // 16).reshape(shape.batch, -1)
    return {
        "full": (_attend, (q, k, v, full)),
        "an eighth": (_attend, (q, k, v, full // 8)),
        "selected": (_attend, (q, k, v, full, tokens)),
        "pages": (functools.partial(_attend, unit=16), (q, *pool, full, units, pages)),
        "votes": (_vote, (q, k, full)),
        "ref full": (functools.partial(_attend, impl="ref"), (q, k, v, full)),
        "jax.nn": (_peer, (q, k.swapaxes(1, 2), v.swapaxes(1, 2))),
    }


def measure(shape: Shape, dtype: str, repeats: int) -> None:
    """Prints the rows of one dtype."""
    functions = {}
    for name, (function, arguments) in calls(shape, dtype).items():
        compiled = jax.jit(function).lower(*arguments).compile()
        functions[name] = functools.partial(compiled, *arguments)
    timings = in_turn(functions, repeats=repeats)
    print(
        f"{dtype}: {shape.slots} slots, {shape.heads} heads on {shape.kv_heads}, {shape.width} wide"
    )
    for name, timing in timings.items():
        ratios = "  ".join(
            f"{other}/{name} best {timings[other].best / timing.best:5.1f}"
            f" median {timings[other].median / timing.median:5.1f}"
            for other in ("full", "jax.nn")
        )
        print(f"  {name:10} {timing.best * 1e3:7.2f} ms  {ratios}")


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--slots", type=int, default=32768)
    options = parser.parse_args()
    shape = dataclasses.replace(SHAPES["laptop-full"], slots=options.slots)
    for dtype in [options.dtype] if options.dtype else ["float32", "bfloat16"]:
        measure(shape, dtype, options.repeats)


if __name__ == "__main__":
    main()

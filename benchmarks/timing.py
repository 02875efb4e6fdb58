"""Timing that survives a busy machine: peers take turns, and the best and the median are kept."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one function.

    Attributes:
        best: the fastest run.
        median: the middle run.
    """

    best: float
    median: float


def in_turn(
    functions: Mapping[Any, Callable[[], Any]],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, Timing]:
    """Runs all functions once per round, so that a slow spell of the machine hits every one.

    Args:
        functions: name to a function of no arguments that returns arrays.
        repeats: rounds that count; one more, for compilation and caches, does not.
        clock: what tells the time; ``time.process_time`` counts the work of all cores, and nothing
            of what other processes take.
    """
    seconds = {name: [] for name in functions}
    for counted in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            jax.block_until_ready(function())
            if counted:
                seconds[name].append(clock() - start)
    return {
        name: Timing(best=min(runs), median=statistics.median(runs))
        for name, runs in seconds.items()
    }


def square_product(size: int = 2048) -> tuple[Callable[[], Any], float]:
    """A large float32 matrix product and its FLOPs: the rate that others are a share of."""
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(jnp.matmul)
    return lambda: product(matrix, matrix), 2.0 * size**3

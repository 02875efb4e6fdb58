"""What the kernels cost on a TPU, one at a time, for the tuner."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from kernels_pallas.common.predict import Peak, Step, call_cycles, loop_cycles
from kernels_pallas.common.schedule import Schedule
from kernels_pallas.linear_cross_entropy import specs, tpu
from kernels_pallas.linear_cross_entropy.specs import SHAPES

PASSES: tuple[specs.Pass, ...] = ("forward", "by_hidden", "by_weight")


def kernel(
    *, which: specs.Pass, shape: str, dtype: str, tokens: int, vocabulary: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One kernel of a named shape without softcap and bias, for ``schedule``."""
    named, struct = SHAPES[shape], cast(Any, jax.ShapeDtypeStruct)
    config = specs.LinearCrossEntropyConfig(block_tokens=tokens, block_vocabulary=vocabulary)
    call = tpu.Call(softcap=None, statistics=False, config=config)
    count = named.batch * named.length
    hidden = struct((count, named.width), dtype)
    weight = struct((named.vocabulary, named.width), dtype)
    if which == "forward":
        targets = struct((1, count), jnp.int32)
        return lambda h, w, t: tpu.forward(call, h, w, None, t)[0], (hidden, weight, targets)
    rows = struct((8, count), jnp.float32)
    run = tpu.by_hidden if which == "by_hidden" else tpu.by_weight
    return lambda h, w, t: run(call, h, w, None, t), (hidden, weight, rows)


def candidates(which: specs.Pass, shape: str, dtype: str) -> list[dict[str, int]]:
    """Tiles that fit VMEM, the side that stays from 512 up and the one that streams to 1024."""
    named, itemsize = SHAPES[shape], jnp.dtype(dtype).itemsize
    found = []
    for stay in (512, 1024, 2048):
        for stream in (256, 512, 1024):
            pair = (stream, stay) if which == "by_weight" else (stay, stream)
            tile = specs.Tile(tokens=pair[0], vocabulary=pair[1])
            fits = specs.vmem_bytes(which, tile, named.width, itemsize) <= specs.VMEM_BYTES
            if fits and pair[0] <= named.batch * named.length and pair[1] <= named.vocabulary:
                found.append(tile._asdict())
    return found


def tuned_name(which: specs.Pass, shape: str, dtype: str) -> str:
    """The key of an entry of ``tuned.json``."""
    return specs.tuned_key(which, jnp.dtype(dtype).itemsize, SHAPES[shape].width)


def predicted(
    found: Schedule,
    peak: Peak,
    which: specs.Pass,
    shape: str,
    dtype: str,
    sizes: Mapping[str, int],
) -> float:
    """Cycles of a call of a named shape."""
    named, itemsize = SHAPES[shape], jnp.dtype(dtype).itemsize
    count = named.batch * named.length
    tokens, vocabulary = sizes["tokens"], sizes["vocabulary"]
    blocks = math.ceil(count / tokens), math.ceil(named.vocabulary / vocabulary)
    outer, inner = blocks if which != "by_weight" else blocks[::-1]
    stays, streams = (tokens, vocabulary) if which != "by_weight" else (vocabulary, tokens)
    product = tokens * vocabulary * named.width * (1 if which == "forward" else 2)
    row = itemsize * named.width
    parts = loop_cycles(found)
    steps = {
        Step(parts=frozenset(), bytes=streams * row, multiply_adds=product): outer * (inner - 1),
        Step(
            parts=frozenset({"edges"}),
            bytes=(streams + stays * (1 if which == "forward" else 2)) * row,
            multiply_adds=product,
        ): outer,
    }
    return call_cycles(steps, parts, peak)

"""A small M-MATE block, its rows and parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tokenlab.models import (
    MMATE,
    Attention,
    Grid,
    Window,
)

HEADS, KV_HEADS, DIM = 4, 2, 16
ATTENTION = Attention(num_heads=HEADS, num_kv_heads=KV_HEADS, qkv_bias=True)
GRID = Grid(frames=2, height=3, width=4, start=2)
WINDOW = Window(frames=1, height=2, width=2)
BLOCK = MMATE(attention=ATTENTION, grid=GRID, window=WINDOW, chunk=8, fastest="row", shifted=True)


def rows(lengths, width, prompts, seed=0, dtype=jnp.float32):
    """One row of documents of ``lengths``, of which the first ``prompts`` tokens are given."""
    positions, segments, prompt = np.zeros((1, width), int), np.zeros((1, width), int), []
    at = 0
    for number, (length, given) in enumerate(zip(lengths, prompts, strict=True), start=1):
        positions[0, at : at + length] = np.arange(length)
        segments[0, at : at + length] = number
        prompt += [i < given for i in range(length)]
        at += length
    prompt = np.asarray([prompt + [False] * (width - at)])
    x = np.random.default_rng(seed).normal(size=(1, width, DIM))
    return {
        "x": jnp.asarray(x, dtype),
        "positions": jnp.asarray(positions, jnp.int32),
        "segments": jnp.asarray(segments, jnp.int32),
        "prompt": jnp.asarray(prompt),
    }


def initialised(module, seed=0, **arrays):
    """Parameters larger than at the start of training, so that no term hides behind another."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), **arrays))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes),
    )


def started(model):
    """Parameters as at the start of training."""
    ids = jnp.zeros((1, 8), int)
    init = jax.jit(functools.partial(model.init, positions=ids, segments=ids + 1))
    return nn.meta.unbox(init(jax.random.key(0), ids)["params"])


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x, positions, segments, prompt=None, cache=None):
    return module.apply(
        {"params": params},
        x, positions=positions, segments=segments, prompt=prompt, cache=cache,
    )  # fmt: skip


ONE = rows([30], 34, [27])


def mixed(params, arrays, module=BLOCK):
    return np.asarray(run(module, params, **arrays)[0])


def scan_order(grid, fastest, length):
    axes = {"column": (0, 1, 2), "row": (0, 2, 1), "frame": (1, 2, 0)}[fastest]
    sorted_places = sorted(np.ndindex(grid.shape), key=lambda place: [place[axis] for axis in axes])
    patches = [grid.start + int(np.ravel_multi_index(p, grid.shape)) for p in sorted_places]
    return [*range(grid.start), *patches, *range(grid.end, length)]

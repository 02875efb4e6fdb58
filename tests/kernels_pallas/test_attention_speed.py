"""Predicted time of attention on absent TPUs: against JAX's own kernel, by density, of lists."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import splash
from kernels_pallas.block_sparse_attention import Bidirectional, cost
from kernels_pallas.common import aot, predict, tuned
from kernels_pallas.common.schedule import schedules

NAME = "tpu-4096"
SHAPE = cost.SHAPES[NAME]
SIZES = {"length": SHAPE.length, "heads": SHAPE.heads, "width": SHAPE.width}
BLOCK = 128 * 128
KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}


PASSES = {"forward": "forward", "backward": "fused"}


@functools.cache
def _splash(topology, which, blocks):
    """Bundles of a visited block of 128 x 128, and predicted cycles of the call."""
    (found,) = schedules(
        "benchmarks.splash:program",
        topology=aot.TPUS[topology],
        which=which,
        dtype="bfloat16",
        **dataclasses.asdict(blocks),
        **SIZES,
    )
    parts = predict.part_cycles(found, **splash.parts(which, blocks))
    peak = predict.PEAKS[topology]
    cycles = predict.call_cycles(splash.steps(which, blocks, **SIZES), parts, peak)
    cycles += splash.summed_bytes(which, blocks, **SIZES) / peak.bytes_per_cycle
    return parts["body"] / (blocks.q * blocks.k / BLOCK), cycles


def _tiles(topology, which):
    """What is shipped for the device."""
    sizes = tuned.read(tuned.path("block_sparse_attention"))[KINDS[topology]]
    entry = sizes[cost.tuned_name(which, NAME, "bfloat16")]
    return {"block_q": entry["block_q"], "block_k": entry["block_k"]}


@functools.cache
def _parts(topology, which, listed=False):
    (found,) = schedules(
        "kernels_pallas.block_sparse_attention.cost:kernel",
        topology=aot.TPUS[topology],
        which=which,
        shape=NAME,
        dtype="bfloat16",
        listed=listed,
        **_tiles(topology, which),
    )
    return predict.part_cycles(found, **cost.PARTS[which])


def _call(topology, which, shape, rule, parts, blocks=None):
    """Predicted cycles of a call, and bundles of a visited block of 128 x 128."""
    tiles, peak = _tiles(topology, which), predict.PEAKS[topology]
    steps = cost.steps(which, shape, rule, blocks=blocks, **tiles)
    cycles = predict.call_cycles(steps, parts, peak)
    if which == "backward":
        cycles += cost.unscaled_bytes(shape, 2) / peak.bytes_per_cycle
    visits = sum(count for step, count in steps.items() if step.parts & set(cost.BODIES))
    bundles = predict.body_cycles(steps, parts, cost.BODIES)
    return cycles, bundles / (visits * tiles["block_q"] * tiles["block_k"] / BLOCK)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("topology", ["v5e", pytest.param("v6e", marks=pytest.mark.slow)])
def test_dense_causal_is_no_slower_than_splash_at_its_best(topology, which):
    """By visited block, whole and masked ones together, and by call."""
    blocks, call = splash.BEST[topology, PASSES[which]]
    block, _ = _splash(topology, PASSES[which], blocks)
    parts = _parts(topology, which)
    our_call, our_block = _call(topology, which, SHAPE, cost.rule_of(SHAPE), parts)
    assert our_block <= 1.05 * block, (our_block, block)
    assert our_call <= 1.05 * call * SHAPE.heads, (our_call, call)
    # Nothing computes faster than the matrix unit; below, the prediction itself is wrong.
    products = 2 if which == "forward" else 5
    least = products * SHAPE.length * SHAPE.length / 2 * SHAPE.width * SHAPE.heads
    assert our_call > least / predict.PEAKS[topology].multiply_adds


def _spread(density, tiles, length):
    """Every query block looks at that part of all key blocks, evenly spread."""
    rows, columns = length // tiles["block_q"], length // tiles["block_k"]
    step = round(1 / density)
    lists = np.arange(rows)[:, None] + step * np.arange(columns // step)[None, :]
    return jnp.asarray(lists % columns)[None]


# Length, density, and the most that time may be above density times dense. What a row of blocks
# costs once does not shrink with density: more than a tenth where two steps are left of the row.
DENSITIES = [(8192, 1 / 2, 1.1), (8192, 1 / 4, 1.1), (8192, 1 / 8, 1.22), (16384, 1 / 8, 1.1)]


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("topology", ["v5e", pytest.param("v6e", marks=pytest.mark.slow)])
def test_time_falls_with_density(topology, which):
    for length, density, most in DENSITIES:
        shape = dataclasses.replace(SHAPE, length=length)
        parts = dict(_parts(topology, which))
        if which == "backward":
            # Clears the gradients of all queries of a head.
            parts["start"] *= length // SHAPE.length
        call = functools.partial(_call, topology, which, shape, Bidirectional(), parts)
        dense, _ = call()
        sparse, _ = call(blocks=_spread(density, _tiles(topology, which), length))
        assert 1.0 < sparse / (density * dense) < most, (length, density)


@pytest.mark.parametrize("which", PASSES)
def test_lists_cost_no_more_than_the_same_static_blocks(which):
    """The causal blocks as lists, which are half empty: no step for what is empty."""
    topology = "v5e"
    tiles, rule = _tiles(topology, which), cost.rule_of(SHAPE)
    visible = rule.block_map(
        tiles["block_q"],
        tiles["block_k"],
        SHAPE.length // tiles["block_q"],
        SHAPE.length // tiles["block_k"],
    )
    lists = jnp.asarray(np.where(visible, np.arange(visible.shape[1])[None], -1))[None]
    static, _ = _call(topology, which, SHAPE, rule, _parts(topology, which))
    listed, _ = _call(topology, which, SHAPE, rule, _parts(topology, which, listed=True), lists)
    assert listed <= 1.03 * static


def _choices():
    for k, computes in {512: (512, 256), 1024: (1024, 512, 256), 2048: (1024, 512, 256)}.items():
        for q in (512, 1024, 2048):
            for compute in computes:
                yield splash.Blocks(q=q, k=k, compute=compute)


@pytest.mark.slow
@pytest.mark.parametrize("which", PASSES.values())
@pytest.mark.parametrize("topology", KINDS)
def test_no_other_block_sizes_of_splash_are_faster(topology, which):
    found = {}
    for blocks in _choices():
        try:
            found[blocks] = _splash(topology, which, blocks)
        except aot.CannotCompile:
            continue
    assert len(found) > 20
    blocks, call = splash.BEST[topology, which]
    assert blocks == min(found, key=lambda blocks: found[blocks][0])
    assert call == round(min(cycles for _, cycles in found.values()) / SHAPE.heads)


@pytest.mark.slow
@pytest.mark.parametrize("topology", KINDS)
def test_two_backward_kernels_of_splash_are_slower_than_one(topology):
    one, _ = _splash(topology, "fused", splash.BEST[topology, "fused"][0])
    for blocks in (
        splash.Blocks(q=512, k=512, compute=512),
        splash.Blocks(q=1024, k=1024, compute=1024),
    ):
        two = [_splash(topology, which, blocks)[0] for which in ("by_queries", "by_keys")]
        assert sum(two) > 1.4 * one

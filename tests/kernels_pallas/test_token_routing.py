"""Every implementation against float64 loops, finite differences and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import STRICT
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.token_routing import TokenRoutingConfig, gather_tokens, scatter_add_tokens

B, T, C, D = 3, 32, 20, 128
# Blocks of 16 slots, so that words and repeated tokens straddle them.
TPU = TokenRoutingConfig(block_slots=16, block_tokens=16, interpret=True)
IMPLS = [("ref", None), ("xla", None), ("tpu", TPU)]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


def _arrays(shape=(B, T, C, D), dtypes=("float32", "float32"), counts=None, repeat=False, seed=0):
    """Tokens, results, gates, index, count, and a cotangent for each of the two operations."""
    batch, length, slots, width = shape
    rng = np.random.default_rng(seed)
    if counts is None:
        counts = [(slots, 0, slots - 3)[row % 3] for row in range(batch)]
    index = np.stack(
        [np.sort(rng.choice(length, slots, replace=repeat)) for _ in range(batch)]
    ).astype(np.int32)
    count = np.asarray(counts, np.int32)
    unused = np.arange(slots)[None, :] >= count[:, None]
    index[unused] = rng.integers(-100, 100, unused.sum())

    def normal(dtype, *shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    tokens, rows = (batch, length, width), (batch, slots, width)
    return (
        normal(dtypes[0], *tokens),
        jnp.where(unused[:, :, None], jnp.nan, normal(dtypes[1], *rows)),
        jnp.where(unused, jnp.nan, normal("float32", batch, slots)),
        jnp.asarray(index),
        jnp.asarray(count),
        jnp.where(unused[:, :, None], jnp.nan, normal(dtypes[1], *rows)),
        normal(dtypes[0], *tokens),
    )


@functools.partial(jax.jit, static_argnames=("impl", "config"))
def _both(x, y, gate, index, count, by_rows, by_tokens, *, impl, config):
    """Both operations and their gradients."""

    def gather(x):
        return gather_tokens(x=x, index=index, count=count, dtype=y.dtype, impl=impl, config=config)

    def scatter(residual, y, gate):
        return scatter_add_tokens(
            residual=residual, y=y, gate=gate, index=index, count=count, impl=impl, config=config
        )

    rows, gather_back = jax.vjp(gather, x)
    added, scatter_back = jax.vjp(scatter, x, y, gate)
    return rows, *gather_back(by_rows), added, *scatter_back(by_tokens)


def _loop(x, y, gate, index, count, by_rows, by_tokens):
    """The same in float64, one slot at a time."""
    x, y, gate, by_rows, by_tokens = (
        np.asarray(array.astype(jnp.float32), np.float64)
        for array in (x, y, gate, by_rows, by_tokens)
    )
    rows, x_gradient, added = np.zeros(y.shape), np.zeros(x.shape), x.copy()
    y_gradient, gate_gradient = np.zeros(y.shape), np.zeros(gate.shape)
    for b in range(len(x)):
        for c in range(int(count[b])):
            t = int(index[b, c])
            rows[b, c] = x[b, t]
            x_gradient[b, t] += by_rows[b, c]
            added[b, t] += gate[b, c] * y[b, c]
            y_gradient[b, c] = gate[b, c] * by_tokens[b, t]
            gate_gradient[b, c] = y[b, c] @ by_tokens[b, t]
    return rows, x_gradient, added, by_tokens, y_gradient, gate_gradient


def _check(arrays, impl, config):
    out = _both(*arrays, impl=impl, config=config)
    x, y = arrays[:2]
    dtypes = (y.dtype, x.dtype, x.dtype, x.dtype, y.dtype, jnp.float32)
    for ours, expected, dtype in zip(out, _loop(*arrays), dtypes, strict=True):
        assert ours.dtype == dtype
        tolerance = TOLERANCE[dtype.name if hasattr(dtype, "name") else "float32"]
        scale = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=tolerance * scale)
    return out


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize(("impl", "config"), IMPLS)
def test_values_and_gradients_equal_float64_loops(impl, config, dtypes, repeat):
    _check(_arrays(dtypes=dtypes, repeat=repeat), impl, config)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize(("impl", "config"), IMPLS)
def test_the_cast_is_part_of_the_operation(impl, config, dtypes):
    _check(_arrays(dtypes=dtypes), impl, config)


@pytest.mark.parametrize(
    ("shape", "counts", "dtype"),
    [
        ((2, 16, 16, 128), [16, 15], "bfloat16"),  # C = T
        ((1, 16, 1, 128), [1], "float32"),
        ((2, 34, 33, 72), [33, 17], "float32"),  # no size is one of a tile
        ((2, 34, 33, 72), [33, 17], "bfloat16"),
        ((2, 48, 40, 128), [1, 33], "bfloat16"),  # a block without a token
    ],
)
def test_edges(shape, counts, dtype):
    arrays = _arrays(shape, (dtype, dtype), counts)
    for impl, config in IMPLS:
        _check(arrays, impl, config)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_index_and_count(data):
    # Few shapes, for few compilations.
    length, slots, dtype = data.draw(
        st.sampled_from([(24, 20, "bfloat16"), (40, 33, "float32"), (6, 40, "bfloat16")])
    )
    repeat = slots > length or data.draw(st.booleans())
    counts = data.draw(st.lists(st.integers(0, slots), min_size=2, max_size=2))
    seed = data.draw(st.integers(0, 1000))
    arrays = _arrays((2, length, slots, 8), (dtype, dtype), counts, repeat, seed)
    for impl, config in IMPLS:
        _check(arrays, impl, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_neither_race_nor_read_what_nobody_wrote(dtype):
    arrays = _arrays((1, 32, 20, 128), (dtype, dtype), [19], repeat=True)
    # One token in the last slots of a block and the first of the next.
    index = arrays[3].at[0, 13:18].set(arrays[3][0, 13])
    arrays = (*arrays[:3], index, *arrays[4:])
    config = TokenRoutingConfig(block_slots=16, block_tokens=16, interpret=STRICT)
    raced = []
    gather = functools.partial(gather_tokens, index=arrays[3], count=arrays[4], impl="tpu")
    scatter = functools.partial(
        scatter_add_tokens, index=arrays[3], count=arrays[4], impl="tpu", config=config
    )
    expected = _loop(*arrays)
    rows, back = jax.vjp(lambda x: gather(x=x, config=config), arrays[0])
    raced.append(interpreter.races.races_found)
    (x_gradient,) = back(arrays[5])
    raced.append(interpreter.races.races_found)
    added, back = jax.vjp(lambda r, y, g: scatter(residual=r, y=y, gate=g), *arrays[:3])
    raced.append(interpreter.races.races_found)
    gradients = back(arrays[6])
    raced.append(interpreter.races.races_found)
    assert raced == [False] * 4
    for ours, other in zip((rows, x_gradient, added, *gradients), expected, strict=True):
        tolerance = TOLERANCE[ours.dtype.name] * max(1.0, np.abs(other).max())
        np.testing.assert_allclose(ours.astype(jnp.float32), other, atol=tolerance)


def test_the_race_detector_sees_two_blocks_that_meet():
    """An index that is not sorted is such a race, so the test above could fail."""
    x, y, gate, _, _, _, _ = _arrays((1, 32, 32, 128), counts=[32])
    index = jnp.concatenate([jnp.arange(16), jnp.arange(16)])[None].astype(jnp.int32)
    config = TokenRoutingConfig(block_slots=16, interpret=STRICT)
    scatter = functools.partial(scatter_add_tokens, impl="tpu", config=config)
    try:
        scatter(residual=x, y=y, gate=gate, index=index, count=jnp.array([32]))
        seen = interpreter.races.races_found
    except jax.errors.JaxRuntimeError as error:  # so says jax 0.12
        seen = "RACE DETECTED" in str(error)
        pltpu.reset_tpu_interpret_mode_state()
    assert seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_words_that_are_named_are_copied(dtype, copied):
    length, slots, width = 96, 64, 128
    arrays = _arrays((1, length, slots, width), (dtype, dtype), [slots])
    index = np.asarray(arrays[3])[0]
    packing = 4 // arrays[0].dtype.itemsize
    words = len(np.unique(index // packing))
    # What one block has in common with the one before.
    shared = int(np.sum(index[16::16] // packing == index[15:-1:16] // packing))
    config = TokenRoutingConfig(block_slots=16, interpret=pltpu.InterpretParams())
    gather_tokens(x=arrays[0], index=arrays[3], count=arrays[4], impl="tpu", config=config)
    assert sum(copied) == (words + shared) * width * 4
    copied.clear()
    scatter_add_tokens(
        residual=arrays[0],
        y=arrays[1],
        gate=arrays[2],
        index=arrays[3],
        count=arrays[4],
        impl="tpu",
        config=config,
    )
    assert sum(copied) == (2 * words + shared) * width * 4
    if dtype == "float32":
        assert (words, shared) == (slots, 0)


@pytest.mark.parametrize(("impl", "config"), IMPLS)
def test_rows_that_are_not_named_keep_their_bits(impl, config):
    for dtype, bits in (("float32", jnp.uint32), ("bfloat16", jnp.uint16)):
        x, y, gate, index, count, _, _ = _arrays(dtypes=(dtype, dtype))
        x = x.at[:, :, 0].set(-0.0).at[:, :, 1].set(jnp.inf).at[:, :, 2].set(1e-40)
        out = scatter_add_tokens(
            residual=x, y=y, gate=gate, index=index, count=count, impl=impl, config=config
        )
        before, after = (
            np.asarray(jax.lax.bitcast_convert_type(array, bits)) for array in (x, out)
        )
        for b in range(B):
            others = np.setdiff1d(np.arange(T), index[b, : int(count[b])])
            assert len(others) >= T - C
            np.testing.assert_array_equal(after[b, others], before[b, others])


@pytest.mark.parametrize(("impl", "config"), IMPLS)
def test_the_two_are_adjoint_and_conserve_what_they_move(impl, config):
    x, y, gate, index, count, _, _ = _arrays(repeat=True)
    run = functools.partial(scatter_add_tokens, index=index, count=count, impl=impl, config=config)
    rows = gather_tokens(x=x, index=index, count=count, impl=impl, config=config)
    valid = np.arange(C)[None, :] < np.asarray(count)[:, None]
    zeros, ones = jnp.zeros_like(x), jnp.ones_like(gate)
    added = run(residual=zeros, y=y, gate=ones)
    used = np.where(valid[:, :, None], y, 0.0).astype(np.float64)
    there = np.sum(np.asarray(rows, np.float64) * used)
    back = np.sum(np.asarray(x, np.float64) * np.asarray(added, np.float64))
    np.testing.assert_allclose(there, back, rtol=1e-6)
    gated = run(residual=zeros, y=y, gate=gate)
    moved = np.sum(np.where(valid, gate, 0.0)[:, :, None] * used, axis=1)
    np.testing.assert_allclose(np.sum(np.asarray(gated, np.float64), axis=1), moved, atol=1e-4)


@pytest.mark.parametrize(("impl", "config"), IMPLS)
def test_what_is_gathered_returns_to_its_place(impl, config):
    """The card's gate algebra: a block that does nothing leaves ``1 + gate`` times its row."""
    x, _, _, index, count, _, _ = _arrays()
    rows = gather_tokens(x=x, index=index, count=count, impl=impl, config=config)
    out = scatter_add_tokens(
        residual=x,
        y=rows,
        gate=jnp.full((B, C), 0.05),
        index=index,
        count=count,
        impl=impl,
        config=config,
    )
    expected = np.asarray(x).copy()
    for b in range(B):
        expected[b, index[b, : int(count[b])]] *= 1.05
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize(("impl", "config"), IMPLS)
def test_gate_and_result_gradients_equal_finite_differences(impl, config):
    arrays = _arrays((1, 8, 5, 8), counts=[4])
    x, y, gate, index, count, _, by = arrays
    _, _, _, _, y_gradient, gate_gradient = _both(*arrays, impl=impl, config=config)

    def loss(y, gate):
        added = _loop(x, y, gate, index, count, arrays[5], by)[2]
        return np.sum(added * np.asarray(by, np.float64))

    def slope(which, at, step=1e-2):
        ends = []
        for sign in (1, -1):
            moved = [y, gate]
            moved[which] = moved[which].at[at].add(sign * step)
            width = np.float64(moved[which][at]) - np.float64((y, gate)[which][at])
            ends.append((loss(*moved), width))
        # The function is linear in each, so the step's own rounding is all there is to mind.
        return (ends[0][0] - ends[1][0]) / (ends[0][1] - ends[1][1])

    for c in range(5):
        expected = slope(1, (0, c)) if c < 4 else 0.0
        np.testing.assert_allclose(gate_gradient[0, c], expected, rtol=1e-5, atol=1e-6)
    for at in [(0, 0, 3), (0, 3, 7), (0, 2, 0)]:
        np.testing.assert_allclose(y_gradient[at], slope(0, at), rtol=1e-5, atol=1e-6)


def test_ref_takes_any_order():
    arrays = _arrays(counts=[C] * B)
    order = np.random.default_rng(1).permutation(C)
    shuffled = [a if i in (0, 4, 6) else a[:, order] for i, a in enumerate(arrays)]
    _check(shuffled, "ref", None)


def test_why_the_kernel_cannot_run_is_said():
    x, _, _, index, count, _, _ = _arrays()
    with pytest.raises(ValueError, match="needs a TPU"):
        gather_tokens(x=x, index=index, count=count, impl="tpu")
    odd = jnp.zeros((B, T + 1, D), jnp.bfloat16)
    with pytest.raises(ValueError, match="a length of 33 is odd"):
        gather_tokens(x=odd, index=index, count=count, impl="tpu", config=TPU)
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        gather_tokens(x=x.astype(jnp.float16), index=index, count=count, impl="tpu", config=TPU)
    wide = jnp.zeros((B, 2, 2**14 + 128))
    with pytest.raises(ValueError, match="a width of 16512 is over 16384"):
        gather_tokens(x=wide, index=index, count=count, impl="tpu", config=TPU)


def test_another_count_compiles_nothing():
    x, y, gate, index, count, by_rows, by_tokens = _arrays()
    _both.clear_cache()
    for fewer in (0, 1):
        fewer = fewer * jnp.array([1, 0, 1])
        _both(x, y, gate, index, count - fewer, by_rows, by_tokens, impl=None, config=None)
    assert _both._cache_size() == 1

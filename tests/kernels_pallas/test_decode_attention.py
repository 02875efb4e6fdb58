"""Attention over a cache: every implementation against loops, and what must not change it."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from caches import BATCH, CASES, case
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.decode_attention import (
    NOTHING,
    DecodeAttentionConfig,
    decode_attention,
    merge_partial,
    partial_decode_attention,
    xla,
)

KERNEL = DecodeAttentionConfig(block=16, interpret=True)
CONFIGS = {"ref": None, "xla": DecodeAttentionConfig(block=16), "tpu": KERNEL}
STATIC = ("scale", "softcap", "rule", "unit", "impl", "config")
partial = jax.jit(partial_decode_attention, static_argnames=STATIC)
cases = functools.cache(lambda name: case(**CASES[name]))


def _run(made, impl, config=None, **changes):
    arrays = made.arrays | changes
    return partial(**arrays, **made.options, impl=impl, config=config or CONFIGS[impl])


def _assert_equal(ours, expected, atol=2e-6):
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", CONFIGS)
def test_it_is_what_loops_say_and_no_unseen_slot_matters(impl, name):
    made = cases(name)
    ours = _run(made, impl)
    assert ours[0].dtype == ours[1].dtype == jnp.float32
    _assert_equal(ours, (made.out, made.log_sum_exp))
    # The empty row, and a list of nothing: exactly.
    unseen = made.log_sum_exp == NOTHING
    assert unseen.any() and not unseen.all()
    assert not np.any(np.asarray(ours[0])[unseen])
    assert np.all(np.asarray(ours[1])[unseen] == np.float32(NOTHING))


@pytest.mark.parametrize("name", ["ring-window", "paged-tree", "tokens", "pages"])
@pytest.mark.parametrize("impl", CONFIGS)
def test_bfloat16_rounds_only_probabilities_and_results(impl, name):
    made = case(**CASES[name], dtype="bfloat16")
    out, log_sum_exp = _run(made, impl)
    assert out.dtype == jnp.bfloat16 and log_sum_exp.dtype == jnp.float32
    _assert_equal([out], [made.out], 0.02)
    _assert_equal([log_sum_exp], [made.log_sum_exp], 1e-5)


@pytest.mark.parametrize("impl", ["xla", "tpu"])
@settings(max_examples=5, deadline=None)
@given(
    layout=st.sampled_from(["contiguous", "ring", "segments", "paged"]),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.integers(1, 3),
    queries=st.integers(1, 4),
    pages=st.integers(1, 5),
    lists=st.sampled_from([None, "shared", "heads"]),
    unit=st.sampled_from([1, 8]),
    count=st.integers(1, 20),
    block=st.sampled_from([8, 24, 128]),
    seed=st.integers(0, 9),
)
def test_any_shape_length_and_selection(
    impl, layout, kv_heads, group, queries, pages, lists, unit, count, block, seed
):
    made = case(
        layout, heads=group * kv_heads, kv_heads=kv_heads, queries=queries, slots=8 * pages, page=8,
        lists=lists, unit=unit, count=min(count, 8 * pages // unit), seed=seed,
    )  # fmt: skip
    config = DecodeAttentionConfig(block=block, interpret=impl == "tpu")
    _assert_equal(_run(made, impl, config), (made.out, made.log_sum_exp))


@pytest.mark.parametrize("impl", CONFIGS)
def test_units_and_blocks_that_do_not_fill_a_row(impl):
    """For the kernel, units that fill up pages, and blocks that do not."""
    sizes = {"slots": 40, "unit": 8, "count": 3} if impl == "tpu" else {"slots": 37, "unit": 5}
    made = case(lists="heads", queries=2, **sizes)
    _assert_equal(_run(made, impl), (made.out, made.log_sum_exp))
    made = case(queries=2, slots=sizes["slots"])
    config = DecodeAttentionConfig(block=24, interpret=impl == "tpu")
    _assert_equal(_run(made, impl, config), (made.out, made.log_sum_exp))


@pytest.mark.parametrize("impl", CONFIGS)
def test_a_last_ragged_unit_is_a_unit(impl):
    made = case(slots=48)
    run = functools.partial(
        partial, **made.arrays, **made.options | {"unit": 20}, impl=impl, config=CONFIGS[impl],
        selected=jnp.full((BATCH, 1, 1), 2),
    )  # fmt: skip
    if impl == "tpu":
        with pytest.raises(ValueError, match="units of 20 slots are neither 1 nor 8s that fill"):
            run()
        return
    tail = made.arrays | {"mask": jnp.broadcast_to(jnp.arange(48) >= 40, (BATCH, 1, 48))}
    _assert_equal(run(), partial(**tail, **made.options, impl="ref"))


@pytest.mark.parametrize("impl", CONFIGS)
def test_slots_may_lie_in_any_order(impl):
    made = case("ring", queries=2, window=20)
    order = np.random.default_rng(1).permutation(48)
    moved = {name: made.arrays[name][:, :, order] for name in "kv"}
    moved["kv_positions"] = made.arrays["kv_positions"][:, order]
    _assert_equal(_run(made, impl, **moved), _run(made, impl))


@pytest.mark.parametrize("impl", CONFIGS)
def test_pages_and_one_piece_are_the_same(impl):
    """On a ragged prefix, whatever pages hold behind it; rows share a page."""
    made = case("contiguous", queries=2)
    arrays = made.arrays | {"lengths": jnp.asarray([48, 31, 5])}
    rng = np.random.default_rng(0)
    k, v = (np.array(arrays[name]) for name in "kv")
    for pool in (k, v):
        pool[...] = rng.normal(size=pool.shape)
        pool[2, :, :16] = pool[1, :, :16]
    table = rng.permutation(10)[:9].reshape(3, 3)
    table[2, 0] = table[1, 0]
    paged = [np.full((10, 2, 16, 8), np.nan, np.float32) for _ in "kv"]
    for b, n in np.ndindex(table.shape):
        for pool, rows in zip(paged, (k, v), strict=True):
            pool[table[b, n]] = rows[b, :, 16 * n : 16 * (n + 1)]
    arrays |= {"q_positions": jnp.asarray([[46, 47], [29, 30], [3, 4]])}
    run = functools.partial(partial, **made.options, impl=impl, config=CONFIGS[impl])
    whole = run(**arrays | {"k": jnp.asarray(k), "v": jnp.asarray(v)})
    pool = {"k": jnp.asarray(paged[0]), "v": jnp.asarray(paged[1]), "pages": jnp.asarray(table)}
    _assert_equal(run(**arrays | pool), whole, 1e-6)
    assert not np.any(np.asarray(whole[1]) == NOTHING)


@pytest.mark.parametrize("impl", CONFIGS)
def test_parts_merge_to_the_whole(impl):
    """Also where one part, or every part, sees nothing."""
    made = cases("four-heads-each")
    number = jnp.arange(48)[None, None]
    shape = (BATCH, 3, 48)
    parts = [
        _run(made, impl, mask=jnp.broadcast_to(number // 20 == part, shape)) for part in range(3)
    ]
    assert np.any(np.asarray(parts[2][1]) == NOTHING)
    out, log_sum_exp = merge_partial(*map(jnp.stack, zip(*parts, strict=True)))
    _assert_equal((out, log_sum_exp), (made.out, made.log_sum_exp))


def _vectors(made):
    """What is differentiated, and the rest of the arrays."""
    return (
        {key: made.arrays[key] for key in "qkv"},
        {key: x for key, x in made.arrays.items() if key not in "qkv"},
    )


@pytest.mark.parametrize("name", ["four-heads-each", "segments", "paged", "tokens", "pages"])
def test_gradients_agree_and_are_finite_where_unseen_slots_are_nan(name):
    made = cases(name)
    vectors, others = _vectors(made)
    shapes = made.out.shape, made.log_sum_exp.shape
    keys = jax.random.split(jax.random.key(0))
    cotangents = tuple(map(jax.random.normal, keys, shapes))

    @functools.partial(jax.jit, static_argnames="impl")
    def pull(vectors, impl):
        def run(vectors):
            return partial(**vectors, **others, **made.options, impl=impl, config=CONFIGS[impl])

        return jax.vjp(run, vectors)[1](cotangents)[0]

    ours, expected = (jax.tree.leaves(pull(vectors, impl)) for impl in ("xla", "ref"))
    assert all(np.all(np.isfinite(x)) for x in ours)
    assert all(np.any(x) for x in ours)
    _assert_equal(ours, expected, 1e-5)


def test_the_gradient_is_that_of_finite_differences():
    made = cases("tokens")
    vectors, others = _vectors(made)

    def out(vectors):
        vectors = jax.tree.map(jnp.asarray, vectors)
        return partial(**vectors, **others, **made.options, impl="ref")

    vectors = jax.tree.map(jnp.nan_to_num, vectors)
    jax.test_util.check_grads(out, (vectors,), 1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_blocks_that_nobody_sees_are_passed_over(monkeypatch):
    """Counted as they run: the lengths decide, in one program."""
    ran = []
    scores = xla._scores

    def counted(*arguments):
        jax.debug.callback(lambda: ran.append(1))
        return scores(*arguments)

    monkeypatch.setattr(xla, "_scores", counted)
    made = case(slots=64)
    run = jax.jit(
        functools.partial(
            partial_decode_attention, **made.options, impl="xla", config=CONFIGS["xla"]
        )
    )
    for longest, blocks in ((0, 0), (1, 1), (16, 1), (17, 2), (64, 4)):
        ran.clear()
        lengths = jnp.asarray([longest, 0, longest // 2])
        jax.block_until_ready(
            run(**made.arrays | {"lengths": lengths, "q_positions": lengths[:, None]})
        )
        jax.effects_barrier()
        assert len(ran) == blocks
    assert run._cache_size() == 1


@pytest.mark.parametrize("impl", CONFIGS)
def test_huge_scores_do_not_overflow(impl):
    made = cases("one-head-each")
    out, log_sum_exp = _run(made, impl, q=made.arrays["q"] * 1e4)
    expected = _run(made, "ref", q=made.arrays["q"] * 1e4)
    assert np.all(np.isfinite(out)) and float(jnp.max(log_sum_exp)) > 1e3
    np.testing.assert_allclose(out, expected[0], atol=1e-3)


def test_what_contradicts_itself_is_said(unchecked):
    made = cases("tokens")
    arrays, options = made.arrays, made.options
    wrong = {
        "3 query heads are not a multiple of 2": {"q": arrays["q"][:, :, :3]},
        "differ in shape": {"v": arrays["v"][:, :, :8]},
        "2 rows of keys for 3 rows of queries": {"k": arrays["k"][:2], "v": arrays["v"][:2]},
        "selected has 3 lists a row; give 1, or 2": {"selected": jnp.zeros((3, 3, 5), int)},
        r"positions is \(3, 47\) for 3 rows of 48 slots": {"kv_positions": jnp.zeros((3, 47), int)},
        r"mask is \(3, 1, 48\) for \(3, 2\) queries": {"mask": jnp.ones((3, 1, 48), bool)},
        "unit is 0": {"unit": 0},
    }  # fmt: skip
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            decode_attention(**arrays | options | change)

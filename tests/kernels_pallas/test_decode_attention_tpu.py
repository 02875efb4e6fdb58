"""The kernels of decode attention: interpreted strictly, their bytes counted, compiled for TPUs."""

import functools
import itertools
import re

import jax
import jax._src.pallas.mosaic.interpret.interpret_pallas_call as interpreter
import jax.numpy as jnp
import numpy as np
import pytest
from caches import BATCH, CASES, case
from interpreting import STRICT
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import aot
from kernels_pallas.common.schedule import schedules
from kernels_pallas.decode_attention import (
    NOTHING,
    DecodeAttentionConfig,
    decode_attention,
    partial_decode_attention,
    plan,
    token_scores,
)
from kernels_pallas.decode_attention.specs import TPU_SHAPES, arguments

STATIC = ("scale", "softcap", "rule", "impl", "config")
partial = jax.jit(partial_decode_attention, static_argnames=(*STATIC, "unit"))
scores = jax.jit(token_scores, static_argnames=(*STATIC, "per_head"))


def _kernel(interpret=True, block=16, **sizes):
    return DecodeAttentionConfig(block=block, interpret=interpret, **sizes)


def _attend(made, config, **changes):
    return partial(**made.arrays | changes, **made.options, impl="tpu", config=config)


def _assert_equal(ours, expected, atol=2e-6):
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("ring-window", "bfloat16"),
        ("paged-tree", "float32"),
        ("tokens", "bfloat16"),
        ("shared-tokens", "float32"),
        ("pages", "bfloat16"),
    ],
)
def test_nothing_races_and_nothing_unwritten_is_read(name, dtype):
    made = case(**CASES[name], dtype=dtype)
    exact = dtype == "float32"
    ours = jax.block_until_ready(_attend(made, _kernel(STRICT)))
    assert interpreter.races is not None and not interpreter.races.races_found
    _assert_equal(ours, (made.out, made.log_sum_exp), 2e-6 if exact else 0.02)
    if "selected" in made.arrays:  # other slots are NaN
        return
    votes = jax.block_until_ready(
        scores(**made.for_scores, per_head=True, impl="tpu", config=_kernel(STRICT))
    )
    assert not interpreter.races.races_found
    _assert_equal([votes], [made.votes])


@pytest.mark.parametrize("name", ["four-heads-each", "paged", "tokens", "pages"])
@pytest.mark.parametrize("split", [2, 3])
def test_parts_of_a_row_merge_to_the_whole(name, split):
    """More parts than a short row has blocks; rows and lists that see nothing."""
    made = case(**CASES[name])
    ours = _attend(made, _kernel(split=split))
    _assert_equal(ours, (made.out, made.log_sum_exp))
    unseen = made.log_sum_exp == NOTHING
    assert np.all(np.asarray(ours[1])[unseen] == np.float32(NOTHING))
    assert not np.any(np.asarray(ours[0])[unseen])


def test_whole_lanes_and_groups_of_heads():
    """Sizes as on hardware; 3 lists of scores at a time would not fit, so 6 heads go one by one."""
    made = case(
        "paged", slots=512, width=256, heads=6, kv_heads=6, page=32, lists="shared", count=70
    )
    _assert_equal(_attend(made, _kernel(block=256)), (made.out, made.log_sum_exp), 3e-6)


COUNTED = _kernel(pltpu.InterpretParams(), block=32)
WIDTH = 128


def _large(dtype="bfloat16", page=None, heads=4):
    """Three rows of 128 slots, all filled, with 4 key heads."""
    made = case(
        "contiguous" if page is None else "paged", dtype=dtype, heads=heads, kv_heads=4,
        width=WIDTH, slots=128, page=page or 16,
    )  # fmt: skip
    finite = {name: jnp.nan_to_num(made.arrays[name]) for name in "kv"}
    number = jnp.arange(BATCH * 8).reshape(BATCH, 8)
    return made, finite | ({} if page is None else {"pages": number})


@pytest.mark.parametrize("page", [None, 16], ids=["contiguous", "paged"])
def test_what_is_read_ends_with_the_length(page, copied):
    """Blocks of 32 slots in one piece, or pages of 16: those that hold something, once."""
    made, finite = _large(page=page)
    piece, entry = page or 32, 4 * WIDTH * 2
    for lengths in ([128, 128, 128], [128, 33, 1], [0, 0, 17], [0, 0, 0]):
        copied.clear()
        options = {"lengths": jnp.asarray(lengths), "q_positions": jnp.full((3, 1), 127)}
        jax.block_until_ready(_attend(made, COUNTED, **finite, **options))
        slots = sum(-(-length // piece) * piece for length in lengths)
        masks = sum(max(1, -(-length // 32)) * 32 * 4 for length in lengths)
        assert sum(copied) == 2 * slots * entry + masks
        # The masks, of every copy that computes anything.
        assert not slots or masks <= 0.05 * 2 * slots * entry
        copied.clear()
        finite_k = {"k": finite["k"]} | {key: finite[key] for key in finite if key == "pages"}
        jax.block_until_ready(
            scores(**made.for_scores | finite_k | options, impl="tpu", config=COUNTED)
        )
        assert sum(copied) == slots * entry + masks


def test_windows_and_segments_read_what_they_show(copied):
    """A window of 20 of 128 slots lies in two blocks of 32."""
    made, finite = _large()
    shown = jnp.broadcast_to((jnp.arange(128) >= 50) & (jnp.arange(128) < 70), (3, 1, 128))
    options = {"lengths": jnp.full(3, 128), "q_positions": jnp.full((3, 1), 127), "mask": shown}
    jax.block_until_ready(_attend(made, COUNTED, **finite, **options))
    assert sum(copied) == 3 * 2 * 32 * (2 * 4 * WIDTH * 2 + 4)


@pytest.mark.parametrize(("page", "lists"), [(None, 4), (16, 1)], ids=["contiguous", "paged"])
def test_selected_pages_are_read_once_and_nothing_else(lists, page, copied):
    made, finite = _large(page=page)
    rng = np.random.default_rng(0)
    selected = np.stack([rng.permutation(8)[:4] for _ in range(3 * lists)]).reshape(3, lists, 4)
    options = {"lengths": jnp.full(3, 128), "q_positions": jnp.full((3, 1), 127)}
    arrays = made.arrays | finite | options
    run = functools.partial(
        partial, **arrays, **made.options | {"unit": 16}, impl="tpu", config=COUNTED
    )
    jax.block_until_ready(run(selected=jnp.asarray(selected)))
    must = 3 * 4 * 4 * 16 * 2 * WIDTH * 2
    assert must < sum(copied) <= 1.05 * must
    # Once, however often it is named.
    once = sum(copied)
    copied.clear()
    jax.block_until_ready(run(selected=jnp.asarray(np.concatenate([selected] * 2, axis=2))))
    assert sum(copied) <= once + 2 * 3 * lists * 32 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_selected_tokens_are_read_in_words(dtype, copied):
    """A float32 token alone; a bfloat16 one with its neighbour, once if both are selected."""
    made, finite = _large(dtype)
    rng = np.random.default_rng(0)
    selected = np.stack([rng.permutation(128)[:20] for _ in range(12)]).reshape(3, 4, 20)
    together = 4 // jnp.dtype(dtype).itemsize
    words = sum(len(np.unique(row // together)) for row in selected.reshape(12, 20))
    options = {"lengths": jnp.full(3, 128), "q_positions": jnp.full((3, 1), 127)}
    jax.block_until_ready(
        _attend(made, COUNTED, **finite, **options, selected=jnp.asarray(selected))
    )
    per_block = 32 // together
    masks = 12 * -(-20 // per_block) * 32 * 4
    assert sum(copied) == words * 2 * WIDTH * 4 + masks
    if dtype == "float32":
        assert words == 12 * 20 and masks <= 0.05 * words * 2 * WIDTH * 4


def test_differentiating_a_kernel_names_the_remedy():
    made = case("contiguous")

    def out(q, run, keys, **options):
        arrays = {key: x for key, x in made.arrays.items() if key in keys}
        return jnp.sum(run(**arrays | {"q": q}, **options, scale=1.0, impl="tpu", config=_kernel()))

    attend = functools.partial(out, run=decode_attention, keys=("k", "v", "q_positions", "lengths"))
    vote = functools.partial(out, run=token_scores, keys=("k", "q_positions", "lengths"))
    for function in (attend, vote):
        for derive in (jax.grad(function), lambda q, f=function: jax.jvp(f, (q,), (q,))):
            with pytest.raises(NotImplementedError, match="forward only; differentiate it with"):
                derive(made.arrays["q"])


def test_what_cannot_run_is_said(unchecked):
    made = case("contiguous")
    vectors = {key: made.arrays[key] for key in "qkv"}
    halves = {"k": vectors["k"].astype(jnp.bfloat16)}
    many = {"q": jnp.zeros((3, 32, 4, 8)), "q_positions": jnp.zeros((3, 32), int)}
    odd = {key: vectors[key][:, :, :44] for key in "kv"}
    lists = {"selected": jnp.zeros((3, 2, 1 << 16), int)}
    for message, change in {
        "not float32, bfloat16, float32": halves,
        "32 queries of a row are more than 31": many,
        "44 slots in one piece are not a multiple of 8": odd,
        "131072 units of a row overflow the scalar memory": lists,
    }.items():
        with pytest.raises(ValueError, match=message):
            _attend(made, _kernel(), **change)
    with pytest.raises(ValueError, match="needs a TPU"):
        decode_attention(**made.arrays, scale=1.0, impl="tpu")
    long = {"k": jnp.zeros((3, 2, 1 << 18, 8)), "q_positions": made.arrays["q_positions"]}
    with pytest.raises(ValueError, match="the scores of 262144 slots do not fit"):
        token_scores(**long, q=vectors["q"], scale=1.0, impl="tpu", config=_kernel(block=1024))


# Both dtypes of every shape, every generation in both dtypes; those in float32 are the long tail.
COMPILED = list(
    itertools.islice(
        zip(
            itertools.cycle((s, d) for d in ("bfloat16", "float32") for s in TPU_SHAPES),
            itertools.cycle(aot.TPUS),
            strict=False,
        ),
        2 * len(TPU_SHAPES),
    )
)


def _compiled(name, dtype, topology):
    """Both operations, as a TPU chooses them."""
    shape = TPU_SHAPES[name]

    def both(arrays):
        kept = {key: x for key, x in arrays.items() if key not in ("v", "selected")}
        return (
            decode_attention(**arrays, unit=shape.unit, scale=0.1),
            token_scores(**kept, scale=0.1),
        )

    return aot.compile_tpu(both, arguments(shape, dtype), topology=aot.TPUS[topology])


@pytest.mark.parametrize(
    ("name", "dtype", "topology"),
    [
        pytest.param(*case, topology, marks=pytest.mark.slow if case[1] == "float32" else ())
        for case, topology in COMPILED
    ],
    ids=[f"{topology}-{dtype}-{name}" for (name, dtype), topology in COMPILED],
)
def test_both_compile_and_a_cache_of_whole_lanes_is_not_copied(name, dtype, topology):
    compiled = _compiled(name, dtype, topology)
    text = compiled.as_text()
    assert set(re.findall(r"(\w+)\)*/pallas_call", text)) == {"decode_attention", "token_scores"}
    shape = TPU_SHAPES[name]
    pool = ",".join(map(str, arguments(shape, dtype)["k"].shape))
    copies = re.search(rf"= \S*\[{pool}\]\S* (copy|transpose|fusion)\(", text)
    # So the expression finds copies: a narrow head lies otherwise outside of a program.
    assert (copies is not None) == (shape.width % 128 != 0)


@pytest.mark.parametrize("flat", [True, False])
def test_a_loop_that_writes_flat_rows_does_not_copy_its_cache(flat):
    """Another way to write makes the compiler hold the cache slots first, against the kernel."""
    shape = TPU_SHAPES["tpu-32k"]
    arrays = arguments(shape, "bfloat16")
    rows = jnp.arange(shape.batch * shape.kv_heads) * shape.slots

    def write(pool, new, n):
        if not flat:
            return pool.at[jnp.arange(shape.batch), :, n].set(new)
        new = new.reshape(-1, shape.width)
        return pool.reshape(-1, shape.width).at[rows + n].set(new).reshape(pool.shape)

    def decode(q, k, v):
        def step(n, carry):
            q, *pools = carry
            k, v = (write(pool, q[:, 0, : shape.kv_heads], n) for pool in pools)
            at = jnp.full((shape.batch, 1), n)
            q = decode_attention(q=q, k=k, v=v, q_positions=at, lengths=at[:, 0] + 1, scale=0.1)
            return q, k, v

        return jax.lax.fori_loop(0, 8, step, (q, k, v))[0]

    text = aot.compile_tpu(decode, arrays["q"], arrays["k"], arrays["v"]).as_text()
    copies = re.findall(r"= \S*\[8,8,32768,128\]\S* (?:copy|fusion)\([^)]*\)", text)
    # The arguments, which are not given away, before the loop; and the writes themselves.
    copies = [copy for copy in copies if "copy(" in copy]
    assert (len(copies) <= 2) == flat


def test_computing_and_sending_hide_behind_reading():
    """At 1.5 GHz and 819 GB/s, a v5e reads 546 bytes a cycle; a block here has 2 MiB."""
    (found,) = schedules(
        "kernels_pallas.decode_attention.specs:program",
        shape="tpu-32k-paged", dtype="bfloat16", backward=False,
    )  # fmt: skip
    block = 2 * 8 * 512 * 128 * 2 / 546
    # Measured: 1293, a block's loop over its 8 pages aside.
    computing = sum(s.bundles for s in found.segments if s.loops == 2)
    assert 0 < computing < 1.05 * 1293 < 0.4 * block
    # Four pages a pass, two copies each; checking bounds would take 220.
    sending = [s.bundles for s in found.segments if s.loops == 3]
    assert len(sending) == 2 and max(sending) < 1.05 * 63


def test_plans_list_each_unit_that_is_seen_once():
    """By hand: 8 slots in two pages of 4, units of 2, blocks of 2 units and an empty one."""
    shown = jnp.asarray([[[1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1, 1]]], bool)
    pages = jnp.asarray([[5, 3]])
    sizes = {"page": 4, "unit": 2, "block": 4}
    made = plan.of_slots(shown, pages, **sizes, split=1)
    assert made.units.tolist() == [[[10, -1, -1, 7, -1, -1]]]
    assert made.bits.reshape(-1, 4).tolist() == [[3, 0, 0, 0], [0, 0, 2, 2], [0] * 4]
    assert (made.count.tolist(), made.order.tolist()) == ([[2]], [[[0, 1, 2]]])
    assert made.whole.tolist() == [[[0, 0, 0]]]
    made = plan.of_slots(shown.at[:, :, :4].set(False), pages, **sizes, split=2)
    assert (made.count.tolist(), made.order.tolist()) == ([[1], [1]], [[[1, 2]], [[2, 2]]])
    # Tokens 7, 6, 0, 4 (unseen), repeated, none: pairs 0 and 3.
    selected = jnp.asarray([[[7, 6, 0, 4, 7, -1, 9]]])
    made = plan.of_selected(shown, pages, selected, chosen=1, **sizes, split=1)
    listed = made.units.reshape(-1) >= 0
    assert made.units.reshape(-1)[listed].tolist() == [10, 7]
    assert made.bits.reshape(-1, 2)[listed].tolist() == [[3, 0], [2, 2]]
    assert not np.any(made.bits.reshape(-1, 2)[~listed])


@pytest.mark.parametrize("length", [5, 2048, 3000])
def test_a_look_up_is_exact(length):
    rng = np.random.default_rng(0)
    table = rng.integers(0, 2**31 - 1, (2, length, 3))
    at = rng.integers(0, length, (2, 2, 9))
    found = plan._look_up(jnp.asarray(table, jnp.int32), jnp.asarray(at, jnp.int32), 31)
    expected = np.stack([row[index] for row, index in zip(table, at, strict=True)])
    np.testing.assert_array_equal(found, expected)

"""Soft votes: every implementation against loops, and what top_k makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import BATCH, CASES, case
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.decode_attention import NOTHING, DecodeAttentionConfig, token_scores

KERNEL = DecodeAttentionConfig(block=16, interpret=True)
CONFIGS = {"ref": None, "xla": DecodeAttentionConfig(block=16), "tpu": KERNEL}
STATIC = ("scale", "softcap", "rule", "per_head", "impl", "config")
votes = jax.jit(token_scores, static_argnames=STATIC)
WHOLE = [name for name, options in CASES.items() if "lists" not in options]


def _run(arguments, impl, config=None, **changes):
    return votes(**arguments | changes, impl=impl, config=config or CONFIGS[impl])


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("impl", CONFIGS)
def test_votes_are_what_loops_say_and_no_unseen_slot_matters(impl, name):
    made = case(**CASES[name])
    each = _run(made.for_scores, impl, per_head=True)
    assert each.dtype == jnp.float32
    np.testing.assert_allclose(each, made.votes, atol=2e-6)
    together = _run(made.for_scores, impl)
    unseen = made.votes[:, 0] == NOTHING
    assert unseen.any() and not unseen.all()
    np.testing.assert_allclose(together, np.where(unseen, NOTHING, made.votes.sum(1)), atol=2e-6)
    assert np.all(np.asarray(together)[unseen] == np.float32(NOTHING))


@pytest.mark.parametrize("impl", CONFIGS)
def test_bfloat16_keys_have_float32_votes(impl):
    made = case(**CASES["ring-window"], dtype="bfloat16")
    each = _run(made.for_scores, impl, per_head=True)
    assert each.dtype == jnp.float32
    np.testing.assert_allclose(each, made.votes, atol=1e-5)


@pytest.mark.parametrize("impl", CONFIGS)
def test_a_loud_head_has_one_vote(impl):
    """Two heads of one key head, by hand; a sum of scores would take slots 0 and 1."""
    logits = jnp.asarray([[50.0, 49, 0, 0], [0, 0, 0, 5]])
    k = jnp.pad(logits.T, ((0, 4), (0, 6)))[None, None]
    q = jnp.pad(jnp.eye(2), ((0, 0), (0, 6)))[None, None]
    arrays = {"q": q, "k": k, "q_positions": jnp.asarray([[7]]), "lengths": jnp.asarray([4])}
    found = _run(arrays | {"scale": 1.0}, impl)[0]
    np.testing.assert_allclose(found[:4], [0.7377, 0.2755, 0.0066, 0.9802], atol=1e-4)
    assert set(jax.lax.top_k(found, 2)[1].tolist()) == {0, 3}


@pytest.mark.parametrize("impl", CONFIGS)
def test_top_k_takes_a_seen_slot_first_however_small_its_vote(impl):
    """Votes that underflow to zero, and slots behind a sink and before a window."""
    made = case("contiguous")
    candidates = jnp.zeros((BATCH, 48), int).at[:, 5:20].set(1)
    k = jnp.nan_to_num(made.arrays["k"]).at[:, :, 6].set(1e3)
    arguments = made.for_scores | {"k": k, "q": jnp.ones_like(made.arrays["q"]), "softcap": None}
    found = _run(arguments, impl, kv_segments=candidates)
    assert np.sum(np.asarray(found[0]) == 0) > 10
    np.testing.assert_array_equal(np.sort(jax.lax.top_k(found[0], 15)[1]), np.arange(5, 20))
    assert np.all(np.asarray(found[2]) == np.float32(NOTHING))


@pytest.mark.parametrize("impl", ["xla", "tpu"])
@settings(max_examples=4, deadline=None)
@given(
    layout=st.sampled_from(["contiguous", "ring", "segments", "paged"]),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.integers(1, 4),
    queries=st.integers(1, 3),
    pages=st.integers(1, 6),
    block=st.sampled_from([8, 24, 128]),
    seed=st.integers(0, 9),
)
def test_any_shape_and_length(impl, layout, kv_heads, group, queries, pages, block, seed):
    made = case(
        layout, heads=group * kv_heads, kv_heads=kv_heads, queries=queries, slots=8 * pages, page=8,
        seed=seed,
    )  # fmt: skip
    config = DecodeAttentionConfig(block=block, interpret=impl == "tpu")
    each = _run(made.for_scores, impl, config, per_head=True)
    np.testing.assert_allclose(each, made.votes, atol=2e-6)


@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_a_row_of_any_length(impl):
    """37 slots in blocks of 16, the last of which reaches back."""
    made = case("contiguous", slots=37, queries=2)
    each = _run(made.for_scores, impl, per_head=True)
    np.testing.assert_allclose(each, made.votes, atol=2e-6)


def test_gradients_agree_and_are_finite_where_unseen_slots_are_nan():
    made = case("paged", queries=2)
    vectors = {key: made.arrays[key] for key in "qk"}

    def loss(vectors, impl):
        found = _run(made.for_scores | vectors, impl)
        return jnp.sum(jnp.where(found > NOTHING / 2, found, 0) ** 2)

    ours, expected = (jax.grad(loss)(vectors, impl) for impl in ("xla", "ref"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(a)) and np.any(a)
        np.testing.assert_allclose(a, b, atol=1e-5)

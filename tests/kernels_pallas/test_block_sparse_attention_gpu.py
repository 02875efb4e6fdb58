"""The Hopper kernels against the reference: interpreted here, and run where there is a GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attending import Even, documents
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting_gpu import PLAIN, STRICT, extended

from kernels_pallas.block_sparse_attention import (
    Bidirectional,
    BlockSparseAttentionConfig,
    Causal,
    SlidingWindow,
    blocks,
    pairs,
    partial_attention,
)
from kernels_pallas.common import dispatch


@pytest.fixture(params=["interpreted", pytest.param("hardware", marks=pytest.mark.gpu)])
def interpret(request):
    """The ``interpret`` of the kernels: an interpreter, or none."""
    if request.param == "interpreted":
        with extended():
            yield PLAIN
    elif jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    else:
        yield False


def _arrays(queries, keys=None, heads=2, kv_heads=1, width=64, dtype=jnp.bfloat16, batch=1):
    random = jax.random.split(jax.random.key(0), 5)
    q_shape = (batch, queries, heads, width)
    kv_shape = (batch, keys or queries, kv_heads, width)
    q, k, v, cotangent = (
        jax.random.normal(key, shape).astype(dtype)
        for key, shape in zip(random[:4], (q_shape, kv_shape, kv_shape, q_shape), strict=True)
    )
    return (q, k, v), (cotangent, jax.random.normal(random[4], q_shape[:3]))


@functools.partial(jax.jit, static_argnames=("rule", "impl", "softcap", "block_shape", "interpret"))
def _both(
    arrays, cotangents, q_tokens, kv_tokens=None, *,
    impl, rule, interpret=False, softcap=None, lists=None, block_shape=(128, 128),
):  # fmt: skip
    """Both results, and the gradients under ``cotangents``."""
    kv_tokens = q_tokens if kv_tokens is None else kv_tokens

    def attend(arrays):
        q, k, v = arrays
        return partial_attention(
            q=q, k=k, v=v,
            q_positions=q_tokens[0], kv_positions=kv_tokens[0],
            q_segments=q_tokens[1], kv_segments=kv_tokens[1],
            rule=rule, scale=q.shape[-1] ** -0.5, softcap=softcap,
            blocks=lists, block_shape=block_shape, impl=impl,
            config=BlockSparseAttentionConfig(interpret=interpret),
        )  # fmt: skip

    out, pull_back = jax.vjp(attend, arrays)
    return out, pull_back(cotangents)[0]


def _assert_close(arrays, cotangents, *tokens, interpret, **options: Any):
    """Ours in 16 bits against the reference in 32; gives ours."""
    ours = jax.block_until_ready(
        _both(arrays, cotangents, *tokens, impl="gpu", interpret=interpret, **options)
    )
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, cotangents))
    expected = _both(*exact, *tokens, impl="ref", **options)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == (jnp.float32 if a.ndim == 3 else arrays[0].dtype)
        scale = float(jnp.max(jnp.where(b > -1e29, jnp.abs(b), 0.0)))
        tolerance = 1e-5 if a.ndim == 3 else 0.01
        np.testing.assert_allclose(np.asarray(a, "f4"), b, atol=tolerance * scale, rtol=1e-6)
    return ours


@pytest.mark.parametrize(
    ("rule", "options", "softcap"),
    [
        (Causal(), {"heads": 4, "kv_heads": 2}, None),
        (SlidingWindow(size=40), {"dtype": jnp.float16, "width": 128}, 0.7),
        pytest.param(Even(), {"width": 40}, None, marks=pytest.mark.slow),
        (Bidirectional(), {"width": 200, "kv_heads": 2}, 0.7),
    ],
    ids=str,
)
def test_values_and_gradients_agree_with_ref(interpret, rule, options, softcap):
    """Two documents, of which one crosses tiles, and padding; ragged in tiles of 64 and 128."""
    arrays, cotangents = _arrays(150, **options)
    tokens = documents([50, 90], 150)
    _assert_close(arrays, cotangents, tokens, rule=rule, softcap=softcap, interpret=interpret)


@pytest.mark.parametrize(
    "block_shape", [(64, 128), pytest.param((128, 64), marks=pytest.mark.slow)], ids=str
)
def test_lists_in_any_order_with_other_keys_than_queries(interpret, block_shape):
    """Two rows, repeated and empty slots, a block of queries without a list."""
    lists = [[[1, -1, 0, 1], [-1, -1, -1, -1]], [[2, 0, -1, 9], [1, 2, -1, -1]]]
    lists = jnp.asarray(lists)[:, : blocks.count(100, block_shape[0])]
    arrays, cotangents = _arrays(100, 300, batch=2)
    q_tokens, kv_tokens = ([x.repeat(2, 0) for x in documents([n - 9], n)] for n in (100, 300))
    q_tokens[0] = q_tokens[0] + 100
    options = {"lists": lists, "block_shape": block_shape, "interpret": interpret}
    _assert_close(arrays, cotangents, q_tokens, kv_tokens, rule=Causal(), **options)


def test_queries_that_see_nothing_are_zero_and_so_are_their_gradients(interpret):
    arrays, cotangents = _arrays(150)
    for lengths in ([90, 40], []):
        tokens = documents(lengths, 150)
        padding = np.asarray(tokens[1] == 0)
        (out, log_sum_exp), gradients = _both(
            arrays, cotangents, tokens, impl="gpu", rule=Causal(), interpret=interpret
        )
        np.testing.assert_allclose(log_sum_exp[padding], -1e30, rtol=1e-6)
        for leaf in (out, *gradients):
            assert not np.any(leaf[padding])
            assert np.all(np.isfinite(leaf))
            assert np.any(leaf[~padding]) == bool(lengths)


def test_huge_scores_do_not_overflow(interpret):
    (q, k, v), cotangents = _arrays(70)
    options = {"rule": Causal(), "interpret": interpret}
    tokens = documents([70], 70)
    (out, _), gradients = _both((q * 1e4, k, v), cotangents, tokens, impl="gpu", **options)
    exact = tuple(x.astype(jnp.float32) for x in (q * 1e4, k, v))
    expected = _both(exact, (cotangents[0].astype(jnp.float32), cotangents[1]), tokens,
                     impl="ref", rule=Causal())[0][0]  # fmt: skip
    np.testing.assert_allclose(np.asarray(out, "f4"), expected, atol=0.03)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_a_row_out_of_order_is_nan_and_the_others_are_right(interpret):
    arrays, cotangents = _arrays(150, batch=2)
    positions, segments = (jnp.concatenate([x, x]) for x in documents([50, 90], 150))
    tokens = (positions.at[0, :50].set(positions[0, :50][::-1]), segments)
    run = functools.partial(_both, arrays, cotangents, tokens, rule=Causal())
    ours, _ = run(impl="gpu", interpret=interpret)
    expected, _ = run(impl="ref")
    for a, b in zip(ours, expected, strict=True):
        assert np.all(np.isnan(a[0]))
        np.testing.assert_allclose(np.asarray(a[1], "f4"), np.asarray(b[1], "f4"), atol=0.02)


@pytest.mark.parametrize(
    ("length", "width"), [(330, 64), pytest.param(150, 256, marks=pytest.mark.slow)]
)
def test_nothing_races_and_every_slot_is_filled_again(length, width):
    """Up to six steps in two slots; in wide heads two warpgroups read the same keys."""
    arrays, cotangents = _arrays(length, width=width)
    with extended() as kernels:
        tokens = documents([length - 30], length)
        _assert_close(arrays, cotangents, tokens, rule=Causal(), interpret=STRICT)
    assert [kernel.races_found for kernel in kernels] == [False] * 3


def test_what_cannot_run_is_said(monkeypatch):
    (q, k, v), cotangents = _arrays(70)
    tokens = documents([70], 70)
    run = functools.partial(_both, rule=Causal(), impl="gpu")
    with pytest.raises(ValueError, match="needs a GPU, this is a cpu"):
        run((q, k, v), cotangents, tokens)
    exact = tuple(x.astype(jnp.float32) for x in (q, k, v))
    with pytest.raises(ValueError, match="not float32, float32, float32; tensor cores"):
        run(exact, (cotangents[0].astype(jnp.float32), cotangents[1]), tokens, interpret=PLAIN)
    wide, wide_cotangents = _arrays(70, width=264)
    with pytest.raises(ValueError, match="width 264 are wider than 256"):
        run(wide, wide_cotangents, tokens, interpret=PLAIN)
    lists = {"lists": jnp.zeros((1, 1, 1), int), "block_shape": (128, 96)}
    with pytest.raises(ValueError, match=r"\(128, 96\) are not multiples of 64"):
        run((q, k, v), cotangents, tokens, interpret=PLAIN, **lists)
    with pytest.raises(ValueError, match="parameters of that one"):
        run((q, k, v), cotangents, tokens, interpret=True)
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(ValueError, match="tensor cores of Hopper, this is a NVIDIA A100"):
        run((q, k, v), cotangents, tokens)


def _tokens_of_both(lengths, length):
    positions, segments = documents(lengths, length)
    return blocks.Tokens(positions, positions, segments, segments)


def _listed(found, by_rows):
    """Pairs of (query, key) tiles that a kernel visits, with and without a mask."""
    inner, bounds = map(np.asarray, found)
    for kind in (0, 1):
        visited = set()
        for outer, (start, middle, stop) in enumerate(bounds[0]):
            low, high = ((start, middle), (middle, stop))[kind]
            visited |= {(outer, int(n)) if by_rows else (int(n), outer) for n in inner[0, low:high]}
        yield visited


@settings(max_examples=20, deadline=None)
@given(
    rule=st.one_of(st.just(Causal()), st.just(Bidirectional()), st.just(Even()),
                   st.builds(SlidingWindow, size=st.integers(1, 40))),
    lengths=st.lists(st.integers(1, 20), max_size=3),
    by_rows=st.booleans(),
)  # fmt: skip
def test_ranges_hold_every_pair_that_shows_anything_and_unmasked_ones_show_all(
    rule, lengths, by_rows
):
    length = 64
    tokens = _tokens_of_both(lengths, length)
    visible = rule.block_map(4, 4, length // 4, length // 4)
    listed = (pairs.static_rows if by_rows else pairs.static_columns)(visible)
    unmasked, masked = _listed(pairs.ranges(listed, rule, tokens, 4, 4, by_rows=by_rows), by_rows)
    q_pos, kv_pos, q_seg, kv_seg = tokens
    shown = rule(q_pos[0][:, None], kv_pos[0][None], q_seg[0][:, None], kv_seg[0][None])
    tiles = np.asarray(shown).reshape(length // 4, 4, length // 4, 4)
    assert not unmasked & masked
    assert unmasked <= set(zip(*(x.tolist() for x in np.nonzero(tiles.all((1, 3)))), strict=True))
    assert set(zip(*(x.tolist() for x in np.nonzero(tiles.any((1, 3)))), strict=True)) <= (
        unmasked | masked
    )


def test_only_the_diagonal_of_a_causal_document_is_masked():
    tokens = _tokens_of_both([16], 16)
    listed = pairs.static_rows(Causal().block_map(4, 4, 4, 4))
    unmasked, masked = _listed(pairs.ranges(listed, Causal(), tokens, 4, 4, by_rows=True), True)
    assert masked == {(i, i) for i in range(4)}
    assert unmasked == {(i, j) for i in range(4) for j in range(i)}


def test_finer_lists_show_the_same_tokens():
    """Blocks of 128 queries and 256 keys in tiles of 64, of 6 and 7 there are."""
    lists = jnp.asarray([[[0, -1], [1, -1], [-1, 0]]])
    found = blocks.listed(blocks.finer(lists, 2, 4, 6, 7), 7)
    expected = np.zeros((1, 6, 7), bool)
    expected[0, 0:2, 0:4] = expected[0, 2:4, 4:7] = expected[0, 4:6, 0:4] = True
    np.testing.assert_array_equal(found, expected)

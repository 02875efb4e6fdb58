"""State-space duality: three ways to compute one recurrence, and the recurrence itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.attention import Scanned, associative_ssd, quadratic_ssd, ssd, ssd_flops

HEADS, WIDTH = 3, 4


def rows(length=21, batch=2, seed=0, dtype=np.float32, decays=(0.0, 3.0), widths=(WIDTH, 5)):
    """Packed documents of several lengths with padding behind them."""
    rng = np.random.default_rng(seed)
    c, b = rng.normal(size=(2, batch, length, HEADS, widths[0]))
    x = rng.normal(size=(batch, length, HEADS, widths[1]))
    log_decay = -rng.uniform(*decays, size=(batch, length, HEADS))
    starts = rng.random((batch, length)) < 0.2
    valid = np.arange(length)[None] < np.linspace(length, length // 2, batch)[:, None]
    arrays = [jnp.asarray(each, dtype) for each in (c, b, x, log_decay)]
    return Scanned(*arrays, jnp.asarray(valid), jnp.asarray(starts))


def by_hand(row, state=None):
    """The recurrence, one token of one head at a time."""
    c, b, x, log_decay, valid, starts = (np.asarray(each, np.float64) for each in row)
    batch, length, heads, width = c.shape
    y = np.zeros(x.shape)
    last = np.zeros((batch, heads, width, x.shape[-1]))
    for i in range(batch):
        for h in range(heads):
            state_h = np.zeros(last.shape[2:]) if state is None else np.asarray(state)[i, h]
            for t in range(length):
                if starts[i, t]:
                    state_h = np.zeros_like(state_h)
                if valid[i, t]:
                    state_h = np.exp(log_decay[i, t, h]) * state_h + np.outer(
                        b[i, t, h], x[i, t, h]
                    )
                    y[i, t, h] = state_h.T @ c[i, t, h]
            last[i, h] = state_h
    return y, last


chunked = jax.jit(ssd, static_argnames="chunk")


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 9), length=st.sampled_from([1, 13, 21]), chunk=st.sampled_from([1, 8]))
def test_chunks_equal_the_recurrence_token_by_token(seed, length, chunk):
    row = rows(length=length, seed=seed)
    state = jnp.asarray(np.random.default_rng(seed).normal(size=(2, HEADS, WIDTH, 5)))
    y, last = chunked(row, state=state, chunk=chunk)
    expected, expected_last = by_hand(row, state)
    assert y.dtype == last.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(last, expected_last, atol=2e-5)


@pytest.mark.parametrize("way", [quadratic_ssd, associative_ssd])
def test_the_dual_and_the_scan_are_the_recurrence(way):
    row = rows()
    np.testing.assert_allclose(jax.jit(way)(row), by_hand(row)[0], atol=2e-5)


def test_no_decay_is_linear_attention_and_full_decay_reads_only_the_token_itself():
    row = rows(decays=(0, 0))._replace(starts=jnp.zeros((2, 21), bool))
    y, _ = chunked(row, chunk=8)
    c, b, x = (np.where(np.asarray(row.valid)[..., None, None], each, 0) for each in row[:3])
    scores = np.einsum("bihn,bjhn->bhij", c, b) * np.tril(np.ones((21, 21)))
    np.testing.assert_allclose(y, np.einsum("bhij,bjhp->bihp", scores, x), atol=2e-5)
    alone, _ = chunked(row._replace(log_decay=jnp.full((2, 21, HEADS), -jnp.inf)), chunk=8)
    own = np.einsum("bihn,bihn->bih", c, b)[..., None] * x
    np.testing.assert_allclose(alone, own, atol=1e-6)


@pytest.mark.parametrize("decays", [(0, 1e-6), (15, 500), (0, 500)])
def test_decays_near_nothing_and_near_all_keep_their_digits(decays):
    """Over whole chunks of 64, forward and backward in time, and in the gradient."""
    row = rows(length=150, decays=decays)
    y, _ = chunked(row, chunk=64)
    expected, _ = by_hand(row)
    np.testing.assert_allclose(y, expected, atol=2e-4 * np.abs(expected).max())

    def loss(log_decay):
        return jnp.sum(ssd(row._replace(log_decay=log_decay), chunk=64)[0] ** 2)

    assert np.isfinite(np.asarray(jax.jit(jax.grad(loss))(row.log_decay))).all()


def test_gradients_are_those_of_the_dual():
    row = rows()

    def loss(way, arrays):
        return jnp.sum(jnp.sin(way(row._replace(**arrays))))

    arrays = {name: getattr(row, name) for name in ("c", "b", "x", "log_decay")}
    ways = (lambda row: ssd(row, chunk=8)[0], quadratic_ssd)
    found, expected = (jax.jit(jax.grad(functools.partial(loss, way)))(arrays) for way in ways)
    for name in arrays:
        np.testing.assert_allclose(found[name], expected[name], atol=3e-5, err_msg=name)


def test_backwards_is_the_recurrence_of_the_mirrored_row():
    row = rows()
    y, _ = chunked(row.reversed(), chunk=8)
    c, b, x, log_decay, valid, starts = (np.asarray(each) for each in row)
    expected = np.zeros(x.shape)
    for i in range(2):
        for h in range(HEADS):
            state = np.zeros((WIDTH, 5))
            for t in range(20, -1, -1):
                if valid[i, t]:
                    state = np.exp(log_decay[i, t, h]) * state + np.outer(b[i, t, h], x[i, t, h])
                    expected[i, t, h] = state.T @ c[i, t, h]
                if starts[i, t]:
                    state = np.zeros_like(state)
    np.testing.assert_allclose(np.flip(y, axis=1), expected, atol=2e-5)


def test_bfloat16_tokens_make_float32_states():
    row = rows()
    low = row._replace(**{name: getattr(row, name).astype(jnp.bfloat16) for name in "cbx"})
    y, last = chunked(low, chunk=8)
    assert y.dtype == last.dtype == jnp.float32
    expected, _ = by_hand(row)
    np.testing.assert_allclose(y, expected, atol=0.05 * np.abs(expected).max())


def test_the_ledger_counts_the_products_of_the_compiled_scan():
    row = rows(length=32, batch=1, widths=(WIDTH, WIDTH))
    one = jax.jit(lambda row: ssd(row, chunk=32)[0]).lower(row).compile().cost_analysis()
    own = 32 * ssd_flops(heads=HEADS, width=WIDTH, chunk=32)
    # What is not a product of matrices comes on top.
    assert own <= one["flops"] < 2.5 * own

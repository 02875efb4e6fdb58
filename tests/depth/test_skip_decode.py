"""Skipping by column: schedules by hand, decoding against one pass, and what it costs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.depth.looped import VOCABULARY, params_of, ragged, read, run
from tokenlab.cache import FullCache
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.decode.speculative import PromptLookup, Speculative
from tokenlab.depth import Sequential, SkipDecode, linear_decay
from tokenlab.models import LinearHead, llama

both = pytest.mark.parametrize("keep", ["top", pytest.param("bottom", marks=pytest.mark.slow)])
PROMPT = 4


def model_of(depth, layers=6):
    return llama(
        vocab_size=VOCABULARY, dim=16, num_layers=layers, num_heads=4, num_kv_heads=2,
        hidden_dim=16, depth=depth, max_length=64, head=LinearHead(),
    )  # fmt: skip


@functools.cache
def case(keep, counts=(6, 5, 5, 4, 3, 2)):
    model = model_of(SkipDecode(counts=counts, keep=keep, prompt_length=PROMPT))
    return model, params_of(model, seed=3)


def test_schedules_are_the_worked_ones():
    counts = linear_decay(most=8, fewest=2, columns=7)
    assert counts == (8, 7, 6, 5, 4, 3, 2) and sum(counts) == 35
    assert 7 * 8 / sum(counts) == pytest.approx(1.6)
    program = SkipDecode(counts=counts)
    assert program.layers(8, column=7) == program.layers(8, column=50) == (0, 7)
    assert program.layers(8, column=3) == (0, 3, 4, 5, 6, 7)
    twin = SkipDecode(counts=counts, keep="bottom")
    assert twin.layers(8, column=7) == (0, 1)
    for one in (program, twin, SkipDecode(counts=counts, warmup=2)):
        sets = [set(one.layers(8, column=t)) for t in range(1, 8)]
        assert [len(a) for a in sets] == list(counts)
        assert all(after < before for before, after in itertools.pairwise(sets))
    longer = linear_decay(most=18, fewest=6, columns=13)
    assert np.mean(longer) == 12 and longer[0] == 18 and longer[-1] == 6
    assert linear_decay(most=5, fewest=5, columns=1) == (5,)


def test_counts_that_rise_are_refused():
    """Layer 3 would have no key of column 1."""
    with pytest.raises(UserError, match="column 2 runs 5 layers after 2 in column 1"):
        SkipDecode(counts=(2, 5), keep="bottom")
    with pytest.raises(UserError, match="at least warmup 3"):
        SkipDecode(counts=(4, 2), warmup=3)
    with pytest.raises(UserError, match="column 1 runs 9 of num_layers 6"):
        params_of(model_of(SkipDecode(counts=(9, 2))))
    with pytest.raises(UserError, match="use fewest <= most"):
        linear_decay(most=2, fewest=5, columns=2)


def test_all_layers_are_the_full_model_bit_for_bit():
    full = model_of(Sequential())
    params, batch = params_of(full), ragged((12, 5), 12)
    same = model_of(SkipDecode(counts=linear_decay(most=6, fewest=6, columns=9)))
    (ours, out), (theirs, _) = (run(model, params, *batch) for model in (same, full))
    real = np.asarray(batch[2]) > 0
    np.testing.assert_array_equal(np.asarray(ours)[real], np.asarray(theirs)[real])
    np.testing.assert_array_equal(out.trace.depth, 6 * np.asarray(batch[2]))


@both
def test_training_is_a_where_over_the_layers(keep):
    """Also the gradient; a layer's keys are those of all tokens before, none of which it lacks."""
    model, params = case(keep)
    batch = ragged((14, 9), 14)
    tokens, positions, segments = batch
    columns = np.clip(np.arange(14) - PROMPT + 1, 1, None)
    table = [model.depth.layers(6, column=int(t)) for t in columns]
    weights = jax.random.normal(jax.random.key(0), (2, 14, 16)) * (segments > 0)[..., None]

    def oracle(params):
        x = params["embedding"][tokens]
        for i in range(6):
            runs = jnp.asarray([i in row for row in table])[None, :, None]
            where = {"positions": positions, "segments": segments}
            y, _ = model.block.apply({"params": params[f"block_{i}"]}, x, **where)
            x = jnp.where(runs, y, x)
        return jnp.sum(model.norm.apply({"params": params["norm"]}, x) * weights)

    def ours(params):
        out = model.apply({"params": params}, tokens, positions=positions, segments=segments)
        return jnp.sum(out.hidden * weights)

    found, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, oracle))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )
    _, out = run(model, params, *batch)
    ran = np.asarray([[i in row for row in table] for i in range(6)])
    np.testing.assert_array_equal(out.trace.active, ran[:, None] & (np.asarray(segments) > 0)[None])


@both
def test_a_row_is_read_the_same_however_it_is_cut(keep):
    model, params = case(keep)
    batch = ragged((14, 9, 1), 14)
    whole, out = run(model, params, *batch)
    found, last = read(model, params, FullCache(), batch, (3, 4, *[1] * 7))
    real = np.asarray(batch[2]) > 0
    np.testing.assert_allclose(found[real], np.asarray(whole)[real], atol=1e-5)
    np.testing.assert_array_equal(last.cache.held(), np.asarray(out.trace.active).sum(axis=2))
    where = {"positions": batch[1], "segments": batch[2]}
    ledger = model.ledger(out.trace, **where)
    assert ledger.attended_pairs == float(last.cache.pairs.sum())


@both
def test_decoding_in_any_batch_writes_the_same_and_counts_what_ran(keep):
    """One prompt alone, as one of eight, and by speculation; prompts of other lengths beside it."""
    model, params = case(keep)
    view, key = View(model=model, params=params), jax.random.key(0)
    options = {"sampler": Greedy(), "max_new_tokens": 8, "end_ids": ()}
    prompts = [[1, 4, 9, 2], [3], [5, 5, 6, 7, 8, 9], *[[i, 2, i, 3] for i in range(5)]]
    many = Autoregressive(**options)(view, prompts, key=key)
    alone = Autoregressive(**options)(view, prompts[:1], key=key)
    np.testing.assert_array_equal(alone.tokens[0], many.tokens[0])
    np.testing.assert_allclose(alone.logp_model[0], many.logp_model[0], atol=1e-5)
    ran = 6 * PROMPT + 6 + 5 + 5 + 4 + 3 + 2 + 2 + 2
    assert alone.ledger.block_tokens == alone.ledger.cache_entries == ran
    slots = Autoregressive(**options, slots=3, prefill_chunk=2)(view, prompts, key=key)
    np.testing.assert_array_equal(slots.tokens, many.tokens)
    assert slots.ledger.block_tokens == many.ledger.block_tokens
    drafted = Speculative(drafter=PromptLookup(length=3), **options)(view, prompts[:3], key=key)
    np.testing.assert_array_equal(drafted.tokens, many.tokens[:3])


def test_a_step_leaves_out_layers_under_a_condition():
    """A layer is behind a branch of the compiled step, not computed and thrown away."""
    model, params = case("top")
    cache = model.empty_cache(FullCache(), batch=1, capacity=16)
    batch = ragged((PROMPT,), PROMPT)
    cache = run(model, params, *batch, cache)[1].cache
    one = jnp.ones((1, 1), jnp.int32)

    def step(cache):
        return model.apply({"params": params}, one, positions=9 * one, segments=one, cache=cache)

    equations = jax.make_jaxpr(step)(cache).jaxpr.eqns
    assert sum(each.primitive.name == "cond" for each in equations) == 6


def test_layers_that_no_column_runs_are_not_computed():
    model, params = case("top", counts=(3, 2))
    broken = params | {"block_1": jax.tree.map(lambda leaf: leaf * jnp.nan, params["block_1"])}
    batch = ragged((9,), 9)
    (found, _), (expected, _) = (run(model, p, *batch) for p in (broken, params))
    np.testing.assert_array_equal(found, expected)
    slope = jax.grad(
        lambda p: model.apply(
            {"params": p}, batch[0], positions=batch[1], segments=batch[2]
        ).hidden.sum()
    )(broken)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))

"""Tokens of different recursions in one pass write what they write one row at a time."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.depth.looped import VOCABULARY, model_of, params_of
from tokenlab.cache import FullCache, PagedCache, PerLayer, RingCache
from tokenlab.cache.act_qkv import ActQKV
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode import Autoregressive, Categorical, DepthBatched, Greedy, Temperature
from tokenlab.decode.depth_batched import _decode, _insert
from tokenlab.depth import MixtureOfRecursions, Recursive, Sequential

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCABULARY, n).tolist() for n in (5, 1, 7, 3, 3, 6, 2, 4)]
USUAL = {"max_new_tokens": 9, "sampler": Greedy(), "end_ids": ()}


@functools.cache
def view(program="routed", keys="recursion_wise"):
    model = model_of(program, keys)
    return View(model=model, params=params_of(model, seed=5))


def both(program="routed", *, one=(), **options):
    """By rows, with ``one`` more options, and by depths."""
    rest = dict(one) | {"slots": None}
    rows = Autoregressive(**(USUAL | {k: v for k, v in options.items() if k != "batch"} | rest))
    depths = DepthBatched(**(USUAL | {"batch": 2} | options))
    return [decoder(view(program), PROMPTS, key=KEY) for decoder in (rows, depths)]


def assert_same(rows, depths):
    np.testing.assert_array_equal(depths.tokens, rows.tokens)
    np.testing.assert_array_equal(depths.lengths, rows.lengths)
    np.testing.assert_allclose(depths.logp_model, rows.logp_model, atol=2e-4)
    np.testing.assert_allclose(depths.logp_behaviour, rows.logp_behaviour, atol=2e-4)


@pytest.mark.parametrize("program", ["routed", "all"])
def test_it_writes_what_rows_write(program):
    rows, depths = both(program)
    assert_same(rows, depths)
    # All tokens but the last of each row are read, and these cost what they cost there.
    assert depths.ledger.tokens == rows.ledger.tokens - len(PROMPTS)
    if program == "all":
        assert depths.ledger.block_tokens == 5 * depths.ledger.tokens
        assert rows.ledger.block_tokens == 5 * rows.ledger.tokens
    else:
        assert depths.ledger.block_tokens < rows.ledger.block_tokens < 5 * rows.ledger.tokens
    assert depths.ledger.cache_entries == depths.ledger.block_tokens


@pytest.mark.slow
def test_one_row_at_a_time_costs_the_same_and_wastes_nothing():
    """The work of a row is that of its tokens, however rows share passes."""
    found = [both(batch=batch, slots=slots)[1] for batch, slots in ((1, 1), (3, 5), (16, None))]
    for each in found[1:]:
        assert_same(found[0], each)
        for name in ("tokens", "block_tokens", "attended_pairs", "flops", "cache_entries"):
            assert getattr(each.ledger, name) == pytest.approx(getattr(found[0].ledger, name))
    # One row is a pass for each token that it writes.
    assert found[0].ledger.passes == 9 * len(PROMPTS) + len(PROMPTS)


def test_passes_are_full_while_rows_wait():
    """2 B - 1 rows in flight always have B in the loop or B out of it."""
    batch, new = 2, 9
    found = both(batch=batch, slots=2 * batch - 1, max_new_tokens=new)[1]
    written = found.lengths.sum()
    turns = found.ledger.passes - (len(PROMPTS) - 2)  # but for those that read the prompts
    # The last rows have nobody to share with: as many passes more as one row has tokens.
    assert written / batch <= turns <= written / batch + new


def test_draws_and_ends_are_those_of_rows():
    options = {
        "sampler": Categorical(processors=(Temperature(value=1.5),)),
        "end_ids": (2, 3, 4, 5),
        "max_new_tokens": 16,
    }
    rows, depths = both(**options, slots=5, prefill_chunk=3)
    assert_same(rows, depths)
    assert len(set(rows.lengths.tolist())) > 2


@pytest.mark.parametrize(
    "cache",
    [PagedCache(page=4), pytest.param(RingCache(budget=6), marks=pytest.mark.slow)],
    ids=["paged", "ring"],
)
def test_other_caches_come_along(cache):
    rows, depths = both(cache=cache, slots=5)
    assert_same(rows, depths)


def test_streaming_stops_rows():
    shown = []

    def stop(tokens, lengths):
        shown.append(lengths)
        return lengths >= 4

    found = DepthBatched(**USUAL, batch=2, stream_every=1)(view(), PROMPTS, key=KEY, on_tokens=stop)
    assert (found.lengths >= 4).all() and (found.lengths < 9).all()
    assert len(shown) > 1 and (np.diff(np.stack(shown), axis=0) >= 0).all()
    rows = both()[0]
    for mine, theirs, count in zip(found.tokens, rows.tokens, found.lengths, strict=True):
        np.testing.assert_array_equal(mine[:count], theirs[:count])


def test_bfloat16_and_no_second_compilation():
    model = model_of("routed").clone(dtype="bfloat16")
    short = View(model=model, params=view().params)
    decoder = DepthBatched(**USUAL, batch=3)
    first = decoder(short, PROMPTS, key=KEY)
    sizes = _decode._cache_size(), _insert._cache_size()
    again = dataclasses.replace(decoder)(short, PROMPTS[::-1], key=KEY)
    assert (_decode._cache_size(), _insert._cache_size()) == sizes
    np.testing.assert_array_equal(again.tokens[::-1], first.tokens)
    assert np.isfinite(first.logp_model).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (model_of().clone(depth=Sequential()), FullCache()), "use Autoregressive"),
        (lambda: (model_of(keys="shared"), FullCache()), "keys='shared'"),
        (
            lambda: (
                model_of(layers=8).clone(
                    depth=MixtureOfRecursions(recursions=3, sharing="middle_sequence")
                ),
                FullCache(),
            ),
            "different orders",
        ),
        (
            lambda: (model_of(), PerLayer(policies=(FullCache(), RingCache(budget=8)))),
            "different caches",
        ),
        (lambda: (model_of(), ActQKV()), "use cache=FullCache"),
    ],
    ids=["no loop", "shared keys", "sequence", "caches by recursion", "layers that talk"],
)
def test_what_it_cannot_decode_is_said(make, message):
    model, cache = make()
    decoder = DepthBatched(**USUAL, cache=cache)
    with pytest.raises(UserError, match=message):
        decoder(View(model=model, params=params_of(model)), PROMPTS, key=KEY)


def test_bad_options_are_said():
    with pytest.raises(UserError, match="batch 0"):
        DepthBatched(batch=0)
    assert Recursive(recursions=2).names(6).loop == ["block_0", "block_1"]

"""Every decoder writes with a looped model what one pass over all of it says."""

import functools

import jax
import numpy as np
import pytest

from tests.depth.looped import KEYS, VOCABULARY, each, model_of, params_of, run
from tokenlab.cache import FullCache, PagedCache, PerLayer, RingCache, SinkCache
from tokenlab.core.context import View
from tokenlab.decode import Autoregressive, BeamSearch, Greedy, score_continuation
from tokenlab.decode.autoregressive import _decode, _prefill
from tokenlab.decode.speculative import PromptLookup, Speculative

KEY, SEED = jax.random.key(3), 5
PROMPTS = [[1, 4, 9, 2, 7, 1, 4, 9], [3], [5, 5, 6, 5, 5, 6, 5], [12, 0, 3]]


@functools.cache
def view(keys, program="routed"):
    """As trained: decoders take the causal twin themselves."""
    model = model_of(program, keys)
    return View(model=model, params=params_of(model, seed=SEED))


@functools.cache
def greedy(keys, **options):
    decoder = Autoregressive(
        **({"sampler": Greedy(), "max_new_tokens": 9, "end_ids": ()} | options)
    )
    return decoder(view(keys), PROMPTS, key=KEY)


def checked(keys, prompts, tokens, lengths, logp):
    """Log-probabilities by one pass of the causal twin over each whole text; what it did."""
    texts = [[*p, *row[:n]] for p, row, n in zip(prompts, tokens.tolist(), lengths, strict=True)]
    rows = np.zeros((len(texts), 24), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    positions = np.tile(np.arange(24, dtype=np.int32), (len(texts), 1))
    segments = positions < np.asarray([len(text) for text in texts])[:, None]
    model, params = view(keys).model.causal_twin(), view(keys).params
    logits, out = run(model, params, rows, positions, segments.astype(np.int32))
    table = np.asarray(jax.nn.log_softmax(logits))
    for i, (prompt, count) in enumerate(zip(prompts, lengths, strict=True)):
        at = len(prompt) - 1 + np.arange(count)
        expected = table[i, at, rows[i, at + 1]]
        np.testing.assert_allclose(logp[i, :count], expected, atol=2e-4)
    return table, out.trace, [len(text) for text in texts]


@each
def test_decoding_writes_what_one_pass_over_the_text_says(keys):
    found = greedy(keys)
    table, trace, lengths = checked(keys, PROMPTS, found.tokens, found.lengths, found.logp_model)
    for i, prompt in enumerate(PROMPTS):
        best = table[i, len(prompt) - 1 : lengths[i] - 1].argmax(axis=1)
        np.testing.assert_array_equal(found.tokens[i, : found.lengths[i]], best)
    # The ledger counts the recursions that tokens entered; the last token is read too.
    active = np.asarray(trace.active).sum(axis=2)
    assert found.ledger.block_tokens == active.sum() < 5 * sum(lengths)
    held = (
        np.concatenate([active[:1], [active[1]] * 3, active[-1:]])
        if keys == "hybrid"
        else (active if keys == "recursion_wise" else active[[0, 1, -1]])
    )
    assert found.ledger.cache_entries == held.sum()


def test_slots_and_chunks_change_nothing_and_compile_once():
    straight = greedy("hybrid")
    options = {"slots": 2, "prefill_chunk": 3}
    found = greedy("hybrid", **options)
    np.testing.assert_array_equal(found.tokens, straight.tokens)
    np.testing.assert_allclose(found.logp_model, straight.logp_model, atol=2e-4)
    assert found.ledger.block_tokens == straight.ledger.block_tokens
    sizes = _prefill._cache_size(), _decode._cache_size()
    again = Autoregressive(sampler=Greedy(), max_new_tokens=9, end_ids=(), **options)
    np.testing.assert_array_equal(again(view("hybrid"), PROMPTS, key=KEY).tokens, found.tokens)
    assert (_prefill._cache_size(), _decode._cache_size()) == sizes


@each
def test_speculation_writes_the_same(keys):
    decoder = Speculative(
        drafter=PromptLookup(length=3), sampler=Greedy(), max_new_tokens=9, end_ids=()
    )
    found = decoder(view(keys), PROMPTS, key=KEY)
    np.testing.assert_array_equal(found.tokens, greedy(keys).tokens)
    np.testing.assert_allclose(found.logp_model, greedy(keys).logp_model, atol=2e-4)


@pytest.mark.slow
def test_beams_are_scored_as_one_pass_scores_them():
    found = BeamSearch(beams=3, max_new_tokens=6, end_ids=(2,))(view("shared"), PROMPTS, key=KEY)
    checked("shared", PROMPTS, found.tokens, found.lengths, found.logp_model)


@each
def test_given_text_is_scored_as_one_pass_scores_it(keys):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCABULARY, n).tolist() for n in (7, 12, 1, 5)]
    found = score_continuation(view(keys), FullCache(), PROMPTS, texts, prefill_chunk=4, chunk=2)
    tokens = np.zeros((4, 12), int)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    checked(keys, PROMPTS, tokens, [len(text) for text in texts], found.logp)


POLICIES = {
    "paged": PagedCache(page=4),
    "per layer": PerLayer(policies=(FullCache(), PagedCache(page=2), FullCache())),
    "a wide ring": RingCache(budget=32),
    "wide sinks": SinkCache(budget=32, renumber=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_other_caches_that_forget_nothing_write_the_same(policy, keys):
    found, plain = greedy(keys, cache=POLICIES[policy]), greedy(keys)
    if policy == "wide sinks" and keys == "recursion_wise":
        # Places in a cache are not positions where a recursion leaves out tokens.
        assert (found.lengths == plain.lengths).all()
        return
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert found.ledger.cache_entries == plain.ledger.cache_entries


def test_a_budget_holds_in_every_recursion():
    found = greedy("recursion_wise", cache=SinkCache(budget=5, sinks=1))
    assert found.ledger.cache_entries <= 5 * 5 * len(PROMPTS)
    assert np.isfinite(found.logp_model).all()

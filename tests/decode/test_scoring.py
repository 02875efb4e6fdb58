"""Scores of given text through a cache, and decoding through every kind of cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tokenlab.cache import (
    EMS,
    ActQKV,
    FullCache,
    LouisKV,
    PagedCache,
    PageTopK,
    PerLayer,
    RingCache,
    SinkCache,
    TokenSelect,
)
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode import Autoregressive, Greedy, score_continuation
from tokenlab.models import LinearHead, llama

VOCABULARY = 23
PROMPTS = [[1, 4, 9, 2, 7], [3], [5, 5, 6, 1, 8, 2, 2, 9, 11, 3, 3]]
CONTINUATIONS = [[3, 9, 9, 2, 1, 7, 4], [8, 8], [6, 1, 5, 22]]
KEY = jax.random.key(7)
MODEL = llama(
    vocab_size=VOCABULARY, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=8,
    max_length=64, head=LinearHead(),
)  # fmt: skip


@functools.cache
def view():
    tokens = jnp.zeros((1, 4), int)
    shapes = jax.eval_shape(
        lambda: MODEL.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.6, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes["params"]),
    )
    return View(model=MODEL, params=params)


def log_softmax_of(text):
    tokens = jnp.asarray(text)[None]
    positions = jnp.arange(len(text))[None]
    out = view()(tokens, positions=positions, segments=jnp.ones_like(tokens))
    return np.asarray(jax.nn.log_softmax(view()(out.hidden, method="logits")))[0]


@pytest.mark.parametrize("options", [{}, {"chunk": 3, "prefill_chunk": 4}])
def test_scores_are_those_of_the_whole_text(options):
    found = score_continuation(view(), FullCache(), PROMPTS, CONTINUATIONS, **options)
    for row, (prompt, rest) in enumerate(zip(PROMPTS, CONTINUATIONS, strict=True)):
        logp = log_softmax_of([*prompt, *rest])[len(prompt) - 1 : -1]
        expected = logp[np.arange(len(rest)), rest]
        np.testing.assert_allclose(found.logp[row, : len(rest)], expected, atol=2e-5)
        np.testing.assert_array_equal(found.likeliest[row, : len(rest)], logp.argmax(-1) == rest)
        assert (found.logp[row, len(rest) :] == 0).all()
    mean = found.logp.sum() / 13
    assert found.perplexity == pytest.approx(np.exp(-mean), rel=1e-5)
    # The last token of each is predicted, not read.
    assert float(found.ledger.tokens) == sum(map(len, PROMPTS)) + sum(map(len, CONTINUATIONS)) - 3
    pairs = sum(
        n * (n + 1) // 2
        for n in (len(p) + len(c) - 1 for p, c in zip(PROMPTS, CONTINUATIONS, strict=True))
    )
    assert float(found.ledger.attended_pairs) == 2 * pairs


def test_what_greedy_decoding_writes_is_likeliest():
    decoder = Autoregressive(max_new_tokens=6, sampler=Greedy(), end_ids=())
    written = decoder(view(), PROMPTS, key=KEY)
    found = score_continuation(view(), FullCache(), PROMPTS, written.tokens.tolist())
    assert found.repeated.all()
    np.testing.assert_allclose(found.logp, written.logp_model, atol=2e-5)
    other = np.asarray(written.tokens)
    other[1, 3] = (other[1, 3] + 1) % VOCABULARY
    found = score_continuation(view(), FullCache(), PROMPTS, other.tolist())
    assert found.repeated.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "policy",
    [
        PagedCache(page=4),
        pytest.param(
            PerLayer(policies=(SinkCache(budget=40, renumber=True), RingCache(budget=40))),
            marks=pytest.mark.slow,
        ),
        pytest.param(PageTopK(budget=44, page=4, window=8), marks=pytest.mark.slow),
        pytest.param(
            TokenSelect(budget=40, sinks=2, window=8, reuse=0.5, offload=True),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            LouisKV(budget=40, sinks=2, window=8, cluster=2, segment=3, offload=True),
            marks=pytest.mark.slow,
        ),
        pytest.param(EMS(budget=40, window=4, slack=4), marks=pytest.mark.slow),
        pytest.param(ActQKV(budget=40 + 8, sinks=0, window=40, block=4), marks=pytest.mark.slow),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_with_room_for_all_every_cache_decodes_as_the_full_one(policy):
    """In chunks, in fewer slots than prompts, and in a loop on the device."""
    options = {"max_new_tokens": 5, "sampler": Greedy(), "end_ids": ()}
    expected = Autoregressive(**options)(view(), PROMPTS, key=KEY)
    decoder = Autoregressive(**options, cache=policy, prefill_chunk=4, slots=2)
    found = decoder(view(), PROMPTS, key=KEY)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logp_model, expected.logp_model, atol=1e-4)
    for counts in found.statistics.values():
        assert counts.shape == (3,) and (counts == 0).all()


def test_statistics_belong_to_their_rows():
    policy = LouisKV(budget=8, sinks=2, window=4, cluster=2, segment=4, jump=2.0)
    decoder = Autoregressive(max_new_tokens=5, sampler=Greedy(), end_ids=(), cache=policy, slots=2)
    found = decoder(view(), PROMPTS, key=KEY).statistics["cache_selections"]
    # Tokens beyond sinks and window are chosen from where there are more than two: from 9 tokens
    # on. Row 0 reads the tokens 6 to 9 after 5 to 8 others, row 1 has fewer, row 2 has 11 to 14.
    assert found.tolist() == [2 * 1, 0, 2 * 5]


def test_what_cannot_be_scored_is_one_line():
    with pytest.raises(UserError, match="every prompt a continuation"):
        score_continuation(view(), FullCache(), PROMPTS, CONTINUATIONS[:2])
    with pytest.raises(UserError, match="every prompt a continuation"):
        score_continuation(view(), FullCache(), PROMPTS, [[1], [], [2]])
    with pytest.raises(UserError, match="chunk 0 must be at least 1"):
        score_continuation(view(), FullCache(), PROMPTS, CONTINUATIONS, chunk=0)
    with pytest.raises(UserError, match="exceed the model's context of 64"):
        score_continuation(view(), FullCache(), [[1] * 60], [[1] * 5])
    with pytest.raises(UserError, match="token 99, and the model knows"):
        score_continuation(view(), FullCache(), [[1]], [[99]])
    with pytest.raises(UserError, match="reads 6 tokens at once and its window is 4"):
        policy = TokenSelect(budget=20, window=4, sinks=2)
        score_continuation(view(), policy, PROMPTS, CONTINUATIONS, prefill_chunk=6)

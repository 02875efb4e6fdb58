"""Cached decoding against a loop that reads everything again for each token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab import config
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode import Autoregressive, Categorical, Greedy, Temperature, TopK, TopP
from tokenlab.decode.autoregressive import _decode, _insert, _prefill
from tokenlab.depth import Sequential
from tokenlab.models import LinearHead, llama, unrolled

VOCABULARY = 23
PROMPTS = [[1, 4, 9, 2, 7], [3], [5, 5, 6, 1, 8, 2, 2, 9, 11], [12, 0, 3]]
KEY = jax.random.key(7)
GREEDY = Autoregressive(max_new_tokens=8, sampler=Greedy(), end_ids=())
# A quarter of the vocabulary ends a row, so that rows end at different steps.
SAMPLED = Autoregressive(
    max_new_tokens=12,
    sampler=Categorical(processors=(Temperature(value=1.3), TopK(k=12), TopP(p=0.95))),
    end_ids=(2, 3, 4, 5, 6),
    stream_every=3,
)


def model(**rest):
    return llama(
        vocab_size=VOCABULARY, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=8,
        max_length=32, head=LinearHead(), **rest,
    )  # fmt: skip


@functools.cache
def view(scan=False):
    network = model(depth=Sequential(scan=scan))
    tokens = jnp.zeros((1, 4), int)
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), tokens, positions=tokens, segments=tokens + 1)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.6, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes["params"]),
    )
    return View(model=network, params=params)


@jax.jit
def _full_logits(params, tokens, positions, segments):
    out = model().apply({"params": params}, tokens, positions=positions, segments=segments)
    return model().apply({"params": params}, out.hidden, method="logits")


def logits_of(texts):
    """Logits after every token of every text, by one uncached forward pass."""
    tokens, lengths = np.zeros((4, 32), np.int32), np.zeros((4, 1), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        lengths[row] = len(text)
    positions = np.broadcast_to(np.arange(32), (4, 32))
    logits = _full_logits(view().params, tokens, positions, (positions < lengths).astype(np.int32))
    return [np.asarray(row[: len(text)], np.float64) for row, text in zip(logits, texts)]  # noqa: B905


def log_softmax(row):
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def texts_of(prompts, generation):
    rows = zip(prompts, generation.tokens, generation.lengths, strict=True)
    return [[*prompt, *tokens[:length].tolist()] for prompt, tokens, length in rows]


@functools.cache
def greedy():
    return GREEDY(view(), PROMPTS, key=KEY)


@functools.cache
def sampled():
    return SAMPLED(view(), PROMPTS, key=KEY)


def test_greedy_decoding_equals_the_naive_loop():
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(8):
        for text, logits in zip(texts, logits_of(texts), strict=True):
            text.append(int(logits[-1].argmax()))
    assert texts_of(PROMPTS, greedy()) == texts
    np.testing.assert_array_equal(greedy().lengths, [8] * 4)
    assert len({tuple(text[-4:]) for text in texts}) > 1  # the rows are not all alike


@pytest.mark.parametrize("run", [greedy, sampled])
def test_logp_model_is_the_log_softmax_of_the_full_forward(run):
    generation = run()
    texts = texts_of(PROMPTS, generation)
    for row, (prompt, logits) in enumerate(zip(PROMPTS, logits_of(texts), strict=True)):
        for place in range(generation.lengths[row]):
            logp = log_softmax(logits[len(prompt) + place - 1])
            expected = logp[texts[row][len(prompt) + place]]
            found = generation.logp_model[row, place]
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_logp_behaviour_is_that_of_the_shaped_distribution():
    generation = sampled()
    texts = texts_of(PROMPTS, generation)
    for row, (prompt, logits) in enumerate(zip(PROMPTS, logits_of(texts), strict=True)):
        for place in range(generation.lengths[row]):
            shaped = np.sort(logits[len(prompt) + place - 1] / 1.3)[::-1][:12]
            chances = np.exp(log_softmax(shaped))
            kept = chances[: int((np.cumsum(chances) - chances < 0.95).sum())]
            token = texts[row][len(prompt) + place]
            own = np.exp(log_softmax(shaped))[
                np.flatnonzero(shaped == logits[len(prompt) + place - 1][token] / 1.3)[0]
            ]
            found = generation.logp_behaviour[row, place]
            assert found == pytest.approx(np.log(own / kept.sum()), rel=1e-4, abs=1e-4)


def test_an_end_token_ends_its_row_and_counts():
    generation = sampled()
    assert len(set(generation.lengths.tolist())) > 1  # they end at different steps
    assert generation.lengths.min() < 12
    for tokens, length, *logps in zip(
        generation.tokens, generation.lengths, generation.logp_model, generation.logp_behaviour,
        strict=True,
    ):  # fmt: skip
        ends = np.isin(tokens[:length], SAMPLED.end_ids)
        assert not ends[:-1].any()
        assert ends[-1] or length == 12
        for after in (tokens, *logps):
            np.testing.assert_array_equal(after[length:], 0)


def test_a_row_depends_on_its_prompt_and_number_alone():
    whole = sampled()
    alone = SAMPLED(view(), PROMPTS[:1], key=KEY)
    others = SAMPLED(view(), [[7] * 18, PROMPTS[1], [1, 2], [9]], key=KEY)
    for other, row in ((alone, 0), (others, 1)):
        np.testing.assert_array_equal(other.tokens[row], whole.tokens[row])
        np.testing.assert_allclose(other.logp_model[row], whole.logp_model[row], atol=1e-4)
    # Equal prompts in different rows draw apart; another key draws anew.
    same = SAMPLED(view(), [PROMPTS[0]] * 4, key=KEY)
    assert len({tuple(row) for row in same.tokens.tolist()}) > 1
    again = SAMPLED(view(), PROMPTS, key=jax.random.key(8))
    assert (again.tokens != whole.tokens).any()


def test_streaming_writes_the_same_tokens_and_shows_each_prefix():
    shown = []
    streamed = SAMPLED(view(), PROMPTS, key=KEY, on_tokens=lambda *new: shown.append(new))
    for name in ("tokens", "lengths", "logp_model", "logp_behaviour"):
        np.testing.assert_array_equal(getattr(streamed, name), getattr(sampled(), name))
    # Looked at only now: what a caller keeps must not change under its hands.
    last = streamed.lengths.max()
    assert [tokens.shape[1] for tokens, _ in shown] == [*range(3, last, 3), last]
    for tokens, lengths in shown:
        width = tokens.shape[1]
        np.testing.assert_array_equal(tokens, sampled().tokens[:, :width])
        np.testing.assert_array_equal(lengths, np.minimum(sampled().lengths, width))


def test_a_caller_may_stop_rows():
    whole, calls = sampled(), []
    longest = int(whole.lengths.argmax())
    assert whole.lengths[longest] > 6

    def on_tokens(tokens, lengths):
        calls.append(tokens.shape[1])
        return (np.arange(4) == longest) & (tokens.shape[1] >= 6)

    stopped = SAMPLED(view(), PROMPTS, key=KEY, on_tokens=on_tokens)
    expected = whole.lengths.copy()
    expected[longest] = 6
    np.testing.assert_array_equal(stopped.lengths, expected)
    for row, length in enumerate(expected):
        np.testing.assert_array_equal(stopped.tokens[row, :length], whole.tokens[row, :length])
        np.testing.assert_array_equal(stopped.tokens[row, length:], 0)
    calls.clear()
    ended = SAMPLED(
        view(), PROMPTS, key=KEY, on_tokens=lambda t, n: calls.append(1) or np.ones(4, bool)
    )
    assert len(calls) == 1
    np.testing.assert_array_equal(ended.lengths, np.minimum(whole.lengths, 3))


def test_the_bound_on_new_tokens_is_kept_at_the_end_of_the_context():
    generation = SAMPLED(view(), [[1] * 20] * 3 + [[1] * 19], key=KEY)
    assert generation.tokens.shape == (4, 12) and generation.lengths.max() <= 12
    with pytest.raises(UserError, match=r"21 tokens and 12 new ones exceed .* context of 32"):
        SAMPLED(view(), [[1] * 21, [1]], key=KEY)


def test_prompts_that_cannot_be_decoded_are_user_errors():
    with pytest.raises(UserError, match="a prompt has no token"):
        GREEDY(view(), [[1], []], key=KEY)
    for wrong in (-1, VOCABULARY):
        with pytest.raises(UserError, match=f"has token {wrong}, and the model knows 0 to 22"):
            GREEDY(view(), [[1, wrong]], key=KEY)
    with pytest.raises(UserError, match="there is no prompt"):
        GREEDY(view(), [], key=KEY)


def test_prompts_of_other_lengths_compile_nothing():
    sampled()
    sizes = _prefill._cache_size(), _decode._cache_size()
    again = config.load(config.dump(SAMPLED))
    for prompts in ([[1], [2] * 16, [3] * 7, [4]], [[2] * 4] * 4):
        again(view(), prompts, key=jax.random.key(1))
        again(view(), prompts, key=jax.random.key(2), on_tokens=lambda tokens, lengths: None)
    assert (_prefill._cache_size(), _decode._cache_size()) == sizes


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_prompts_that_wait_for_a_slot_are_decoded_as_if_they_had_not(slots):
    few = dataclasses.replace(SAMPLED, slots=slots)
    found, shown = few(view(), PROMPTS, key=KEY), []
    few(view(), PROMPTS, key=KEY, on_tokens=lambda *new: shown.append(new))
    for name in ("tokens", "lengths"):
        np.testing.assert_array_equal(getattr(found, name), getattr(sampled(), name))
    np.testing.assert_allclose(found.logp_model, sampled().logp_model, atol=1e-4)
    np.testing.assert_array_equal(shown[-1][0], found.tokens[:, : found.lengths.max()])
    assert any((lengths == 0).any() for _, lengths in shown)  # some waited
    for name in ("tokens", "block_tokens", "attended_pairs", "cache_entries", "flops"):
        expected = float(getattr(sampled().ledger, name))
        assert float(getattr(found.ledger, name)) == pytest.approx(expected)


def test_slots_that_are_filled_again_compile_once():
    few = dataclasses.replace(SAMPLED, slots=2)
    few(view(), PROMPTS, key=KEY)
    sizes = _prefill._cache_size(), _decode._cache_size(), _insert._cache_size()
    few(view(), PROMPTS[::-1] * 2, key=jax.random.key(3))
    assert (_prefill._cache_size(), _decode._cache_size(), _insert._cache_size()) == sizes


@pytest.mark.parametrize("chunk", [1, 5, 16, 40])
def test_prompts_read_in_chunks_give_the_same(chunk):
    found = dataclasses.replace(SAMPLED, prefill_chunk=chunk)(view(), PROMPTS, key=KEY)
    np.testing.assert_array_equal(found.tokens, sampled().tokens)
    np.testing.assert_allclose(found.logp_model, sampled().logp_model, atol=1e-4)
    for name in ("tokens", "attended_pairs", "flops"):
        assert float(getattr(found.ledger, name)) == float(getattr(sampled().ledger, name))


@pytest.mark.parametrize("change", [{"slots": 0}, {"prefill_chunk": 0}, {"stream_every": -1}])
def test_impossible_decoders_are_refused(change):
    with pytest.raises(UserError, match="must be at least 1"):
        Autoregressive(**change)


def test_a_scanned_model_decodes_as_the_unrolled_one():
    scanned = view(scan=True)
    network, params = unrolled(scanned.model, scanned.params)
    sizes = _prefill._cache_size(), _decode._cache_size()
    expected = GREEDY(View(model=network, params=params), PROMPTS, key=KEY)
    found = GREEDY(scanned, PROMPTS, key=KEY)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logp_model, expected.logp_model, rtol=1e-5)
    assert _decode._cache_size() <= sizes[1] + 1  # the two are one model to the compiler


@pytest.mark.parametrize("run", [greedy, sampled])
def test_the_ledger_is_what_one_counts_by_hand(run):
    generation = run()
    new = generation.lengths.tolist()
    lengths = [len(prompt) + count for prompt, count in zip(PROMPTS, new, strict=True)]
    steps = max(new)
    ledger = generation.ledger
    assert float(ledger.passes) == 1 + steps
    assert float(ledger.tokens) == sum(lengths)
    # Prompts are read in rows of 16 slots; then every step computes every row.
    assert float(ledger.slots) == 4 * 16 + 4 * steps
    assert float(ledger.block_tokens) == 2 * sum(lengths)
    # Each token attends to itself and all before it, in each of two layers.
    pairs = 2 * sum(n * (n + 1) // 2 for n in lengths)
    assert float(ledger.attended_pairs) == pairs
    assert float(ledger.cache_entries) == 2 * sum(lengths)
    assert float(ledger.cache_bytes) == 2 * sum(lengths) * 2 * 1 * 4 * 4  # k and v, 4 floats each
    # Matrices of a layer: q and out 8x8, k and v 8x4, three of 8x8; 2 heads of width 4.
    per_token = 2 * (2 * 64 + 2 * 32 + 3 * 64)
    projected = len(PROMPTS) + sum(new)
    flops = 2 * sum(lengths) * per_token + pairs * 2 * 2 * 2 * 4 + projected * 2 * VOCABULARY * 8
    assert float(ledger.flops) == flops


@settings(deadline=None, max_examples=15)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=16), min_size=4, max_size=4
    )
)
def test_any_prompts_decode_as_the_full_forward_says(prompts):
    generation = GREEDY(view(), prompts, key=KEY)
    for prompt, logits, text in zip(
        prompts,
        logits_of(texts_of(prompts, generation)),
        texts_of(prompts, generation),
        strict=True,
    ):
        for place in range(len(prompt), len(text)):
            row = logits[place - 1]
            assert row[text[place]] > row.max() - 1e-4  # equal, or a tie to within rounding

"""Beam search against all continuations there are."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decode.test_speculative import view
from tokenlab import config
from tokenlab.core.errors import UserError
from tokenlab.decode import Autoregressive, BeamSearch, Greedy, RepetitionPenalty
from tokenlab.decode.beam import _search

KEY = jax.random.key(0)
PROMPTS = [[1, 2, 0, 3], [2], [3, 3, 1, 0, 2, 1]]
VOCABULARY, LENGTH, END = 4, 3, 3


def target():
    return view(vocabulary=VOCABULARY, scale=0.9)


def best_of_all(prompt, alpha):
    """The continuation of the highest rank, by one forward pass over each."""
    texts = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
    tokens = np.asarray([[*prompt, *text] for text in texts], np.int32)
    where = {
        "positions": jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        "segments": jnp.ones(tokens.shape, int),
    }
    out = target()(jnp.asarray(tokens), **where)
    logp = np.asarray(jax.nn.log_softmax(target()(out.hidden, method="logits"), axis=-1))
    ranked = {}
    for row, text in enumerate(texts):
        length = text.index(END) + 1 if END in text else LENGTH
        at = range(len(prompt) - 1, len(prompt) - 1 + length)
        total = sum(logp[row, place, text[i]] for i, place in enumerate(at))
        ranked[text[:length]] = total / length**alpha
    return max(ranked.items(), key=lambda item: item[1])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all(alpha):
    decoder = BeamSearch(beams=16, alpha=alpha, max_new_tokens=LENGTH, end_ids=(END,))
    found = decoder(target(), PROMPTS, key=KEY)
    for row, prompt in enumerate(PROMPTS):
        text, score = best_of_all(prompt, alpha)
        assert tuple(found.tokens[row, : found.lengths[row]]) == text
        assert found.statistics["score"][row] == pytest.approx(score, abs=1e-4)
        total = found.logp_model[row, : found.lengths[row]].sum()
        assert total / len(text) ** alpha == pytest.approx(score, abs=1e-4)
        np.testing.assert_array_equal(found.tokens[row, found.lengths[row] :], 0)


def test_one_beam_is_greedy():
    for processors in ((), (RepetitionPenalty(penalty=1.7),)):
        search = BeamSearch(beams=1, max_new_tokens=12, end_ids=(), processors=processors)
        plain = Autoregressive(max_new_tokens=12, end_ids=(), sampler=Greedy(processors=processors))
        found, expected = (one(view(), PROMPTS, key=KEY) for one in (search, plain))
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.logp_model, expected.logp_model, atol=1e-4)
        assert float(found.ledger.attended_pairs) == float(expected.ledger.attended_pairs)
        assert float(found.ledger.passes) == float(expected.ledger.passes)


def test_more_beams_find_no_less_likely_text_and_rows_are_apart():
    scores = []
    for beams in (1, 4):
        decoder = BeamSearch(beams=beams, alpha=0.0, max_new_tokens=8, end_ids=())
        whole = decoder(view(), PROMPTS, key=KEY)
        alone = decoder(view(), PROMPTS[1:2], key=KEY)
        np.testing.assert_array_equal(whole.tokens[1], alone.tokens[0])
        scores.append(whole.statistics["score"])
    assert (scores[1] >= scores[0] - 1e-4).all() and (scores[1] > scores[0] + 1e-4).any()


def test_it_compiles_once_and_is_its_own_config():
    decoder = BeamSearch(beams=2, max_new_tokens=5)
    decoder(view(), PROMPTS, key=KEY)
    size = _search._cache_size()
    again = config.load(config.dump(decoder))
    assert again == decoder
    again(view(), PROMPTS[::-1], key=KEY)
    assert _search._cache_size() == size
    with pytest.raises(UserError, match="at least 1"):
        dataclasses.replace(decoder, beams=0)

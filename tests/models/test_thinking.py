"""Thoughts behind every token, against each of them read alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.attending import Even
from tests.models.thoughts import (
    LENGTH,
    LOUD,
    VOCABULARY,
    batch_of,
    chain,
    inputs,
    mixed,
    params_of,
    plain,
    run,
    thinker,
)
from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.depth import MixtureOfRecursions, Recursive, Sequential
from tokenlab.models import ThinkingTransformer, thinking

KEY = jax.random.key(7)


def test_a_model_that_has_not_learned_to_think_is_the_plain_one_exactly():
    bare, batch = plain(), batch_of()
    params = params_of(bare)
    model, ours = thinking(bare, params, like=5, key=KEY, thought=2)
    assert isinstance(model, ThinkingTransformer) and model.thought == 2
    expected = run(bare, params, batch).hidden
    # Products of matrices of another height round otherwise.
    np.testing.assert_allclose(run(model, ours, batch).hidden, expected, atol=3e-6)
    thoughts = run(model, ours, batch, KEY, method="think")
    np.testing.assert_allclose(thoughts.before, expected, atol=3e-6)
    for ahead in range(2):
        there = np.asarray(thoughts.there[ahead])
        for after in thoughts.after[:, ahead]:
            np.testing.assert_array_equal(after[there], thoughts.before[there])
    np.testing.assert_array_equal(thoughts.share, 0)
    for mark in ours["marks"]:
        np.testing.assert_allclose(LOUD * mark, params["embedding"][5], rtol=1e-6)
    # Of another stream it is not.
    assert np.abs(run(model, params_of(model), batch).hidden - expected).max() > 0.1


@pytest.mark.parametrize("depth", [Sequential(scan=True), Recursive(recursions=2)])
def test_thoughts_at_once_are_thoughts_one_by_one(depth):
    """Two sampled tokens, three said after them; documents that are packed, and padding."""
    model = thinker(thought=2, talk=3, samples=2, num_layers=4, depth=depth)
    params, batch = params_of(model), batch_of(lengths=[[LENGTH], [4, 3]])
    thoughts = run(model, params, batch, KEY, method="think")
    tokens, segments, positions = (
        np.asarray(batch[n]) for n in ("tokens", "segments", "positions")
    )
    compared = 0
    for row, at in np.argwhere(segments > 0):
        first = at - positions[row, at]
        for sample in range(2):
            drawn = thoughts.drawn[sample, :, row, at]
            last = int(np.sum(segments[row] == segments[row, at])) + first
            said = tokens[row, at + 1 : min(at + 3, last)]
            alone = chain(model, params, tokens[row, first : at + 1], drawn, said)
            own = at - first + 1
            for step in range(2):
                np.testing.assert_allclose(
                    thoughts.drawing[sample, step, row, at], alone[own + step], atol=1e-5
                )
            for ahead in range(1 + len(said)):
                before = chain(model, params, tokens[row, first : at + ahead + 1], [], [])
                before = before[own + ahead - 1]
                stream, share = mixed(
                    params, np.asarray(before), np.asarray(alone[own + 3 + ahead])
                )
                np.testing.assert_allclose(
                    thoughts.after[sample, ahead, row, at + ahead], stream, atol=1e-5
                )
                np.testing.assert_allclose(
                    thoughts.share[sample, ahead, row, at + ahead], share, atol=1e-5
                )
                assert thoughts.there[ahead, row, at + ahead]
                compared += 1
    assert compared == 2 * int(thoughts.there.sum())
    assert np.any(thoughts.drawn[0] != thoughts.drawn[1])


def test_without_random_numbers_a_thought_is_of_the_most_likely_tokens():
    model = thinker(thought=3)
    params, batch = params_of(model), batch_of()
    thoughts = run(model, params, batch, method="think")
    best = jnp.argmax(thoughts.drawing @ params["embedding"].T, axis=-1)
    np.testing.assert_array_equal(thoughts.drawn, best)
    hidden = run(model, params, batch).hidden
    np.testing.assert_allclose(thoughts.after[0, 0], hidden, atol=1e-5)


def test_tokens_are_drawn_as_likely_as_the_model_says():
    """Chi-square over one position's draws, of which all are equal before the draw."""
    model = thinker(samples=1500)
    params = params_of(model)
    batch = jax.tree.map(lambda x: x[:1, :1], batch_of())
    thoughts = run(model, params, batch, KEY, method="think")
    chances = jax.nn.softmax(thoughts.drawing[0, 0, 0, 0] @ params["embedding"].T)
    found = np.bincount(np.asarray(thoughts.drawn).ravel(), minlength=VOCABULARY)
    often = np.asarray(chances) * 1500 > 5
    expected = np.append(np.asarray(chances)[often], np.asarray(chances)[~often].sum()) * 1500
    counts = np.append(found[often], found[~often].sum())
    distance = np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-9))
    assert distance < 2.5 * len(counts) + 20


def test_pause_tokens_are_the_first_mark_again():
    model = thinker(thought=2, kind="pauses", talk=1, samples=1)
    params, batch = params_of(model), batch_of(rows=1)
    marked = params | {"embedding": params["embedding"].at[0].set(LOUD * params["marks"][0])}
    thoughts = run(model, params, batch, method="think")
    assert thoughts.drawn.shape == (1, 0, 1, LENGTH)
    tokens = np.asarray(batch["tokens"][0])
    for at in (0, 4):
        alone = chain(model, marked, tokens[: at + 1], [0, 0], [])
        stream = mixed(params, alone[at], alone[-1])[0]
        np.testing.assert_allclose(thoughts.after[0, 0, 0, at], stream, atol=1e-5)


def test_no_later_token_reaches_a_stream():
    model = thinker(thought=2)
    params, batch = params_of(model), batch_of(rows=1)

    def stream(x):
        view = View(model=model, params=params)
        return view(batch["tokens"], **inputs(batch), embeddings=x).hidden[0, 4]

    x = params["embedding"][batch["tokens"]]
    some = jax.random.normal(KEY, (model.dim,))
    seen = jnp.abs(jax.jit(jax.grad(lambda x: stream(x) @ some))(x)).sum(axis=(0, 2))
    assert np.all(seen[:5] > 0) and np.all(seen[5:] == 0)


@pytest.mark.parametrize("kind", ["drawn", pytest.param("pauses", marks=pytest.mark.slow)])
def test_decoding_thinks_as_a_pass_over_the_whole_row(kind):
    model = thinker(thought=2, kind=kind)
    params = params_of(model)
    prompts = [[5, 7, 4], [9, 3, 3, 11, 6]]
    decoder = Autoregressive(max_new_tokens=4, sampler=Greedy(), end_ids=())
    view = View(model=model, params=params)
    written = decoder(view, prompts, key=KEY)
    again = decoder(view, prompts, key=KEY)
    np.testing.assert_array_equal(written.tokens, again.tokens)
    alone = decoder(view, prompts[:1], key=KEY)
    np.testing.assert_array_equal(alone.tokens[0], written.tokens[0])
    for prompt, tokens in zip(prompts, written.tokens, strict=True):
        row = [*prompt, *tokens]
        batch = {
            "tokens": jnp.asarray([row]), "positions": jnp.arange(len(row))[None],
            "segments": jnp.ones((1, len(row)), jnp.int32),
        }  # fmt: skip
        hidden = run(model, params, batch).hidden[0, len(prompt) - 1 : -1]
        np.testing.assert_array_equal(jnp.argmax(hidden @ params["embedding"].T, axis=-1), tokens)
    bare = decoder(View(model=plain(), params=params), prompts, key=KEY)
    assert written.ledger.flops > 2 * bare.ledger.flops
    assert written.ledger.cache_entries == bare.ledger.cache_entries
    assert written.ledger.attended_pairs > bare.ledger.attended_pairs


def test_the_ledger_counts_rows_thoughts_and_the_passes_that_drew_them():
    model = thinker(thought=2, talk=3, samples=2)
    params, batch = params_of(model), batch_of()
    output = run(model, params, batch, KEY, method="think").output
    ledger = model.ledger(output.trace, **inputs(batch))
    # Passes over rows and 1 and 2 tokens of a branch draw; the last has two marks, 2 drawn, 2 said,
    # of which those of the last positions are not there.
    missing = 2 * (1 + 2)  # of each sample
    slots = 2 * (2 * LENGTH * (2 + 3 + 7) - missing)
    assert ledger.block_tokens == 2 * slots
    assert ledger.tokens == 2 * LENGTH
    kinds = model.block
    per_token = kinds.mixer.flops(model.dim) + kinds.feedforward.flops(model.dim)
    # Drawn once to think and once to learn, said thrice, and before a thought.
    projected = 2 * LENGTH * (2 * 2 + 2 * 2 + 2 * 3 + 1) * 2 * VOCABULARY * model.dim
    pairs = 0
    for branch, said in ((1, 0), (2, 0), (4, 2)):
        for at in range(LENGTH):
            own = branch + min(said, LENGTH - 1 - at)
            pairs += (at + 1) + own * (at + 1) + own * (own + 1) // 2
    pairs *= 2 * 2 * 2
    assert ledger.attended_pairs == pairs
    per_pair = kinds.mixer.flops_per_pair(model.dim)
    np.testing.assert_allclose(
        ledger.flops, 2 * slots * per_token + pairs * per_pair + projected, rtol=1e-6
    )


def test_bfloat16_and_learned_positions_stay_near():
    model = thinker(thought=1, learned_positions=True, max_length=32)
    params, batch = params_of(model), batch_of()
    wide = run(model, params, batch).hidden
    narrow = run(model.clone(dtype="bfloat16"), params, batch).hidden
    assert narrow.dtype == jnp.bfloat16
    # A thought may be another one where two tokens are about as likely.
    near = np.abs(np.asarray(narrow, np.float32) - np.asarray(wide)).max(axis=-1) < 0.2
    assert near.mean() > 0.7


def test_parts_that_know_no_branches_are_refused():
    block = thinker().block
    other = block.clone(mixer=block.mixer.clone(rule=Even()))
    for message, model in (
        ("Sequential or Recursive", thinker(num_layers=4, depth=MixtureOfRecursions(recursions=2))),
        ("rule of ranges", thinker(block=other)),
    ):
        params = params_of(model)
        with pytest.raises(UserError, match=message):
            run(model, params, batch_of())


def test_prompts_in_parts_and_impossible_fields_are_refused():
    model = thinker()
    view = View(model=model, params=params_of(model))
    decoder = Autoregressive(max_new_tokens=2, prefill_chunk=2)
    with pytest.raises(UserError, match="prefill_chunk"):
        decoder(view, [[5, 7, 4]], key=KEY)
    with pytest.raises(ValueError, match="samples 0"):
        thinker(samples=0)

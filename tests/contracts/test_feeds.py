"""Every public feed, in the decoder, against a loop that reads all embeddings again."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from switching import PlainSwitching

import tokenlab.decode
from tokenlab import config
from tokenlab.core.context import View
from tokenlab.decode import (
    Autoregressive,
    Categorical,
    Feed,
    Greedy,
    SwitchCap,
    SwitchingFeed,
    SwitchSignals,
    ThoughtFeed,
    TokenFeed,
)
from tokenlab.decode.autoregressive import _decode, _prefill
from tokenlab.models import llama
from tokenlab.models.mixtures import DirichletDraw, MeanOfSamples

VOCABULARY, NEW, SCALE = 23, 8, 3.0
PROMPTS = [[1, 4, 9, 2, 7], [3], [5, 5, 6, 1, 8, 2, 2, 9, 11]]
KEY = jax.random.key(7)
TABLE = {
    TokenFeed: (TokenFeed(),),
    ThoughtFeed: (
        ThoughtFeed(count=3, record=True),
        ThoughtFeed(count=4, mixture=MeanOfSamples(count=3), record=True),
        ThoughtFeed(count=2, mixture=DirichletDraw(), record=True),
    ),
    SwitchingFeed: (
        SwitchingFeed(
            think=1, close=2, dwell=1, record=NEW,
            signals=SwitchSignals(to_latent=0.5, horizon=12, newline=4),
        ),
        SwitchingFeed(
            think=1, close=2, literal=(5, 6), dwell=2, signals=None, record=NEW,
            cap=SwitchCap(most=1, answer=(7,), budget=3, locks=True),
        ),
    ),
}  # fmt: skip
PARTS = [part for parts in TABLE.values() for part in parts]
every = pytest.mark.parametrize("feed", PARTS, ids=str)


@functools.cache
def view(dtype="float32"):
    network = llama(
        vocab_size=VOCABULARY, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=8,
        max_length=32, dtype=dtype, embedding_scale=SCALE,
    )  # fmt: skip
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


def decoder(feed, **changes):
    changes = {"max_new_tokens": NEW, "sampler": Greedy(), "end_ids": ()} | changes
    return Autoregressive(feed=feed, **changes)


@functools.cache
def written(feed):
    return decoder(feed)(view(), PROMPTS, key=KEY)


@functools.partial(jax.jit, static_argnums=0)
def last_logits(model, params, embeddings, length):
    tokens = jnp.zeros(embeddings.shape[:2], int)
    positions = jnp.arange(embeddings.shape[1])[None]
    out = model.apply(
        {"params": params}, tokens, positions=positions,
        segments=(positions < length).astype(jnp.int32), embeddings=embeddings,
    )  # fmt: skip
    return model.apply({"params": params}, out.hidden, method="logits")[0, length - 1]


def test_the_table_holds_every_public_member():
    found = {
        member
        for member in vars(tokenlab.decode).values()
        if inspect.isclass(member) and issubclass(member, Feed) and not inspect.isabstract(member)
    }
    assert found == set(TABLE)


@every
def test_equals_the_naive_loop(feed):
    """No cache, no jit of the loop; mixtures are embedded in NumPy."""
    model, params = view().model, view().params
    table = np.asarray(params["embedding"], np.float64) * SCALE
    generation = written(feed)
    thoughts = feed.count if isinstance(feed, ThoughtFeed) else 0
    for row, prompt in enumerate(PROMPTS):
        read = [table[token] for token in prompt]
        own = jax.random.fold_in(KEY, row)
        switching = PlainSwitching(feed) if isinstance(feed, SwitchingFeed) else None
        for number in range(generation.lengths[row]):
            padded = np.zeros((1, 32, 8), np.float32)
            padded[0, : len(read)] = read
            logits = last_logits(model, params, jnp.asarray(padded), len(read))
            token, shares, stop = int(np.argmax(logits)), None, False
            if switching is not None:
                token, shares, stop = switching.step(number, token, np.asarray(logits))
                assert stop == (number == generation.lengths[row] - 1 and number < NEW - 1)
            assert generation.tokens[row, number] == token
            if shares is not None:
                read.append(shares @ table)
            elif number < thoughts:
                here = jax.random.fold_in(own, len(prompt) + number)
                mixture = feed.mixture(logits=logits[None], keys=here[None])[0]
                found = generation.statistics["thoughts"][row, number]
                np.testing.assert_allclose(found, mixture, rtol=1e-3, atol=1e-4)
                read.append(found.astype(np.float64) @ table)
                p = np.asarray(jax.nn.softmax(logits), np.float64)
                entropy = generation.statistics["thought_entropy"][row, number]
                assert entropy == pytest.approx(-(p * np.log(p)).sum(), rel=1e-3, abs=1e-4)
            else:
                read.append(table[token])
        if switching is not None:
            count, statistics = generation.lengths[row], generation.statistics
            assert statistics["explicit"][row, :count].tolist() == switching.modes
            found = statistics["entropy"][row, :count]
            np.testing.assert_allclose(found, switching.entropies, rtol=1e-3, atol=1e-4)
            assert statistics["switches"][row] == switching.turns


@every
def test_a_row_depends_on_its_prompt_and_number_alone(feed):
    """Other neighbours, other padding."""
    whole = written(feed)
    others = decoder(feed)(view(), [PROMPTS[0], [2] * 14, PROMPTS[2]], key=KEY)
    for row in (0, 2):
        np.testing.assert_array_equal(others.tokens[row], whole.tokens[row])
        for name, values in whole.statistics.items():
            np.testing.assert_allclose(
                others.statistics[name][row], values[row], rtol=1e-4, atol=1e-5
            )


def test_a_slot_that_another_row_had_begins_anew():
    feed = PARTS[1]
    whole, waiting = written(feed), decoder(feed, slots=1)(view(), PROMPTS, key=KEY)
    np.testing.assert_array_equal(waiting.tokens, whole.tokens)
    for name, values in whole.statistics.items():
        np.testing.assert_allclose(waiting.statistics[name], values, rtol=1e-4, atol=1e-5)


@every
def test_the_second_call_compiles_nothing(feed):
    written(feed)
    compiled = _prefill._cache_size(), _decode._cache_size()
    again = config.load(config.dump(decoder(feed)))
    again(view(), [prompt[::-1] for prompt in PROMPTS], key=jax.random.key(8))
    assert (_prefill._cache_size(), _decode._cache_size()) == compiled


def test_bfloat16_models_decode():
    generation = decoder(PARTS[1])(view(dtype="bfloat16"), PROMPTS, key=KEY)
    assert np.isfinite(generation.logp_model).all()
    assert (generation.lengths == NEW).all()


@every
def test_is_its_own_config(feed):
    assert config.load(config.dump(feed)) == feed
    if not isinstance(feed, TokenFeed):
        assert "Reference: " in inspect.getdoc(type(feed))


def test_reading_tokens_is_what_it_was():
    assert Autoregressive() == Autoregressive(feed=TokenFeed())
    nothing = decoder(ThoughtFeed(count=0))(view(), PROMPTS, key=KEY)
    np.testing.assert_array_equal(nothing.tokens, written(TokenFeed()).tokens)


def test_one_sample_per_thought_is_ordinary_sampling():
    """The same keys draw the same tokens, and reading the token is reading the mixture."""
    sampler = Categorical()
    expected = decoder(TokenFeed(), sampler=sampler)(view(), PROMPTS, key=KEY)
    feed = ThoughtFeed(count=4, mixture=MeanOfSamples(count=1), record=True)
    found = decoder(feed, sampler=sampler)(view(), PROMPTS, key=KEY)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.statistics["thoughts"].argmax(axis=2), found.tokens[:, :4])


def test_a_thought_costs_the_mixing_of_all_embeddings():
    plain, thinking = (written(feed).ledger for feed in (TokenFeed(), ThoughtFeed(count=3)))
    assert thinking.flops - plain.flops == pytest.approx(3 * 3 * 2 * VOCABULARY * 8, rel=1e-4)
    same = {"flops": 0.0}
    assert dataclasses.replace(plain, **same) == dataclasses.replace(thinking, **same)


def test_a_negative_number_of_thoughts_is_refused():
    with pytest.raises(ValueError, match="must be 0 or more"):
        ThoughtFeed(count=-1)

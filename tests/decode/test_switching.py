"""Switch-thinking: the known cases, and what it is where one of its parts is switched off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from switching import PlainSwitching

from tokenlab.core.context import View
from tokenlab.decode import (
    Autoregressive,
    Draw,
    History,
    SwitchCap,
    SwitchingFeed,
    SwitchSignals,
    TokenFeed,
    usual_sampler,
)
from tokenlab.decode.feeds import entering
from tokenlab.models import llama

VOCABULARY, THINK, CLOSE, SCALE = 19, 3, 4, 2.0
PROMPTS = [[5, 8, 2], [7], [9, 9, 1, 6, 6, 2, 10]]
SAMPLER = usual_sampler(temperature=0.6, top_k=20, top_p=0.95)
KEY = jax.random.key(3)


def feed(**changes):
    return SwitchingFeed(**({"think": THINK, "close": CLOSE} | changes))


@functools.cache
def view():
    network = llama(
        vocab_size=VOCABULARY, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, hidden_dim=8,
        max_length=64, embedding_scale=SCALE,
    )  # fmt: skip
    ids = jnp.zeros((1, 4), int)
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), ids, positions=ids, segments=ids + 1)
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), jnp.float32),
        nn.meta.unbox(shapes["params"]),
    )
    return View(model=network, params=params)


def written(part, **changes):
    decoder = Autoregressive(
        feed=part, sampler=SAMPLER, **({"max_new_tokens": 24, "end_ids": ()} | changes)
    )
    return decoder(view(), PROMPTS, key=KEY)


def logits_of_entropy(wanted):
    """A peak over equal others, by bisection of its height."""
    low, high = 0.0, 50.0
    for _ in range(80):
        peak = (low + high) / 2
        p = np.exp([peak, *np.zeros(VOCABULARY - 1)])
        p /= p.sum()
        low, high = (peak, high) if -(p * np.log(p)).sum() > wanted else (low, peak)
    return np.array([peak, *np.zeros(VOCABULARY - 1)], np.float32)


@functools.partial(jax.jit, static_argnums=0)
def one_step(part, token, logits, state, number):
    n = number[None]
    zero = jnp.zeros(1, jnp.float32)
    draw = Draw(token[None], zero, zero, jnp.ones(1, bool))
    history = History(jnp.zeros((1, 64), jnp.int32), n + 1, jnp.ones(1, jnp.int32))
    keys = jax.random.split(KEY, 1)
    return part(draw, logits[None], state, history=history, keys=keys)


def run(part, entropies, tokens=None):
    """One row whose predictions have these entropies, step by step."""
    state = part.init(batch=1, vocabulary=VOCABULARY)
    steps = []
    for number, wanted in enumerate(entropies):
        token = 10 if tokens is None else tokens[number]
        logits = logits_of_entropy(wanted)
        fed = one_step(part, jnp.int32(token), logits, state, jnp.int32(number))
        state = fed.state
        steps.append(fed)
    return steps


KNOWN = (2.0, 1.5, 1.8, 1.9, 1.2, 1.3, 1.6)


def test_the_known_course_of_modes():
    steps = run(feed(dwell=2), KNOWN)
    assert [int(step.state.explicit[0]) for step in steps] == [0, 1, 1, 0, 1, 1, 0]
    assert int(steps[-1].state.switches[0]) == 2
    assert float(steps[-1].state.reference[0]) == pytest.approx(1.6, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_long_courses_are_those_of_the_plain_rule(seed):
    """All parts on; closes are queued and answered, from the third seed on drawn as well."""
    rng = np.random.default_rng(seed)
    part = feed(
        dwell=seed % 2,
        literal=(11,),
        signals=SwitchSignals(to_latent=0.3, horizon=20, newline=7),
        cap=SwitchCap(most=2, answer=(12, 13), budget=5, locks=seed == 3),
    )
    entropies = rng.uniform(0.5, 2.5, size=40)
    tokens = rng.choice([10, 11, 14], size=40)
    tokens[9:] = CLOSE if seed == 2 else tokens[9:]
    plain = PlainSwitching(part)
    for number, step in enumerate(run(part, entropies, tokens)):
        token, shares, stop = plain.step(
            number, int(tokens[number]), logits_of_entropy(entropies[number])
        )
        assert int(step.draw.token[0]) == token and bool(step.stop[0]) == stop
        assert bool(step.mixed[0]) == (shares is not None)
        if shares is not None:
            np.testing.assert_allclose(step.mixture[0], shares, atol=1e-5)
        if stop:
            break
    assert plain.turns >= 2 and stop == (plain.turns > 4)
    assert plain.locked == (seed >= 2)


def test_literal_tokens_alone_are_ordinary_sampling():
    """Also where the transcript is of several rows and each turns when it likes."""
    plain = written(TokenFeed())
    part = feed(dwell=1, signals=None, literal=tuple(range(VOCABULARY)))
    found = written(part)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert found.statistics["switches"].sum() > 3 and found.statistics["latent_steps"].sum() == 0
    thinking = written(feed(dwell=1, signals=None))
    assert (thinking.tokens != plain.tokens).any()


def test_beginning_with_tokens_and_never_turning_is_ordinary_sampling():
    part = feed(begins_explicit=True, dwell=None, signals=SwitchSignals(newline=2, horizon=9))
    found, plain = written(part), written(TokenFeed())
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_array_equal(found.logp_behaviour, plain.logp_behaviour)
    assert found.statistics["switches"].sum() == 0
    assert written(feed(begins_explicit=True, dwell=1)).statistics["latent_steps"].sum() > 0


def embedded(fed):
    model, params = view().model, view().params
    x, mixed = entering(model, params, fed)
    assert bool(mixed[0])
    return np.asarray(x[0, 0])


def test_a_certain_prediction_is_fed_as_its_token():
    part = feed(signals=None)
    logits = jnp.where(jnp.arange(VOCABULARY) == 8, 200.0, 0.0)
    state = part.init(batch=1, vocabulary=VOCABULARY)
    fed = one_step(part, jnp.int32(8), logits, state, jnp.int32(0))
    table = np.asarray(view().params["embedding"])
    np.testing.assert_allclose(embedded(fed), SCALE * table[8], rtol=1e-6)
    assert float(fed.state.reference[0]) == 0.0


def test_a_uniform_prediction_is_fed_as_the_mean_of_all_rows():
    part = feed(signals=None)
    state = part.init(batch=1, vocabulary=VOCABULARY)
    fed = one_step(part, jnp.int32(8), jnp.zeros(VOCABULARY), state, jnp.int32(0))
    table = np.asarray(view().params["embedding"])
    np.testing.assert_allclose(embedded(fed), SCALE * table.mean(axis=0), atol=1e-6)
    assert float(fed.state.reference[0]) == pytest.approx(np.log(VOCABULARY), rel=1e-6)


def test_the_first_turn_under_a_cap_of_one_is_closed_at_the_next_step():
    steps = run(feed(dwell=2, cap=SwitchCap(most=1)), KNOWN)
    assert [int(step.draw.token[0]) for step in steps] == [10, 10, CLOSE, 10, 10, CLOSE, 10]
    assert not any(bool(step.state.locked[0]) for step in steps), "only a drawn close locks"
    locked = run(feed(dwell=2, cap=SwitchCap(most=1, locks=True)), KNOWN)
    assert [bool(step.state.locked[0]) for step in locked] == 2 * [False] + 5 * [True]
    assert [int(step.state.explicit[0]) for step in locked] == [0] + 6 * [1]
    drawn = run(feed(dwell=2), KNOWN, tokens=[10, 10, CLOSE, 10, 10, 10, 10])
    assert [int(step.state.explicit[0]) for step in drawn] == [0] + 6 * [1]


def test_beyond_twice_the_cap_the_answer_begins_and_the_row_ends():
    entropies = [2.0, 1.0] + 2 * [1.5, 0.9] + 9 * [0.9]
    part = feed(dwell=1, cap=SwitchCap(most=1, answer=(12, 13), budget=5))
    steps = run(part, entropies)
    # The first three turns are at steps 1, 3 and 5; a row turns back at 2 and 4.
    assert [int(step.state.switches[0]) for step in steps[:6]] == [0, 1, 1, 2, 2, 3]
    tokens = [int(step.draw.token[0]) for step in steps[:11]]
    assert tokens == [10, 10, CLOSE, 10, CLOSE, 10, CLOSE, 12, 13, 10, 10]
    assert [bool(step.stop[0]) for step in steps[:11]] == 10 * [False] + [True]


def test_what_a_cap_writes_is_certain_and_has_its_probability_under_the_model():
    part = feed(dwell=1, record=24, cap=SwitchCap(most=1))
    found = written(part)
    forced = 0
    for row in range(len(PROMPTS)):
        explicit = found.statistics["explicit"][row].astype(bool)
        turns = np.flatnonzero(explicit[1:] & ~explicit[:-1]) + 2
        for place in turns[:2]:
            if place < found.lengths[row]:
                forced += 1
                assert found.tokens[row, place] == CLOSE
                assert found.logp_behaviour[row, place] == 0.0 > found.logp_model[row, place]
    assert forced >= 3


def test_a_row_that_has_ended_counts_no_further():
    """Its neighbours go on; what is said of it is what is said of it alone."""
    part = feed(dwell=1, record=24)
    tokens = written(part).tokens
    # A token that some row has early and others late or never.
    first = np.array(
        [[(row == i).argmax() if i in row else 24 for i in range(19)] for row in tokens]
    )
    end = int((first.max(axis=0) - first.min(axis=0)).argmax())
    found = written(part, end_ids=(end,))
    row = int(np.argmin(found.lengths))
    assert found.lengths[row] < found.lengths.max()
    for name in ("explicit", "entropy"):
        assert (found.statistics[name][row, found.lengths[row] :] == 0).all(), name
    assert found.statistics["latent_steps"][row] <= found.lengths[row]


@pytest.mark.parametrize(
    ("member", "fields"),
    [
        (SwitchSignals, {"to_latent": 1.5}),
        (SwitchSignals, {"horizon": 0}),
        (SwitchCap, {"most": 0}),
        (SwitchCap, {"most": 1, "budget": 0}),
        (SwitchingFeed, {"think": 1, "close": 2, "dwell": -1}),
    ],
)
def test_impossible_settings_are_refused(member, fields):
    with pytest.raises(ValueError, match="must be"):
        member(**fields)

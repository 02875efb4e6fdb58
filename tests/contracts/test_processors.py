"""Every public processor and sampler against NumPy, and what all of them promise."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenlab.decode
from tokenlab import config
from tokenlab.decode import (
    Categorical,
    FirstTokens,
    Greedy,
    History,
    MinP,
    PresencePenalty,
    Processor,
    RepetitionPenalty,
    ReSET,
    Sampler,
    Temperature,
    TopK,
    TopP,
    Typical,
)

VOCABULARY = 7


def softmax(row):
    shifted = np.exp(row - row.max())
    return shifted / shifted.sum()


def top_k(row, k):
    """A token stays if fewer than k are above it."""
    above = (row[None, :] > row[:, None]).sum(axis=1)
    return np.where(above < k, row, -np.inf)


def top_p(row, p):
    """A token stays if those above it hold less than p."""
    chances = softmax(row)
    before = np.array([chances[row > value].sum() for value in row])
    return np.where(before < p, row, -np.inf)


def min_p(row, p):
    return np.where(softmax(row) >= p * softmax(row).max(), row, -np.inf)


def first_tokens(row, count):
    return np.array([*row[:count], *[-np.inf] * (len(row) - count)])


def typical(row, p):
    """A token stays if those nearer to the entropy hold less than p."""
    chances = softmax(row)
    surprise = -np.log(np.where(chances > 0, chances, np.nan))
    distance = np.abs(surprise - np.nansum(chances * surprise))
    distance = np.where(chances > 0, distance, np.inf)
    before = np.array([chances[distance < own].sum() for own in distance])
    return np.where(before < p, row, -np.inf)


def by_entropy(row, threshold):
    """The first token of a row, whose step is itself."""
    chances = softmax(row)
    entropy = -np.sum(chances * np.log(np.where(chances > 0, chances, 1.0)))
    return row / (1.0 if entropy >= threshold else 0.3)


READ, WRITTEN = [1, 4, 2], [1, 5]  # what ``history`` holds


def repetition(row, penalty):
    seen = np.isin(np.arange(len(row)), READ + WRITTEN)
    return np.where(seen, np.where(row > 0, row / penalty, row * penalty), row)


def presence(row, penalty):
    return row - penalty * np.isin(np.arange(len(row)), WRITTEN)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Values of the one field, an oracle, values that are refused, and what it is like.

    One that goes by the numbers of tokens may rule out even the likeliest.
    """

    field: str
    values: tuple
    oracle: object
    refused: tuple
    paper: bool = True
    by_number: bool = False
    stateful: bool = False


PROCESSORS = {
    Temperature: Rule(
        "value", (0.3, 1.0, 2.5), lambda row, t: row / t, (0.0, -1.0, float("nan")), paper=False
    ),
    TopK: Rule("k", (1, 3, VOCABULARY, 50), top_k, (0, -2)),
    TopP: Rule("p", (1e-9, 0.2, 0.5, 0.93, 1.0), top_p, (0.0, 1.1, -0.1, float("nan"))),
    FirstTokens: Rule("count", (1, 4, VOCABULARY, 50), first_tokens, (0, -2), False, True),
    MinP: Rule("p", (0.0, 0.1, 0.5, 1.0), min_p, (-0.1, 1.1, float("nan"))),
    Typical: Rule("p", (1e-9, 0.2, 0.5, 0.93), typical, (0.0, 1.1, float("nan"))),
    RepetitionPenalty: Rule(
        "penalty", (1.0, 1.3, 0.5), repetition, (0.0, float("nan")), True, True
    ),
    ReSET: Rule("threshold", (0.0, 0.5, 1.2), by_entropy, (-1.0, float("nan")), stateful=True),
    PresencePenalty: Rule("presence", (0.0, 1.5, -1), presence, (200.0, float("nan")), False, True),
}
SAMPLERS = (Greedy, Categorical)
every_processor = pytest.mark.parametrize("member", PROCESSORS)
every_sampler = pytest.mark.parametrize("member", SAMPLERS)


def public(family):
    return {
        member
        for member in vars(tokenlab.decode).values()
        if inspect.isclass(member) and issubclass(member, family) and not inspect.isabstract(member)
    }


def test_the_tables_hold_every_public_member():
    assert public(Processor) == set(PROCESSORS)
    assert public(Sampler) == set(SAMPLERS)


def history(rows):
    """Three tokens read and two written in every row, and nothing of meaning behind them."""
    tokens = np.tile([*READ, *WRITTEN, 6, 3, 0], (rows, 1))
    return History(jnp.asarray(tokens), jnp.full(rows, 5), jnp.full(rows, 3))


def process(processor, logits):
    out, state = processor(
        jnp.asarray(logits, jnp.float32),
        processor.init(batch=len(logits)),
        history=history(len(logits)),
    )
    assert PROCESSORS[type(processor)].stateful or state == ()
    assert out.dtype == jnp.float32
    return np.asarray(out)


# Few distinct values make ties common; one value stands far below the rest.
LOGITS = st.lists(
    st.lists(
        st.sampled_from([-np.inf, -80.0, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0])
        | st.integers(-600, 600).map(lambda n: n / 100),
        min_size=VOCABULARY,
        max_size=VOCABULARY,
    ).filter(lambda row: max(row) > -np.inf),
    min_size=3,
    max_size=3,
)


def near_a_boundary(row, rule, value):
    """Whether rounding in float32 may rightly decide otherwise than float64."""
    if rule.oracle is typical:
        # Distances that differ by a rounding may come in any order.
        return True
    if rule.oracle not in (top_p, min_p, by_entropy) or value in (0.0, 1.0):
        return False
    low, high = (rule.oracle(row, value * (1 + error)) for error in (-1e-5, 1e-5))
    return not np.array_equal(low, high)


@every_processor
@settings(deadline=None, max_examples=60)
@given(logits=LOGITS, data=st.data())
def test_equals_the_oracle(member, logits, data):
    rule = PROCESSORS[member]
    value = data.draw(st.sampled_from(rule.values))
    rows = np.asarray(logits, np.float32).astype(np.float64)
    out = process(member(**{rule.field: value}), rows)
    for row, found in zip(rows, out, strict=True):
        expected = rule.oracle(row, value)
        if member is TopP and value == 1.0:
            # What float32 gives no chance at all may stay or go.
            found = np.where(softmax(row) > 1e-30, found, expected)
        if not near_a_boundary(row, rule, value):
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        may_lose_the_likeliest = rule.by_number or member is Typical
        assert may_lose_the_likeliest or np.isfinite(found[row.argmax()])


def test_a_frequency_is_subtracted_for_each_time():
    tokens = jnp.asarray([[1, 4, 2, 1, 5, 5, 5, 0]])
    past = History(tokens, jnp.asarray([7]), jnp.asarray([3]))
    out, _ = PresencePenalty(presence=1.0, frequency=0.25)(jnp.zeros((1, 7)), (), history=past)
    np.testing.assert_allclose(out[0], [0, -1.25, 0, 0, 0, -1.75, 0])


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_typical_tokens_are_the_nearest_to_the_entropy(p):
    rows = np.random.default_rng(5).normal(scale=2.0, size=(20, VOCABULARY))
    for row, found in zip(rows, process(Typical(p=p), rows), strict=True):
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(typical(row, p)))


def test_top_p_of_one_keeps_a_large_vocabulary_whole():
    logits = np.random.default_rng(0).normal(scale=3.0, size=(4, 50_000))
    assert np.isfinite(process(TopP(p=1.0), logits)).all()


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_top_p_reaches_the_mass_and_no_more_in_a_large_vocabulary(p):
    logits = np.random.default_rng(1).normal(scale=2.0, size=(2, 20_000)).astype(np.float32)
    for row, found in zip(logits.astype(np.float64), process(TopP(p=p), logits), strict=True):
        kept = softmax(row)[np.isfinite(found)]
        assert kept.sum() > p - 1e-5 and kept.sum() - kept.min() < p + 1e-5


@every_processor
def test_bad_values_are_refused(member):
    rule = PROCESSORS[member]
    for value in rule.refused:
        with pytest.raises(ValueError, match="must be"):
            member(**{rule.field: value})


@every_processor
def test_rows_and_token_numbers_do_not_matter(member):
    rule = PROCESSORS[member]
    processor = member(**{rule.field: rule.values[1]})
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(4, VOCABULARY))
    rows, columns = rng.permutation(4), rng.permutation(VOCABULARY)
    if rule.by_number:
        columns = np.arange(VOCABULARY)
    np.testing.assert_array_equal(
        process(processor, logits[rows][:, columns]), process(processor, logits)[rows][:, columns]
    )


@every_processor
def test_the_second_call_compiles_nothing(member):
    rule = PROCESSORS[member]
    run = jax.jit(
        lambda part, logits: part(logits, part.init(batch=2), history=history(2)), static_argnums=0
    )
    for seed in (0, 1):
        # Equal parts made apart are the same static argument.
        part = member(**{rule.field: rule.values[1]})
        run(part, jax.random.normal(jax.random.key(seed), (2, VOCABULARY)))
    assert run._cache_size() == 1


def parts():
    for member, rule in PROCESSORS.items():
        yield from (member(**{rule.field: value}) for value in rule.values)
    for member in SAMPLERS:
        yield from (member(), member(processors=(Temperature(value=0.5), TopK(k=2))))


@pytest.mark.parametrize("part", list(parts()), ids=str)
def test_the_object_is_its_own_config(part):
    loaded = config.load(config.dump(part))
    assert loaded == part and hash(loaded) == hash(part)


def test_methods_from_papers_name_them():
    for member, rule in PROCESSORS.items():
        doc = inspect.getdoc(member) or ""
        assert ("Reference: " in doc and "arXiv:" in doc) == rule.paper, member


# ---------------------------------------------------------------- samplers


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


ROWS = 2048


@functools.partial(jax.jit, static_argnums=0)
def draw_rows(sampler, logits, row_keys):
    return sampler(logits, sampler.init(batch=ROWS), history=history(ROWS), keys=row_keys)[0]


def sample(sampler, logits, row_keys):
    """Draws in rows of one shape, the last of them repeated: one compilation per sampler."""
    rows = np.minimum(np.arange(ROWS), len(logits) - 1)
    draw = draw_rows(sampler, np.asarray(logits, np.float32)[rows], row_keys[rows])
    return jax.tree.map(lambda part: np.asarray(part)[: len(logits)], draw)


SHAPING = (Temperature(value=0.5), TopK(k=3))


def test_processors_run_in_the_order_they_are_written():
    logits = [[2.0, 1.2, 0.9, -1.0, -1.0, -1.0, -1.0]]
    heated = (Temperature(value=3.0), MinP(p=0.5))  # e^-0.27, e^-0.37 against a half
    filtered = heated[::-1]  # e^-0.8, e^-1.1 against a half
    row = np.asarray(logits[0])
    for order, left in ((heated, (0, 1, 2)), (filtered, (0,))):
        draw = sample(Categorical(processors=order), logits * 64, keys(64))
        assert set(draw.token) == set(left)
        expected = np.log(softmax(row[list(left)] / 3.0))
        places = [left.index(token) for token in draw.token]
        np.testing.assert_allclose(draw.logp_behaviour, expected[places], atol=1e-5)


@every_sampler
def test_both_log_probabilities_are_exact(member):
    logits = np.random.default_rng(3).normal(scale=2.0, size=(64, VOCABULARY))
    draw = sample(member(processors=SHAPING), logits, keys(64))
    for row, token, model, behaviour in zip(logits, *draw[:3], strict=True):
        np.testing.assert_allclose(model, np.log(softmax(row)[token]), rtol=1e-5, atol=1e-5)
        if member is Greedy:
            assert token == row.argmax() and behaviour == 0.0
        else:
            expected = np.log(softmax(top_k(row / 0.5, 3))[token])
            np.testing.assert_allclose(behaviour, expected, rtol=1e-5, atol=1e-5)
    assert draw.logp_model.dtype == draw.logp_behaviour.dtype == np.float32
    assert draw.token.dtype == np.int32


def test_greedy_takes_the_first_of_equals():
    draw = sample(Greedy(), [[0.0, 5.0, 5.0], [1.0, 1.0, 1.0]], keys(2))
    np.testing.assert_array_equal(draw.token, [1, 0])


@pytest.mark.parametrize("shaping", [(), SHAPING], ids=["plain", "shaped"])
def test_categorical_follows_its_distribution(shaping):
    row = np.array([0.0, 1.0, -1.0, 0.5, 2.0, -0.5, 1.5])
    draw = sample(Categorical(processors=shaping), np.tile(row, (ROWS, 1)), keys(ROWS))
    chances = softmax(top_k(row / 0.5, 3) if shaping else row)
    observed = np.bincount(draw.token, minlength=VOCABULARY)
    possible = chances > 0
    assert observed[~possible].sum() == 0
    expected = ROWS * chances[possible]
    statistic = ((observed[possible] - expected) ** 2 / expected).sum()
    # One seed in a thousand would exceed this were the draws exact.
    assert statistic < scipy.stats.chi2.ppf(0.999, possible.sum() - 1)


@every_sampler
def test_a_draw_depends_on_its_own_row_and_key_alone(member):
    rng = np.random.default_rng(4)
    sampler, logits, row_keys = member(processors=SHAPING), rng.normal(size=(8, 7)), keys(8)
    draw = sample(sampler, logits, row_keys)
    order = rng.permutation(8)
    moved = sample(sampler, logits[order], row_keys[order])
    for whole, other in zip(draw, moved, strict=True):
        np.testing.assert_array_equal(whole[order], other)
    others = np.where(np.arange(8)[:, None] == 5, logits, rng.normal(size=(8, 7)))
    replaced = sample(sampler, others, jnp.where(jnp.arange(8) == 5, row_keys, keys(8, seed=1)))
    assert [part[5] for part in replaced] == [part[5] for part in draw]


@every_sampler
def test_the_second_draw_compiles_nothing(member):
    sampler = member(processors=SHAPING)
    run = jax.jit(
        lambda part, x, k: part(x, part.init(batch=2), history=history(2), keys=k), static_argnums=0
    )
    for seed in (0, 1):
        run(sampler, jax.random.normal(jax.random.key(seed), (2, VOCABULARY)), keys(2, seed))
    assert run._cache_size() == 1

"""Step-aware temperatures against a trace, plain lists, and the ends that have closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.published import tokenizer
from tokenlab import config
from tokenlab.decode import Categorical, History, ReSET, StepEnds, Temperature
from tokenlab.decode.step_entropy import at_temperature
from tokenlab.tokenizers import ByteTokenizer

ENTROPIES = [0.2, 0.8, 0.4, 0.1, 1.2, 0.9, 1.3, 0.3]


def logits_of(entropies):
    """Logits over eight tokens, one above the rest, whose softmax has these entropies: bisected."""
    low, high = np.zeros(np.shape(entropies)), np.full(np.shape(entropies), 60.0)
    rest = np.zeros((*low.shape, 7))
    for _ in range(60):
        middle = (low + high) / 2
        rows = np.concatenate([middle[..., None], rest], axis=-1)
        over = scipy.stats.entropy(scipy.special.softmax(rows, axis=-1), axis=-1) > entropies
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    return np.concatenate([low[..., None], rest], axis=-1).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def scanned(rule, rows, boundaries):
    def step(state, at):
        temperature, state = rule.temperature(logits=at[0], boundary=at[1], state=state)
        return state, temperature

    return jax.lax.scan(step, rule.init(batch=rows.shape[1]), (rows, boundaries))[1]


def run(rule, entropies, boundaries):
    """Temperatures ``[T, B]`` of entropies ``[T, B]``, in one scan."""
    return scanned(rule, logits_of(np.asarray(entropies)), np.asarray(boundaries))


def lists(rule, entropies, boundaries):
    """One row as the definition has it; also the step's and the whole mean."""
    found, everything, step = [], [], []
    for entropy, boundary in zip(entropies, boundaries, strict=True):
        if boundary:
            step = []
        recent = everything[-rule.window :]
        estimate = np.mean(step) if len(step) >= rule.window else np.mean(recent or [entropy])
        mean = np.mean(everything) if everything else estimate
        threshold = estimate if estimate > mean + 1e-9 else rule.threshold
        found.append((rule.high if entropy >= threshold else rule.low, estimate, mean))
        everything.append(entropy)
        step.append(entropy)
    return found


def test_the_trace():
    rule = ReSET(high=1.0, low=0.1, threshold=0.5, window=2)
    boundaries = [False] * 4 + [True] + [False] * 3
    found = lists(rule, ENTROPIES, boundaries)
    temperatures, steps, means = zip(*found, strict=True)
    np.testing.assert_allclose(steps, [0.2, 0.2, 0.5, 0.4667, 0.25, 0.65, 1.05, 1.1333], atol=1e-4)
    np.testing.assert_allclose(means, [0.2, 0.2, 0.5, 0.4667, 0.375, 0.54, 0.6, 0.7], atol=1e-4)
    uncertain = [step > mean + 1e-9 for step, mean in zip(steps, means, strict=True)]
    assert uncertain == [False] * 5 + [True] * 3
    assert temperatures == (0.1, 1.0, 0.1, 0.1, 1.0, 1.0, 1.0, 0.1)
    ours = run(rule, np.array(ENTROPIES)[:, None], np.array(boundaries)[:, None])
    np.testing.assert_allclose(ours[:, 0], temperatures, rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    entropies=st.lists(
        st.lists(st.integers(1, 40).map(lambda n: n / 20), min_size=2, max_size=2), min_size=12,
        max_size=12,
    ),
    ends=st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=12, max_size=12),
    window=st.sampled_from([1, 3, 20]),
)  # fmt: skip
def test_rows_are_lists_each_by_itself(entropies, ends, window):
    rule = ReSET(threshold=0.513, window=window)
    ours = np.asarray(run(rule, entropies, ends))
    for row in range(2):
        column = [pair[row] for pair in entropies]
        expected = lists(rule, column, [pair[row] for pair in ends])
        for t, (temperature, step, mean) in enumerate(expected):
            threshold = step if step > mean + 1e-9 else rule.threshold
            # Of equal numbers rounding decides; in the first step they are one sum.
            apart = abs(step - mean) > 1e-5 or not any(pair[row] for pair in ends[: t + 1])
            if apart and abs(column[t] - threshold) > 1e-5:
                assert ours[t, row] == np.float32(temperature), (t, step, mean)


def test_without_boundaries_no_first_step_is_uncertain():
    """Its mean is that of all tokens, bit for bit, though one is a ring and the other a sum."""
    rng = np.random.default_rng(0)
    for window in (1, 4, 64):
        rule = ReSET(high=1.0, low=0.5, threshold=10.0, window=window)
        entropies = rng.uniform(0.1, 2.0, (40, 2))
        assert np.all(run(rule, entropies, np.zeros((40, 2), bool)) == 0.5)


def test_ends_of_the_rule():
    rng = np.random.default_rng(1)
    entropies, ends = rng.uniform(0.1, 2.0, (20, 3)), rng.random((20, 3)) < 0.2
    same = ReSET(high=0.6, low=0.6)
    assert np.all(run(same, entropies, ends) == np.float32(0.6))
    always = ReSET(threshold=0.0, low=0.1)
    assert np.all(run(always, entropies, np.zeros((20, 3), bool)) == 1.0)
    never = ReSET(threshold=np.inf, low=0.0)
    assert not np.any(run(never, entropies, np.zeros((20, 3), bool)))


def test_chances_of_the_worse_of_two_tokens():
    logits = jnp.array([[2.0, 0.0]] * 4)
    out = at_temperature(logits, jnp.array([1.0, 0.6, 0.1, 0.0]))
    wrong = np.asarray(jax.nn.softmax(out, axis=-1))[:, 1]
    np.testing.assert_allclose(wrong[:2], [0.1192, 0.0344], atol=1e-4)
    np.testing.assert_allclose(wrong[2], 2.1e-9, rtol=0.05)
    assert wrong[3] == 0.0
    ties = at_temperature(jnp.array([[1.0, 3.0, 3.0]]), jnp.zeros(1))
    np.testing.assert_array_equal(ties, [[-np.inf, 3.0, -np.inf]])


def test_tokens_that_are_ruled_out_have_no_entropy():
    rule = ReSET(threshold=np.log(2) + 1e-3)
    logits = jnp.array([[0.0, 0.0, -jnp.inf], [0.0, 0.0, 0.0]])
    found, state = rule.temperature(
        logits=logits, boundary=jnp.zeros(2, bool), state=rule.init(batch=2)
    )
    np.testing.assert_allclose(found, [rule.low, rule.high])
    np.testing.assert_allclose(state.total, np.log([2, 3]), rtol=1e-6)


def test_bytes_end_a_step_with_two_line_breaks():
    letters = ByteTokenizer()
    ends = StepEnds.of(letters)
    assert ends.blank == () and ends.newline == (letters.encode("\n")[0],)
    newline, a = letters.encode("\na")
    last = jnp.array([[newline, newline], [a, newline], [newline, a], [-1, newline]])
    np.testing.assert_array_equal(ends.reached(last), [True, False, False, False])


def test_composite_tokens_end_a_step_by_themselves():
    class Pieces(ByteTokenizer):
        @property
        def vocab_size(self):
            return 262

        def decode(self, ids):
            more = {259: b".\n\n", 260: b"\n", 261: b"\n\nSo"}
            return b"".join(more.get(i) or ByteTokenizer().decode([i]) for i in ids)

    ends = StepEnds.of(Pieces())
    assert ends.blank == (259, 261) and ends.newline == (13, 260)
    last = jnp.array([[3, 259], [-1, 261], [13, 260], [260, 13]])
    assert np.all(ends.reached(last)) and not np.any(ends.reached(jnp.array([[259, 3]])))
    # A published vocabulary, by the text of each id.
    published = tokenizer()
    found = StepEnds.of(published)
    assert all(b"\n\n" in published.decode([i]) for i in found.blank)
    assert [published.decode([i]) for i in found.newline] == [b"\n"]


def test_it_is_its_own_config_and_compiles_once():
    rule = ReSET(low=0.1, window=4)
    assert config.load(config.dump(rule)) == rule
    step = jax.jit(lambda rule, logits, state: rule.temperature(
        logits=logits, boundary=jnp.zeros(2, bool), state=state
    ), static_argnums=0)  # fmt: skip
    state = rule.init(batch=2)
    for seed in range(3):
        temperature, state = step(rule, jax.random.normal(jax.random.key(seed), (2, 9)), state)
    assert step._cache_size() == 1 and temperature.dtype == jnp.float32
    for wrong in ({"high": 0.0}, {"low": -0.1}, {"window": 0}):
        with pytest.raises(ValueError, match="must be"):
            ReSET(**wrong)


def test_the_processor_ends_steps_where_the_text_does():
    """The trace again, by tokens: a blank line is the fourth token that was written."""
    rule = ReSET(low=0.1, threshold=0.5, window=2, ends=StepEnds(blank=(7,)))
    written = [1, 2, 3, 7, 1, 2, 3, 1]
    tokens = jnp.asarray([[7, 5, *written], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]])
    state, found = rule.init(batch=2), []
    for t, logits in enumerate(logits_of(np.array(ENTROPIES))):
        lengths = jnp.full(2, 2 + t)
        past = History(tokens, lengths, jnp.full(2, 2))
        out, state = rule(jnp.asarray([logits, logits]), state, history=past)
        found.append(logits[0] / np.asarray(out)[:, 0])
    np.testing.assert_allclose(np.array(found)[:, 0], [0.1, 1, 0.1, 0.1, 1, 1, 1, 0.1], rtol=1e-5)
    # The row that never ends a step goes by its own.
    ours = run(rule, np.array(ENTROPIES)[:, None], np.zeros((8, 1), bool))
    np.testing.assert_allclose(np.array(found)[:, 1], ours[:, 0], rtol=1e-5)


def test_equal_temperatures_are_plain_sampling():
    logits = jax.random.normal(jax.random.key(0), (64, 9))
    past = History(jnp.zeros((64, 4), jnp.int32), jnp.ones(64, jnp.int32), jnp.ones(64, jnp.int32))
    keys = jax.random.split(jax.random.key(1), 64)
    draws = []
    for processor in (ReSET(high=0.6, low=0.6), Temperature(value=0.6)):
        sampler = Categorical(processors=(processor,))
        draw, _ = sampler(logits, sampler.init(batch=64), history=past, keys=keys)
        draws.append(draw)
    np.testing.assert_array_equal(draws[0].token, draws[1].token)
    np.testing.assert_allclose(draws[0].logp_behaviour, draws[1].logp_behaviour, rtol=1e-5)

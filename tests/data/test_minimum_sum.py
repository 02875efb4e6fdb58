"""Signed sums against recursion over signs, and the numbers that are known of them."""

import collections
import itertools

import numpy as np
import pytest

from tokenlab.core.errors import UserError
from tokenlab.data.tasks import MinimumNonNegativeSum, TaskSource


def shares_of(digits, **fields):
    """What is to be predicted after each digit, by sum."""
    task = MinimumNonNegativeSum(digits=len(digits), **fields)
    zero = task.tokenizer.encode("s0 ")[0]
    (rows,) = task.shares(digits=np.array([digits]))
    return [{int(i) - zero: float(row[i]) for i in np.flatnonzero(row)} for row in rows]


def traces_of(digits):
    """Each choice of signs as its partial sums, by plain recursion."""
    if not digits:
        return [()]
    earlier = traces_of(digits[:-1])
    return [
        (*trace, (trace[-1] if trace else 0) + sign * digits[-1])
        for trace in earlier
        for sign in (1, -1)
    ]


def counted(states):
    count = collections.Counter(states)
    return {state: n / len(states) for state, n in count.items()}


@pytest.mark.parametrize(
    ("digits", "steps", "answer"),
    [
        ((3, 1), [{3: 0.5, -3: 0.5}, {4: 0.25, 2: 0.25, -2: 0.25, -4: 0.25}], 2),
        ((2, 2), [{2: 0.5, -2: 0.5}, {-4: 0.25, 0: 0.5, 4: 0.25}], 0),
        ((2, 1, 4), None, 1),
    ],
)
def test_the_known_cases(digits, steps, answer):
    task = MinimumNonNegativeSum(digits=len(digits))
    states = task.states(digits=np.array([digits]))[0]
    if steps is not None:
        assert [counted(states[:, t].tolist()) for t in range(len(digits))] == steps
        assert shares_of(digits)[:-1] == steps[:-1]
    assert shares_of(digits)[-1] == {answer: 1.0}


@pytest.mark.parametrize("traces", [None, 1, 3, 8])
def test_shares_are_those_of_the_traces_nearest_to_zero(traces):
    for digits in itertools.product((0, 1, 4, 9), repeat=3):
        every = traces_of(digits)
        answer = min(trace[-1] for trace in every if trace[-1] >= 0)
        found = shares_of(digits, low=0, traces=traces)
        assert found[-1] == {answer: 1.0}
        if traces is None:
            for t in range(2):
                assert found[t] == counted([trace[t] for trace in every])
            continue
        # Ties are broken somehow: the supervised traces are some choice that no other beats.
        least = sorted(abs(trace[-1]) for trace in every)[:traces]
        fitting = (
            chosen
            for chosen in itertools.combinations(every, traces)
            if sorted(abs(trace[-1]) for trace in chosen) == least
        )
        wanted = [[counted([trace[t] for trace in chosen]) for t in range(2)] for chosen in fitting]
        rounded = [{k: pytest.approx(v, abs=1e-6) for k, v in step.items()} for step in found[:2]]
        assert any(each == rounded for each in wanted)


def test_one_trace_is_a_discrete_chain_of_thought_to_the_answer():
    task = MinimumNonNegativeSum(digits=3, traces=1)
    rows = task.batch(digits=task.instances())
    answering = rows.weights > 0
    one_hot = np.eye(task.tokenizer.vocab_size, dtype=np.float32)
    np.testing.assert_array_equal(rows.distribution[answering], one_hot[rows.targets[answering]])
    read = rows.mixture.sum(axis=2) > 0
    np.testing.assert_array_equal(read[0], [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(rows.mixture[read], one_hot[rows.tokens[read]])
    zero = task.tokenizer.encode("s0 ")[0]
    digits, sums = task.instances(), rows.targets[:, 3:] - zero
    steps = np.diff(sums, axis=1, prepend=0)
    np.testing.assert_array_equal(np.abs(steps), digits)


def test_all_instances_and_the_share_of_the_likeliest_answer():
    task = MinimumNonNegativeSum()
    instances = task.instances()
    assert len(instances) == 9**4 == 6561
    assert len({tuple(sorted(row)) for row in instances.tolist()}) == 495
    one = task.tokenizer.encode("s1 ")[0]
    assert np.mean(task.batch(digits=instances).targets[:, -1] == one) == pytest.approx(
        0.3725, abs=5e-5
    )


def test_permutations_are_on_one_side_and_nothing_is_lost():
    train, held_out = (
        MinimumNonNegativeSum(part=part).instances() for part in ("train", "held_out")
    )
    assert len(train) + len(held_out) == 6561
    assert 0.15 < len(held_out) / 6561 < 0.25
    sides = [{tuple(sorted(row)) for row in part.tolist()} for part in (train, held_out)]
    assert not sides[0] & sides[1]


def test_a_row_reads_what_was_to_be_predicted_before():
    task = MinimumNonNegativeSum(part="train")
    rows = task.sample(seed=3, count=20)
    np.testing.assert_array_equal(rows.mixture[:, 5:], rows.distribution[:, 4:-1])
    np.testing.assert_allclose(rows.distribution.sum(axis=2), rows.weights, rtol=1e-6)
    assert not rows.mixture[:, :5].any()
    states = [len({trace[t] for trace in traces_of((1, 2, 3, 4))}) for t in range(4)]
    known = task.batch(digits=np.array([[1, 2, 3, 4]])).difficulty[0]
    np.testing.assert_array_equal(known, [-1] * 4 + states)


def test_batches_carry_both_arrays():
    task = MinimumNonNegativeSum(digits=2)
    batch = next(
        iter(TaskSource(task=task).batches(tokenizer=task.tokenizer, batch_size=6, seed=0))
    )
    assert batch["distribution"].shape == batch["mixture"].shape == (6, 4, 50)


@pytest.mark.parametrize(
    "change", [{"digits": 0}, {"high": 10}, {"digits": 9}, {"traces": 17}, {"held_out": 2.0}]
)
def test_impossible_tasks_are_one_line(change):
    with pytest.raises(UserError, match="use"):
        MinimumNonNegativeSum(**change)

"""The statistics behind a verdict, against closed forms and SciPy's own interval."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tokenlab.study import Claim, interval

# With two degrees of freedom t_p = (2p - 1) sqrt(2 / (4p (1 - p))); here p = 0.975.
T_OF_THREE = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))


@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_interval_equals_scipy(values):
    mean, low, high = interval(values)
    assert mean == pytest.approx(np.mean(values))
    error = scipy.stats.sem(values)
    if error > 1e-9:
        expected = scipy.stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
        assert (low, high) == pytest.approx(expected)
    else:
        assert (low, high) == pytest.approx((mean, mean), abs=1e-6)


def test_interval_of_three_by_hand():
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx(
        (2.0, 2 - T_OF_THREE / 3**0.5, 2 + T_OF_THREE / 3**0.5)
    )
    # Two values, s = sqrt(2): t of 0.9 with one degree of freedom is tan(0.4 pi).
    _, low, _ = interval([0.0, 2.0], level=0.8)
    assert low == pytest.approx(1 - math.tan(0.4 * math.pi))


def test_interval_covers_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(size=(2000, 4))
    covered = sum(low <= 0 <= high for _, low, high in map(interval, samples.tolist()))
    # Four standard deviations of a binomial around 1900.
    assert abs(covered - 1900) < 4 * math.sqrt(2000 * 0.95 * 0.05)


def claim(**rest):
    return Claim(arm="new", than="old", metric="e/loss", **rest)


OLD, NEW = [3.0, 3.2, 3.1], [2.0, 2.1, 2.1]  # advantages 1.0, 1.1, 1.0


@pytest.mark.parametrize(
    ("figures", "options", "holds"),
    [
        ({"new": NEW, "old": OLD}, {}, True),
        ({"new": OLD, "old": NEW}, {}, False),
        ({"new": OLD, "old": NEW}, {"better": "higher"}, True),
        ({"new": NEW, "old": OLD}, {"margin": 0.88}, True),  # the interval begins at 0.89
        ({"new": NEW, "old": OLD}, {"margin": 0.9}, False),
        ({"new": NEW, "old": OLD}, {"margin": 0.3, "relative": True}, True),  # 0.33, 0.34, 0.32
        ({"new": NEW, "old": OLD}, {"margin": 0.33, "relative": True}, False),
        ({"new": OLD, "old": OLD}, {"margin": -0.1}, True),  # a loss of 0.1 would be allowed
        ({"new": [2.0, 3.5, 1.0], "old": [3.0, 3.2, 3.1]}, {}, False),  # too much noise
        ({"new": NEW, "old": NEW}, {}, False),  # equal is not better
        ({"new": [1.0], "old": [100.0]}, {}, False),  # one seed shows nothing
        ({"new": [1.0, float("nan"), 1.0], "old": OLD}, {}, False),
    ],
)
def test_a_claim_holds_when_its_whole_interval_exceeds_the_margin(figures, options, holds):
    verdict = claim(**options).judge(figures)
    assert verdict.holds is holds


def test_a_verdict_says_what_was_measured():
    verdict = claim(margin=0.5).judge({"new": NEW, "old": OLD})
    reach = T_OF_THREE * math.sqrt(1 / 300) / math.sqrt(3)
    assert verdict.measured == pytest.approx(3.1 / 3)
    assert verdict.low == pytest.approx(3.1 / 3 - reach)
    assert verdict.high == pytest.approx(3.1 / 3 + reach)
    assert verdict.needed == 0.5
    assert verdict.claim == "new: lower e/loss than old by 0.5"


def test_seeds_are_paired():
    """Arms that vary together from seed to seed: only the pairing shows the difference."""
    noise = [0.0, 10.0, -7.0, 3.0]
    old, new = [10 + n for n in noise], [9.9 + n for n in noise]
    assert claim().judge({"new": new, "old": old}).holds
    assert not claim().judge({"new": new[::-1], "old": old}).holds


def test_arms_with_other_numbers_of_seeds_are_not_compared():
    with pytest.raises(ValueError):
        claim().judge({"new": [1.0, 2.0], "old": [1.0, 2.0, 3.0]})

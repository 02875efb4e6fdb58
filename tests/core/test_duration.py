"""Durations resolve to the steps a person would count."""

import pytest

from tokenlab.core.duration import Clock, Epochs, Fraction, Tokens
from tokenlab.core.errors import UserError

CLOCK = Clock(tokens_per_step=100, tokens_per_epoch=lambda: 2_500, total_steps=40)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (7, 7),
        (0, 0),
        (Tokens(count=1_000), 10),
        (Tokens(count=1_001), 11),
        (Epochs(count=2), 50),
        (Epochs(count=0.5), 12),
        (Fraction(of_run=0.25), 10),
        (Fraction(of_run=1.0), 40),
    ],
)
def test_steps(duration, steps):
    assert CLOCK.steps(duration) == steps


def test_epochs_are_counted_only_when_asked_for():
    def never():
        raise AssertionError("the corpus was tokenised for nothing")

    assert Clock(tokens_per_step=10, tokens_per_epoch=never).steps(Tokens(count=95)) == 10


def test_errors():
    with pytest.raises(UserError, match="negative"):
        CLOCK.steps(-1)
    with pytest.raises(UserError, match="cannot be a Fraction"):
        Clock(tokens_per_step=1, tokens_per_epoch=lambda: 1).steps(Fraction(of_run=0.5))

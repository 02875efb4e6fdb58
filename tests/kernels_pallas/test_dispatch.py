"""Choosing an implementation: order, refusals, reasons."""

import logging

import pytest

from kernels_pallas.common.dispatch import CannotRun, Implementation, Operation, anything


def _no_odd(*, x):
    return f"x is {x}, which is odd" if x % 2 else None


FAST = Implementation(name="fast", run=lambda *, x: ("fast", x), supports=_no_odd)
SLOW = Implementation(name="slow", run=lambda *, x: ("slow", x), supports=anything)
DOUBLE = Operation(name="double", order={"cpu": (FAST, SLOW)})


def test_the_first_that_supports_the_arguments_runs():
    assert DOUBLE(None, x=2) == ("fast", 2)
    assert DOUBLE(None, x=3) == ("slow", 3)
    assert DOUBLE("slow", x=2) == ("slow", 2)


def test_passing_over_is_logged_once_with_the_reason(caplog):
    with caplog.at_level(logging.WARNING):
        DOUBLE(None, x=5)
        DOUBLE(None, x=5)
        DOUBLE(None, x=6)
    assert [record.getMessage() for record in caplog.records] == [
        "double runs impl='slow': impl='fast' cannot run: x is 5, which is odd"
    ]


def test_an_explicit_choice_never_falls_back():
    with pytest.raises(CannotRun, match="impl='fast' cannot run: x is 3, which is odd"):
        DOUBLE("fast", x=3)
    with pytest.raises(ValueError, match=r"no impl='tpu'; use one of \['fast', 'slow'\]"):
        DOUBLE("tpu", x=2)


def test_nothing_that_runs_raises_with_every_reason():
    only = Operation(name="only", order={"cpu": (FAST,)})
    with pytest.raises(ValueError, match=r"only: impl='fast' cannot run: x is 1"):
        only(None, x=1)

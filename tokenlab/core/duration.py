"""Lengths of time in steps, tokens, epochs or shares of the run, through one resolver."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tokenlab.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """A number of token slots, padding included.

    Attributes:
        count: slots.
    """

    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epochs:
    """A number of passes over the training documents.

    Attributes:
        count: passes; need not be whole.
    """

    count: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fraction:
    """A share of the whole run.

    Attributes:
        of_run: 0 to 1.
    """

    of_run: float


Duration = int | Tokens | Epochs | Fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """Turns durations into steps.

    Attributes:
        tokens_per_step: token slots of one step.
        tokens_per_epoch: counts the token slots of one epoch; called only where needed.
        total_steps: steps of the run, or None while that itself is being resolved.
    """

    tokens_per_step: int
    tokens_per_epoch: Callable[[], int]
    total_steps: int | None = None

    def steps(self, duration: Duration) -> int:
        """Whole steps of ``duration``, at least one (zero where it says zero).

        Raises:
            UserError: a negative duration, or a share of a run whose length is unknown.
        """
        match duration:
            case Tokens(count=count):
                steps = -(-count // self.tokens_per_step)
            case Epochs(count=count):
                steps = max(1, round(count * self.tokens_per_epoch() / self.tokens_per_step))
            case Fraction(of_run=share):
                if self.total_steps is None:
                    raise UserError("steps cannot be a Fraction; give steps, Tokens or Epochs")
                steps = round(share * self.total_steps)
            case _:
                steps = duration
        if steps < 0:
            raise UserError(f"{duration!r} is negative; give a duration of 0 or more")
        return steps

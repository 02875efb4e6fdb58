"""Claims about measured numbers, and the statistics that decide them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.stats

Figures = Mapping[str, Sequence[float]]  # arm -> one figure per seed


class Verdict(NamedTuple):
    """What became of a claim.

    Attributes:
        claim: the claim in words.
        measured: mean over seeds of the advantage (a comparison) or of the figure (a bound).
        low: lower end of its 95 % confidence interval.
        high: upper end.
        needed: what the interval has to lie above (or below, where a bound says so).
        holds: whether it does.
    """

    claim: str
    measured: float
    low: float
    high: float
    needed: float
    holds: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One arm is better than another by more than a margin, over paired seeds.

    The claim holds when the whole 95 % confidence interval of the mean advantage lies above the
    margin, so that too few seeds or too much noise refute it.

    Attributes:
        arm: the arm that should win.
        than: the arm it is compared with at equal seeds.
        metric: ``evaluation/figure``.
        better: which direction is better.
        margin: advantage to exceed, in units of the metric; below 0 where a loss is allowed.
        relative: whether the advantage is a share of the other arm's figure instead.
        matched: the column in which the two arms are equal; None is the study's.
    """

    arm: str
    than: str
    metric: str
    better: Literal["lower", "higher"] = "lower"
    margin: float = 0.0
    relative: bool = False
    matched: str | None = None

    def arms(self) -> tuple[str, ...]:
        """The arms it speaks of, which have to be matched."""
        return (self.arm, self.than)

    def judge(self, figures: Figures) -> Verdict:
        """The verdict over figures of ``metric`` by arm, seeds in the same order."""
        difference = np.subtract(figures[self.than], figures[self.arm])
        advantage = difference if self.better == "lower" else -difference
        if self.relative:
            advantage = advantage / np.abs(figures[self.than])
        mean, low, high = interval(advantage.tolist())
        by = f"{100 * self.margin:g} %" if self.relative else f"{self.margin:g}"
        words = f"{self.arm}: {self.better} {self.metric} than {self.than} by {by}"
        return Verdict(words, mean, low, high, self.margin, low > self.margin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """A figure of one arm lies above, or below, a limit, over all of its 95 % interval.

    Attributes:
        arm: the arm.
        metric: ``evaluation/figure``.
        limit: the limit, in units of the metric.
        side: where the figure lies.
    """

    arm: str
    metric: str
    limit: float
    side: Literal["above", "below"] = "above"

    def arms(self) -> tuple[str, ...]:
        """The arm it speaks of."""
        return (self.arm,)

    def judge(self, figures: Figures) -> Verdict:
        """The verdict over figures of ``metric`` by arm."""
        mean, low, high = interval(figures[self.arm])
        holds = low > self.limit if self.side == "above" else high < self.limit
        words = f"{self.arm}: {self.metric} {self.side} {self.limit:g}"
        return Verdict(words, mean, low, high, self.limit, holds)


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student confidence interval ``mean +- t * s / sqrt(n)``.

    Args:
        values: independent measurements; one alone has an infinite interval.
        level: coverage, 0 to 1.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = float(scipy.stats.t.ppf(0.5 + level / 2, len(values) - 1)) * error
    return mean, mean - reach, mean + reach

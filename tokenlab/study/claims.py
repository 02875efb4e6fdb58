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
        needed: what the interval has to exceed.
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
        margin: advantage to exceed, in units of the metric.
    """

    arm: str
    than: str
    metric: str
    better: Literal["lower", "higher"] = "lower"
    margin: float = 0.0

    def judge(self, figures: Figures) -> Verdict:
        """The verdict over figures of ``metric`` by arm, seeds in the same order."""
        difference = np.subtract(figures[self.than], figures[self.arm])
        advantage = difference if self.better == "lower" else -difference
        mean, low, high = interval(advantage.tolist())
        words = f"{self.arm}: {self.better} {self.metric} than {self.than} by {self.margin:g}"
        return Verdict(words, mean, low, high, self.margin, low > self.margin)


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

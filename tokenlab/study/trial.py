"""The trial family: arms of a study that measure something without training an experiment."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one run of a trial gave.

    Attributes:
        figures: metric -> figure, named ``group/figure``.
        costs: what it spent, by name: columns of the ledger, or budgets such as ``kept_tokens``.
    """

    figures: Mapping[str, float]
    costs: Mapping[str, float]

    @classmethod
    def of(cls, evals: Mapping[str, Mapping[str, float]], ledger: Mapping[str, float]) -> Measured:
        """Of a run of training, by what its evaluations found."""
        figures = {
            f"{evaluation}/{figure}": value
            for evaluation, values in evals.items()
            for figure, value in values.items()
        }
        return cls(figures=figures, costs=ledger)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(abc.ABC):
    """A measurement on planted data or on a published model; its fields say of what.

    The same fields and seed give the same figures.
    """

    @abc.abstractmethod
    def measure(self, *, seed: int) -> Measured:
        """Draws the data of ``seed`` and measures."""

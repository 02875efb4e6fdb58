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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(abc.ABC):
    """A measurement on planted data or on a published model; its fields say of what.

    The same fields and seed give the same figures.
    """

    @abc.abstractmethod
    def measure(self, *, seed: int) -> Measured:
        """Draws the data of ``seed`` and measures."""

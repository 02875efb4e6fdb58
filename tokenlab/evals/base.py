"""The evaluation family: numbers about a model, taken by cadence and at the end of a run."""

from __future__ import annotations

import abc
import dataclasses

from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.duration import Duration, Fraction
from tokenlab.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(abc.ABC):
    """One evaluation.

    Attributes:
        every: distance between evaluations; the last step always has one.
    """

    every: Duration = Fraction(of_run=1.0)

    @abc.abstractmethod
    def __call__(
        self, *, model: nn.Module, params: PyTree, tokenizer: Tokenizer
    ) -> dict[str, float]:
        """Named figures."""

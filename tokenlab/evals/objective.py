"""The terms of an objective on rows that training has not seen."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.arrays import Array
from tokenlab.core.context import Context, View
from tokenlab.core.weighted import Weighted
from tokenlab.data.base import Source
from tokenlab.evals.base import Evaluation
from tokenlab.objectives import Objective
from tokenlab.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveValue(Evaluation):
    """The mean of each term, under its own name, over the first batches of a source.

    Attributes:
        objective: the terms; their coefficients are not read.
        data: where the rows come from.
        batches: how many batches.
        batch_size: rows of each.
        seed: of the source.
    """

    objective: Objective
    data: Source
    batches: int = 4
    batch_size: int = 64
    seed: int = 0

    def __call__(
        self, *, model: nn.Module, params: PyTree, tokenizer: Tokenizer
    ) -> dict[str, float]:
        """The means."""

        @jax.jit
        def sums_of(params: PyTree, batch: dict[str, Array]) -> dict[str, Weighted]:
            views = {"policy": View(model=model, params=params)}
            return self.objective(Context(batch=batch, views=views))

        rows = self.data.batches(tokenizer=tokenizer, batch_size=self.batch_size, seed=self.seed)
        found = [sums_of(params, batch) for batch in itertools.islice(rows, self.batches)]
        totals = {
            name: functools.reduce(Weighted.merge, [sums[name] for sums in found])
            for name in self.objective.terms
        }
        return {name: float(total.mean()) for name, total in totals.items()}

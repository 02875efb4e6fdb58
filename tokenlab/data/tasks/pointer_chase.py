"""Following a random map a given number of times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenlab.core.arrays import Int
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require, task_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointerChase(Task):
    """A map ``f`` written as its values, then triples (start, hops, ``f`` applied hops times).

    The value at position ``i`` is ``f(i)``. Each triple is asked at its hops token, whose target
    is the answer. Difficulty is the number of hops. The iterates of a random map meet, so the
    most frequent value of the last iterate is a guess well above chance; a bijection has none.

    Attributes:
        values: number of values, and of positions of the map.
        queries: triples of a row.
        min_hops: fewest hops of a query.
        max_hops: most hops of a query; all numbers between are equally likely.
        bijective: draw a permutation instead of any map.
    """

    values: int = 16
    queries: int = 8
    min_hops: int = 1
    max_hops: int = 6
    bijective: bool = False

    def __post_init__(self):
        require(self.values > 0, f"PointerChase.values is {self.values}; use 1 or more")
        require(self.queries > 0, f"PointerChase.queries is {self.queries}; use 1 or more")
        require(
            0 <= self.min_hops <= self.max_hops,
            f"PointerChase hops go from {self.min_hops} to {self.max_hops}; "
            "use 0 <= min_hops <= max_hops",
        )

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Values, then numbers of hops from 0 to ``max_hops``."""
        values = (f"{i} " for i in range(self.values))
        hops = (f"^{i} " for i in range(self.max_hops + 1))
        return AlphabetTokenizer(symbols=(*values, *hops))

    @property
    def length(self) -> int:
        """Positions of a row: the map and the triples."""
        return self.values + 3 * self.queries

    def _draw(
        self, *, seed: Seed, count: int, queries: int
    ) -> tuple[Int[np.ndarray, "B M"], Int[np.ndarray, "B Q 3"]]:
        rng = np.random.default_rng(seed)
        if self.bijective:
            table = rng.permuted(np.tile(np.arange(self.values), (count, 1)), axis=1)
        else:
            table = rng.integers(self.values, size=(count, self.values))
        start = rng.integers(self.values, size=(count, queries))
        hops = rng.integers(self.min_hops, self.max_hops + 1, size=(count, queries))
        answer = start
        for hop in range(self.max_hops):
            answer = np.where(hop < hops, np.take_along_axis(table, answer, axis=1), answer)
        return table, np.stack([start, hops, answer], axis=2)

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of one map and ``queries`` triples each."""
        table, triples = self._draw(seed=seed, count=count, queries=self.queries)
        written = triples + np.array([0, self.values, 0])
        difficulty = np.full((count, self.length), UNDEFINED)
        difficulty[:, self.values + 1 :: 3] = triples[:, :, 1]
        return task_batch(
            symbols=np.concatenate([table, written.reshape(count, -1)], axis=1),
            difficulty=difficulty,
            segment_length=self.length,
        )

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """A map and one query each."""
        table, triples = self._draw(seed=seed, count=count, queries=1)
        found = []
        for values, (start, hops, answer) in zip(
            table.tolist(), triples[:, 0].tolist(), strict=True
        ):
            symbols = [*values, start, self.values + hops, answer]
            ids = [symbol + FIRST_SYMBOL for symbol in symbols]
            found.append(Problem(prompt=ids[:-1], answer=ids[-1:], difficulty=hops))
        return found

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Follows the map of the prompt step by step from the last query."""
        symbols = [i - FIRST_SYMBOL for i in prompt]
        value, hops = symbols[-2], symbols[-1] - self.values
        for _ in range(hops):
            value = symbols[value]
        return list(completion[:1]) == [value + FIRST_SYMBOL]

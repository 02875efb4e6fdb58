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

    A model has never seen the token of a number of hops that it was not trained on. With ``unary``
    the hops are as many strokes, blanks before them, and the question is asked at a sign of its own
    behind them: then the same model can be asked for more hops.

    Attributes:
        values: number of values, and of positions of the map.
        queries: triples of a row.
        min_hops: fewest hops of a query.
        max_hops: most hops of a query; all numbers between are equally likely.
        bijective: draw a permutation instead of any map.
        unary: places that hops are written in as strokes; 0 writes a token of their number.
    """

    values: int = 16
    queries: int = 8
    min_hops: int = 1
    max_hops: int = 6
    bijective: bool = False
    unary: int = 0

    def __post_init__(self):
        require(self.values > 0, f"PointerChase.values is {self.values}; use 1 or more")
        require(self.queries > 0, f"PointerChase.queries is {self.queries}; use 1 or more")
        require(
            0 <= self.min_hops <= self.max_hops,
            f"PointerChase hops go from {self.min_hops} to {self.max_hops}; "
            "use 0 <= min_hops <= max_hops",
        )
        require(
            self.unary == 0 or self.unary >= self.max_hops,
            f"PointerChase.unary is {self.unary}, too few places for {self.max_hops} strokes; "
            "raise it, or use 0",
        )

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Values, then numbers of hops from 0 to ``max_hops``, or a blank, a stroke, a question."""
        values = (f"{i} " for i in range(self.values))
        numbers = (f"^{i} " for i in range(self.max_hops + 1))
        return AlphabetTokenizer(
            symbols=(*values, *(("_ ", "| ", "? ") if self.unary else numbers))
        )

    @property
    def _width(self) -> int:
        """Positions of a query: the start, its hops, the answer."""
        return self.unary + 3 if self.unary else 3

    @property
    def length(self) -> int:
        """Positions of a row: the map and the queries."""
        return self.values + self._width * self.queries

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

    def _written(self, triples: Int[np.ndarray, "B Q 3"]) -> Int[np.ndarray, "B Q W"]:
        """The symbols of the queries."""
        start, hops, answer = np.split(triples, 3, axis=2)
        if not self.unary:
            return np.concatenate([start, self.values + hops, answer], axis=2)
        stroke = np.arange(self.unary) >= self.unary - hops
        question = np.full_like(start, self.values + 2)
        return np.concatenate([start, self.values + stroke, question, answer], axis=2)

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of one map and ``queries`` queries each."""
        table, triples = self._draw(seed=seed, count=count, queries=self.queries)
        written = self._written(triples)
        difficulty = np.full((count, self.length), UNDEFINED)
        difficulty[:, self.values + self._width - 2 :: self._width] = triples[:, :, 1]
        return task_batch(
            symbols=np.concatenate([table, written.reshape(count, -1)], axis=1),
            difficulty=difficulty,
            segment_length=self.length,
        )

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """A map and one query each."""
        table, triples = self._draw(seed=seed, count=count, queries=1)
        symbols = np.concatenate([table, self._written(triples)[:, 0]], axis=1) + FIRST_SYMBOL
        return [
            Problem(prompt=ids[:-1], answer=ids[-1:], difficulty=hops)
            for ids, hops in zip(symbols.tolist(), triples[:, 0, 1].tolist(), strict=True)
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Follows the map of the prompt step by step from the last query."""
        symbols = [i - FIRST_SYMBOL for i in prompt]
        value, written = symbols[1 - self._width], symbols[2 - self._width :]
        hops = written.count(self.values + 1) if self.unary else written[0] - self.values
        for _ in range(hops):
            value = symbols[value]
        return list(completion[:1]) == [value + FIRST_SYMBOL]

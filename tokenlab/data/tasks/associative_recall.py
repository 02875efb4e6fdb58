"""Looking up keys in a list of pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenlab.core.arrays import Int
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require, task_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Task):
    """Pairs (key, value) of distinct keys, then some of the keys again, each with its value.

    Queried keys are distinct, so a value is learned from its pair alone. Each is asked at its key
    token, whose target is the value. Difficulty is the distance in tokens from there back to the
    key in its pair.

    Reference: Simran Arora, Sabri Eyuboglu, Aman Timalsina, Isys Johnson, Michael Poli, James Zou,
    Atri Rudra, Christopher Ré, "Zoology: Measuring and Improving Recall in Efficient Language
    Models", 2023, arXiv 2312.04927 (multi-query associative recall).

    Differences from the paper: queries follow the pairs without gaps, in uniform order.

    Attributes:
        keys: number of keys of the alphabet.
        values: number of values of the alphabet.
        pairs: pairs of a row.
        queries: queries of a row.
    """

    keys: int = 64
    values: int = 64
    pairs: int = 16
    queries: int = 8

    def __post_init__(self):
        require(self.values > 0, f"AssociativeRecall.values is {self.values}; use 1 or more")
        require(
            0 < self.queries <= self.pairs <= self.keys,
            f"AssociativeRecall has {self.queries} queries, {self.pairs} pairs, {self.keys} keys; "
            "use 0 < queries <= pairs <= keys",
        )

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Keys, then values."""
        keys = (f"k{i} " for i in range(self.keys))
        values = (f"v{i} " for i in range(self.values))
        return AlphabetTokenizer(symbols=(*keys, *values))

    @property
    def length(self) -> int:
        """Positions of a row: two for each pair and each query."""
        return 2 * (self.pairs + self.queries)

    def _draw(
        self, *, seed: Seed, count: int
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        rng = np.random.default_rng(seed)
        keys = np.tile(np.arange(self.keys), (count, 1))
        keys = rng.permuted(keys, axis=1)[:, : self.pairs]
        values = rng.integers(self.keys, self.keys + self.values, size=keys.shape)
        asked = np.tile(np.arange(self.pairs), (count, 1))
        asked = rng.permuted(asked, axis=1)[:, : self.queries]
        entries = np.concatenate([np.tile(np.arange(self.pairs), (count, 1)), asked], axis=1)
        symbols = np.empty((count, self.length), np.int64)
        symbols[:, 0::2] = np.take_along_axis(keys, entries, axis=1)
        symbols[:, 1::2] = np.take_along_axis(values, entries, axis=1)
        difficulty = np.full_like(symbols, UNDEFINED)
        difficulty[:, 2 * self.pairs :: 2] = 2 * (
            np.arange(self.pairs, self.pairs + self.queries) - asked
        )
        return symbols, difficulty

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of ``pairs`` pairs and ``queries`` queries each."""
        symbols, difficulty = self._draw(seed=seed, count=count)
        return task_batch(
            symbols=symbols,
            difficulty=difficulty,
            segment_length=self.length,
        )

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """The pairs and one queried key each."""
        symbols, difficulty = self._draw(seed=seed, count=count)
        cut = 2 * self.pairs + 1
        return [
            Problem(prompt=ids[:cut], answer=ids[cut : cut + 1], difficulty=distance)
            for ids, distance in zip(
                (symbols + FIRST_SYMBOL).tolist(), difficulty[:, cut - 1].tolist(), strict=True
            )
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Searches the prompt for the last key and compares what follows it there."""
        ids = list(prompt)
        return list(completion[:1]) == [ids[ids.index(ids[-1]) + 1]]

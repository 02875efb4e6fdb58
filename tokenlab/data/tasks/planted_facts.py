"""Facts in a long text, and questions about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenlab.core.arrays import Int
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import (
    UNDEFINED,
    Problem,
    Seed,
    Task,
    TaskBatch,
    require,
    task_batch,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedFacts(Task):
    """Facts in a text that has nothing to do with them, and questions behind it.

    A word of the text is followed by one of four. A fact is one more word, of a key and its value,
    anywhere in the text; a question is a key, and its value follows. Difficulty is the distance
    in tokens from there back to what says it.

    Attributes:
        size: positions of a row.
        facts: facts of a row, of distinct keys; all are asked.
        record: facts that stand side by side, and are asked one after another.
        keys: number of keys.
        values: number of values.
        words: number of words beside the facts.
        text: whether words of the text count as answers too, where one can know which four may
            follow; when facts come, and what is asked, nobody can.
        span: what positions are counted up to, by skipping some at three places (Zhu et al.,
            "PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise Training",
            2023, arXiv:2309.10400); None skips none.
    """

    size: int = 1024
    facts: int = 6
    record: int = 1
    keys: int = 16
    values: int = 8
    words: int = 32
    text: bool = False
    span: int | None = None

    def __post_init__(self) -> None:
        require(
            0 < self.facts <= self.keys and self.words >= 4 and self.values > 0,
            f"PlantedFacts has {self.facts} facts, {self.keys} keys, {self.words} words; use "
            "0 < facts <= keys and 4 or more words",
        )
        require(
            self.record > 0 and self.facts % self.record == 0,
            f"PlantedFacts has {self.facts} facts in records of {self.record}; use a divisor",
        )
        require(
            self.size > 3 * self.facts and (self.span is None or self.span >= self.size),
            f"PlantedFacts of size {self.size} and span {self.span} has no room for "
            f"{self.facts} facts and their questions; use more than three tokens a fact",
        )

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Values, keys, words; the last words are the facts."""
        words = self.words + self.keys * self.values
        counts = {"v": self.values, "k": self.keys, "w": words}
        symbols = (f"{kind}{i} " for kind, count in counts.items() for i in range(count))
        return AlphabetTokenizer(symbols=tuple(symbols))

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.size

    def _draw(
        self, *, seed: Seed, count: int
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        rng, rows = np.random.default_rng(seed), np.arange(count)[:, None]
        body = self.size - 2 * self.facts
        keys = np.argsort(rng.random((count, self.keys)), axis=1)[:, : self.facts]
        values = rng.integers(self.values, size=keys.shape)
        places = np.argsort(rng.random((count, body // self.record)), axis=1)
        first = self.record * places[:, : self.facts // self.record, None]
        told = (first + np.arange(self.record)).reshape(count, self.facts)
        symbols = np.full((count, self.size), -1)
        symbols[:, body::2], symbols[:, body + 1 :: 2] = keys + self.values, values
        fact = self.values + self.keys + self.words
        symbols[rows, told] = fact + keys * self.values + values
        difficulty = np.full_like(symbols, UNDEFINED)
        difficulty[:, body::2] = np.arange(body, self.size, 2)[None] - told
        table = np.tile(np.arange(self.words), (self.words, 1))
        follows = np.random.default_rng(0).permuted(table, axis=1)[:, :4]
        word, said = rng.integers(self.words, size=count), np.full(count, -1)
        for t in range(body):
            free = symbols[:, t] < 0
            word = np.where(free, follows[word, rng.integers(4, size=count)], word)
            symbols[:, t] = np.where(free, word + self.values + self.keys, symbols[:, t])
            if t and self.text:
                difficulty[:, t - 1] = np.where(free & (said >= 0), t - 1 - said, UNDEFINED)
            said = np.where(free, t, said)
        return symbols, difficulty

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of a text, its facts and the questions."""
        symbols, difficulty = self._draw(seed=seed, count=count)
        rows = task_batch(symbols=symbols, difficulty=difficulty, segment_length=self.size)
        if self.span is None:
            return rows
        rng = np.random.default_rng((1, seed) if isinstance(seed, int) else (1, *seed))
        skips = rng.integers((self.span - self.size) // 3 + 1, size=(count, 3, 1))
        behind = rng.integers(1, self.size, size=(count, 3, 1)) <= np.arange(self.size)
        skipped = np.sum(skips * behind, axis=1).astype(np.int32)
        return rows._replace(positions=rows.positions + skipped)

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """The text and one question each."""
        symbols, difficulty = self._draw(seed=seed, count=count)
        cut = self.size - 2 * self.facts + 1
        return [
            Problem(prompt=ids[:cut], answer=ids[cut : cut + 1], difficulty=distance)
            for ids, distance in zip(
                (symbols + FIRST_SYMBOL).tolist(), difficulty[:, cut - 1].tolist(), strict=True
            )
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Searches the prompt for the fact of its last key."""
        first = FIRST_SYMBOL + self.values + self.keys + self.words
        key = prompt[-1] - FIRST_SYMBOL - self.values
        facts = (id - first for id in prompt if (id - first) // self.values == key)
        return list(completion[:1]) == [FIRST_SYMBOL + next(facts) % self.values]

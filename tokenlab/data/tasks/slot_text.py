"""Writing out what a list of slots says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenlab.core.arrays import Int
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require, task_batch

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotText(Task):
    """The values of slots, then a text with a clause for each, in any order and wording.

    A clause of slot s in wording k is an opening of (s, k), ``words`` words of (s, k), the value,
    ``words`` more words and a close of k. The order of the clauses and the wording of each are
    drawn evenly, so a text has ``log(slots! * wordings ** slots)`` nats that nobody can predict;
    all else follows from the slots and what is written. Difficulty is the number of clauses before.

    Attributes:
        slots: slots of a row, and clauses of its text.
        values: values of a slot.
        wordings: ways to word a clause.
        words: words on each side of the value.
    """

    slots: int = 5
    values: int = 8
    wordings: int = 3
    words: int = 2

    def __post_init__(self):
        require(
            1 <= self.slots <= len(LETTERS),
            f"SlotText.slots is {self.slots}; use 1 to {len(LETTERS)}",
        )
        for name in ("values", "wordings"):
            require(getattr(self, name) > 0, f"SlotText.{name} must be 1 or more")
        require(self.words >= 1, f"SlotText.words is {self.words}; use 1 or more")

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Slots with their values, the sign that ends them, openings, words, values, closes."""
        letters = LETTERS[: self.slots]
        groups = (
            [f"{letter}{value} " for letter in letters for value in range(self.values)],
            ["> "],
            [f"[{letter}{k} " for letter in letters for k in range(self.wordings)],
            [f"w{word} " for word in range(self._vocabulary)],
            [f"={value} " for value in range(self.values)],
            [f"{k}] " for k in range(self.wordings)],
        )
        return AlphabetTokenizer(symbols=tuple(symbol for group in groups for symbol in group))

    @property
    def _vocabulary(self) -> int:
        """Words, one for each clause and wording, so that no two clauses have the same."""
        return self.slots * self.wordings

    @property
    def _clause(self) -> int:
        return 2 * self.words + 3

    @property
    def length(self) -> int:
        """Positions of a row: the slots, the sign behind them, the text."""
        return self.slots + 1 + self.slots * self._clause

    @property
    def prompt_length(self) -> int:
        """Positions before the text."""
        return self.slots + 1

    def _clause_of(self, slot: Any, wording: Any, value: Any) -> list[Any]:
        """The symbols of a clause, or of an array of them each."""
        opens = self.slots * self.values + 1
        words, kind = opens + self._vocabulary, slot * self.wordings + wording
        said = [words + (kind + 4 * i) % self._vocabulary for i in range(2 * self.words)]
        middle = words + self._vocabulary + value
        close = words + self._vocabulary + self.values + wording
        return [opens + kind, *said[: self.words], middle, *said[self.words :], close]

    def _draw(self, *, seed: Seed, count: int) -> Int[np.ndarray, "B T"]:
        rng = np.random.default_rng(seed)
        shape = (count, self.slots)
        values = rng.integers(self.values, size=shape)
        order = rng.permuted(np.tile(np.arange(self.slots), (count, 1)), axis=1)
        wording = rng.integers(self.wordings, size=shape)
        said = np.take_along_axis(values, order, axis=1)
        text = np.stack(self._clause_of(order, wording, said), axis=-1)
        given = np.arange(self.slots) * self.values + values
        sign = np.full((count, 1), self.slots * self.values)
        return np.concatenate([given, sign, text.reshape(count, -1)], axis=1)

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of one list of slots and its text each."""
        difficulty = np.full((count, self.length), UNDEFINED)
        clauses = np.repeat(np.arange(self.slots), self._clause)
        difficulty[:, self.slots : -1] = clauses
        return task_batch(
            symbols=self._draw(seed=seed, count=count),
            difficulty=difficulty,
            segment_length=self.length,
        )

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """Slots, and one of the texts that say what they hold."""
        cut = self.prompt_length
        return [
            Problem(prompt=ids[:cut], answer=ids[cut:], difficulty=self.slots - 1)
            for ids in (self._draw(seed=seed, count=count) + FIRST_SYMBOL).tolist()
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Whether each slot has one clause, in any order and wording, with its value."""
        values = [(i - FIRST_SYMBOL) % self.values for i in prompt[: self.slots]]
        opens, left = self.slots * self.values + 1, set(range(self.slots))
        for start in range(0, self.slots * self._clause, self._clause):
            written = [i - FIRST_SYMBOL for i in completion[start : start + self._clause]]
            slot, wording = divmod(written[0] - opens if written else -1, self.wordings)
            if slot not in left or written != self._clause_of(slot, wording, values[slot]):
                return False
            left.remove(slot)
        return True

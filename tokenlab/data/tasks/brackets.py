"""Brackets of several kinds, nested to a bounded depth, among filler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require, task_batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brackets(Task):
    """A word of Dyck's language over ``kinds`` of brackets, with letters between them.

    ``(0 a (1 ! )1 ! )0``: a sign announces every closing bracket, whose kind is asked for. Its
    difficulty is 1 plus the depth of what is nested in the pair, so 1 where the last bracket that
    was opened is closed before any other. Letters are easy: nothing follows from them.

    Attributes:
        kinds: of brackets.
        pairs: of a row.
        max_depth: most brackets that are open at once.
        letters: of a row.
        alphabet: letters to choose from.
    """

    kinds: int = 3
    pairs: int = 8
    max_depth: int = 4
    letters: int = 8
    alphabet: int = 4

    def __post_init__(self):
        for name in ("kinds", "pairs", "max_depth", "alphabet"):
            require(getattr(self, name) > 0, f"Brackets.{name} must be 1 or more")
        require(self.letters >= 0, f"Brackets.letters is {self.letters}; use 0 or more")

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Opening brackets, closing brackets, letters, the sign."""
        groups = (("(", self.kinds), (")", self.kinds), ("w", self.alphabet))
        signs = (f"{sign}{i} " for sign, count in groups for i in range(count))
        return AlphabetTokenizer(symbols=(*signs, "! "))

    @property
    def length(self) -> int:
        """Positions of a row: three for a pair, one for a letter."""
        return 3 * self.pairs + self.letters

    def _row(self, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Symbols, each with the difficulty of the one behind it."""
        sign = 2 * self.kinds + self.alphabet
        places = rng.permutation(2 * self.pairs + self.letters) < self.letters
        row, stack, left = [], [], self.pairs
        for letter in places.tolist():
            if letter:
                row.append((2 * self.kinds + int(rng.integers(self.alphabet)), UNDEFINED))
            elif left and len(stack) < self.max_depth and (not stack or rng.random() < 0.5):
                stack.append((int(rng.integers(self.kinds)), 0))
                row.append((stack[-1][0], UNDEFINED))
                left -= 1
            else:
                kind, inside = stack.pop()
                row += [(sign, 1 + inside), (self.kinds + kind, UNDEFINED)]
                if stack:
                    outer, most = stack[-1]
                    stack[-1] = (outer, max(most, 1 + inside))
        return row

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of one word each."""
        rng = np.random.default_rng(seed)
        rows = np.asarray([self._row(rng) for _ in range(count)]).reshape(count, self.length, 2)
        return task_batch(symbols=rows[..., 0], difficulty=rows[..., 1], segment_length=self.length)

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """A word up to the last of its closing brackets each."""
        batch = self.sample(seed=seed, count=count)
        at = self.length - 1 - np.argmax(batch.weights[:, ::-1] > 0, axis=1)
        return [
            Problem(
                prompt=tokens[: place + 1].tolist(),
                answer=[int(targets[place])],
                difficulty=int(hard[place]),
            )
            for place, tokens, targets, hard in zip(
                at, batch.tokens, batch.targets, batch.difficulty, strict=True
            )
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Keeps the brackets of the prompt that are open."""
        stack = []
        for symbol in (i - FIRST_SYMBOL for i in prompt):
            if symbol < self.kinds:
                stack.append(symbol)
            elif symbol < 2 * self.kinds:
                stack.pop()
        return list(completion[:1]) == [FIRST_SYMBOL + self.kinds + stack[-1]]

"""Short programs, questions about their names, and words that are written twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenlab.core.arrays import Int
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require, task_batch

_MARKS = ("= ", "+ ", "; ", "? ", "# ", ": ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs(Task):
    """Names that are set, one to a number, others to an earlier name plus a number: what are they?

    A row is ``x2 = n3 ; x0 = x2 + n4 ; ...``, then ``queries`` times a question ``x0 ? n7`` and a
    word of random letters that is written twice, ``# a b c : a b c``. Values are modulo
    ``modulus``. Answers and the second writing of words are asked for; the difficulty of an answer
    is 1 plus the additions behind it, that of a letter is 0. So hard tokens stand among easy ones.

    Attributes:
        statements: names that are set, at least 1.
        names: to choose from, as many as statements or more.
        modulus: values are below it, at least 2.
        queries: of a row.
        letters: of a word.
        alphabet: letters to choose from.
    """

    statements: int = 4
    names: int = 6
    modulus: int = 10
    queries: int = 3
    letters: int = 3
    alphabet: int = 8

    def __post_init__(self):
        require(
            1 <= self.statements <= self.names,
            f"Programs sets {self.statements} of {self.names} names; use 1 or more, and no more "
            "than names",
        )
        require(self.modulus >= 2, f"Programs.modulus is {self.modulus}; use 2 or more")
        for name in ("queries", "letters", "alphabet"):
            require(getattr(self, name) > 0, f"Programs.{name} must be 1 or more")

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Names, numbers, letters, marks."""
        groups = (("x", self.names), ("n", self.modulus), ("w", self.alphabet))
        words = (f"{sign}{i} " for sign, count in groups for i in range(count))
        return AlphabetTokenizer(symbols=(*words, *_MARKS))

    def _mark(self, mark: str) -> int:
        return self.names + self.modulus + self.alphabet + _MARKS.index(f"{mark} ")

    @property
    def _program(self) -> int:
        return 4 + 6 * (self.statements - 1)

    @property
    def length(self) -> int:
        """Positions of a row: the program, the questions, the words."""
        return self._program + self.queries * (3 + 2 * self.letters + 2)

    def _programs(
        self, rng: np.random.Generator, count: int
    ) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, "B N 2"], Int[np.ndarray, "B M"]]:
        """Programs; of each name its value and the additions behind it; the names that are set."""
        order = rng.permuted(np.tile(np.arange(self.names), (count, 1)), axis=1)
        added = rng.integers(self.modulus, size=(count, self.statements))
        values, depths = np.zeros((2, count, self.names), int)
        rows, columns = np.arange(count), []
        for number in range(self.statements):
            name, term = order[:, number], added[:, number]
            values[rows, name] = term
            mark = {sign: np.full(count, self._mark(sign)) for sign in "=+;"}
            said = [self.names + term, mark[";"]]
            if number:
                source = order[rows, rng.integers(number, size=count)]
                values[rows, name] = (values[rows, source] + term) % self.modulus
                depths[rows, name] = depths[rows, source] + 1
                said = [source, mark["+"], *said]
            columns += [name, mark["="], *said]
        set_names = order[:, : self.statements]
        return np.stack(columns, axis=1), np.stack([values, depths], axis=2), set_names

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of one program each."""
        rng = np.random.default_rng(seed)
        program, meaning, names = self._programs(rng, count)
        rows = np.arange(count)
        parts, hard = [program], [np.full(program.shape, UNDEFINED)]
        for _ in range(self.queries):
            name = names[rows, rng.integers(self.statements, size=count)]
            value, depth = meaning[rows, name].T
            first = self.names + self.modulus
            word = first + rng.integers(self.alphabet, size=(count, self.letters))
            asked, open_, again = (np.full(count, self._mark(sign)) for sign in "?#:")
            question = np.stack([name, asked, self.names + value, open_], axis=1)
            parts += [question, word, again[:, None], word]
            difficulty = np.full((count, 3 + 2 * self.letters + 2), UNDEFINED)
            difficulty[:, 1] = 1 + depth
            difficulty[:, 4 + self.letters : -1] = 0
            hard.append(difficulty)
        return task_batch(
            symbols=np.concatenate(parts, axis=1),
            difficulty=np.concatenate(hard, axis=1),
            segment_length=self.length,
        )

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """A program and its first question each."""
        batch, at = self.sample(seed=seed, count=count), self._program + 1
        return [
            Problem(
                prompt=tokens[: at + 1].tolist(),
                answer=[int(targets[at])],
                difficulty=int(hard[at]),
            )
            for tokens, targets, hard in zip(
                batch.tokens, batch.targets, batch.difficulty, strict=True
            )
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Runs the program of the prompt."""
        symbols = [i - FIRST_SYMBOL for i in prompt]
        values = {symbols[0]: symbols[2] - self.names}
        for at in range(4, self._program, 6):
            name, _, source, _, term = symbols[at : at + 5]
            values[name] = (values[source] + term - self.names) % self.modulus
        return list(completion[:1]) == [FIRST_SYMBOL + self.names + values[symbols[-2]]]

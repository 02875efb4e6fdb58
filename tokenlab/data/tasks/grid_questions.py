"""Questions about a grid of coloured patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenlab.core.arrays import Int
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require, task_batch

RED = 0
MARKED, COUNT = 0, 1
# Rows and columns from a landmark to the patch that is asked for: to its right, and below it.
DIRECTIONS = ((0, 1), (1, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridQuestions(Task):
    """Frames of coloured patches, then questions about them, each with its answer.

    One patch is marked. Some colours are landmarks, each on one patch, which lies neither in the
    last row nor in the last column of its frame. The questions are the colour of the marked patch,
    how many patches are red, and for each landmark the colour to its right and below it; a row asks
    each at most once, in any order. Difficulty is how many patches have to be read: 1, all of them,
    and 2.

    Attributes:
        frames: frames of a row.
        height: rows of a frame, at least 2.
        width: columns of a frame, at least 2.
        landmarks: colours that are on one patch each.
        colours: all colours, red, the landmarks, and at least one more.
        most_red: highest count of red patches; all from 0 are equally likely.
        questions: questions of a row; None is all there are.
    """

    frames: int = 1
    height: int = 8
    width: int = 8
    landmarks: int = 4
    colours: int = 9
    most_red: int = 7
    questions: int | None = None

    def __post_init__(self):
        require(
            self.frames > 0 and min(self.height, self.width) > 1,
            f"GridQuestions has {self.frames} frames of {self.height} by {self.width}; "
            "use 1 or more frames of at least 2 by 2",
        )
        require(
            0 <= self.landmarks <= min(self._inner, self.colours - 2),
            f"GridQuestions has {self.landmarks} landmarks of {self.colours} colours; "
            f"use 0 to {min(self._inner, self.colours - 2)} landmarks",
        )
        require(
            0 <= self.most_red <= self.patches - self.landmarks,
            f"GridQuestions.most_red is {self.most_red}; use 0 to {self.patches - self.landmarks}",
        )
        require(
            self.questions is None or 0 < self.questions <= self.kinds,
            f"GridQuestions.questions is {self.questions}; use 1 to {self.kinds}",
        )

    @property
    def kinds(self) -> int:
        """Number of different questions: marked, red, then both of each landmark."""
        return 2 + len(DIRECTIONS) * self.landmarks

    @property
    def _inner(self) -> int:
        """Patches that a landmark may lie on."""
        return self.frames * (self.height - 1) * (self.width - 1)

    @property
    def _asked(self) -> int:
        return self.kinds if self.questions is None else self.questions

    @property
    def patches(self) -> int:
        """Patches of a row."""
        return self.frames * self.height * self.width

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Colours, the same marked, questions, and numbers."""
        patches = (f"p{i} " for i in range(2 * self.colours))
        questions = (f"q{i} " for i in range(self.kinds))
        numbers = (f"n{i} " for i in range(self.most_red + 1))
        return AlphabetTokenizer(symbols=(*patches, *questions, *numbers))

    @property
    def length(self) -> int:
        """Positions of a row: the patches, and two for each question."""
        return self.patches + 2 * self._asked

    @property
    def _first_number(self) -> int:
        return 2 * self.colours + self.kinds

    def _draw(
        self, *, seed: Seed, count: int, questions: int
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        rng = np.random.default_rng(seed)
        size, rows = self.patches, np.arange(count)[:, None]
        inner = np.arange(size).reshape(self.frames, self.height, self.width)[:, :-1, :-1]
        inner = np.tile(inner.reshape(1, -1), (count, 1))
        landmark = rng.permuted(inner, axis=1)[:, : self.landmarks]
        marked = rng.integers(size, size=count)
        red = rng.integers(self.most_red + 1, size=count)
        colour = rng.integers(self.landmarks + 1, self.colours, size=(count, size))
        # The first of a random order are red; landmarks are its last.
        rank = rng.random((count, size))
        rank[rows, landmark] = 2.0
        order = np.argsort(np.argsort(rank, axis=1), axis=1)
        colour = np.where(order < red[:, None], RED, colour)
        colour[rows, landmark] = np.arange(1, self.landmarks + 1)
        kinds = np.tile(np.arange(self.kinds), (count, 1))
        asked = rng.permuted(kinds, axis=1)[:, :questions]
        answers = np.empty((count, self.kinds), np.int64)
        answers[:, MARKED] = colour[rows[:, 0], marked]
        answers[:, COUNT] = self._first_number + red
        for number, (down, right) in enumerate(DIRECTIONS, start=2):
            there = colour[rows, landmark + down * self.width + right]
            answers[:, number :: len(DIRECTIONS)] = there
        rows = rows[:, 0]
        colour[rows, marked] += self.colours
        symbols = np.empty((count, size + 2 * questions), np.int64)
        symbols[:, :size] = colour
        symbols[:, size::2] = 2 * self.colours + asked
        symbols[:, size + 1 :: 2] = np.take_along_axis(answers, asked, axis=1)
        difficulty = np.full_like(symbols, UNDEFINED)
        read = np.full(self.kinds, 2)
        read[[MARKED, COUNT]] = 1, size
        difficulty[:, size::2] = read[asked]
        return symbols, difficulty

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of one grid and ``questions`` questions each."""
        symbols, difficulty = self._draw(seed=seed, count=count, questions=self._asked)
        return task_batch(symbols=symbols, difficulty=difficulty, segment_length=self.length)

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """A grid and one question each."""
        symbols, difficulty = self._draw(seed=seed, count=count, questions=1)
        return [
            Problem(prompt=ids[:-1], answer=ids[-1:], difficulty=hard)
            for ids, hard in zip(
                (symbols + FIRST_SYMBOL).tolist(), difficulty[:, -2].tolist(), strict=True
            )
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Looks for the answer in the grid of the prompt."""
        symbols = [i - FIRST_SYMBOL for i in prompt]
        patches, kind = symbols[: self.patches], symbols[-1] - 2 * self.colours
        plain = [symbol % self.colours for symbol in patches]
        if kind == MARKED:
            answer = next(s - self.colours for s in patches if s >= self.colours)
        elif kind == COUNT:
            answer = self._first_number + plain.count(RED)
        else:
            number, direction = divmod(kind - 2, len(DIRECTIONS))
            down, right = DIRECTIONS[direction]
            answer = plain[plain.index(number + 1) + down * self.width + right]
        return list(completion[:1]) == [answer + FIRST_SYMBOL]

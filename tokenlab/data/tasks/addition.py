"""Adding numbers digit by digit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tokenlab.core.arrays import Int
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require, task_batch

PLUS, EQUALS = 10, 11


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition(Task):
    """``a+b=sum`` with ``digits`` digits per number and one more in the sum, zeros in front kept.

    Difficulty of a digit of the sum is the length of the carry chain that reaches it: 0 without a
    carry, else how many digits to the right one must go back to the one that began the carry (a
    pair of sum 10 or more), over pairs of sum 9 that hand it on. Each sum is a segment of its own.

    Reference: Nayoung Lee, Kartik Sreenivasan, Jason D. Lee, Kangwook Lee, Dimitris Papailiopoulos,
    "Teaching Arithmetic to Small Transformers", 2023, arXiv 2307.03381 (reversed sums).

    Differences from the paper: fixed width, no delimiters, and drawn chains of carries.

    Attributes:
        digits: digits of each number.
        sums: sums of a row.
        reversed: write the digits of the sum from the last to the first.
        chained: probability that a digit of ``b`` is made 9 less that of ``a``; 0 draws both
            numbers uniformly, in which long chains of carries are rare.
    """

    digits: int = 4
    sums: int = 4
    reversed: bool = False
    chained: float = 0.0

    def __post_init__(self):
        require(self.digits > 0, f"Addition.digits is {self.digits}; use 1 or more")
        require(self.sums > 0, f"Addition.sums is {self.sums}; use 1 or more")
        require(
            0 <= self.chained <= 1,
            f"Addition.chained is {self.chained}; use a probability from 0 to 1",
        )

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Ten digits, plus and equals."""
        return AlphabetTokenizer(symbols=tuple("0123456789+="))

    @property
    def _width(self) -> int:
        return 3 * self.digits + 3

    @property
    def length(self) -> int:
        """Positions of a row: ``sums`` times two numbers, their sum, plus and equals."""
        return self.sums * self._width

    def _draw(
        self, *, seed: Seed, count: int
    ) -> tuple[Int[np.ndarray, "N W"], Int[np.ndarray, "N W"]]:
        rng = np.random.default_rng(seed)
        a = rng.integers(10, size=(count, self.digits))
        b = rng.integers(10, size=(count, self.digits))
        b = np.where(rng.random(b.shape) < self.chained, 9 - a, b)
        total = np.zeros((count, self.digits + 1), np.int64)  # last digit first
        chain = np.zeros_like(total)
        for place in range(self.digits):
            pair = a[:, -1 - place] + b[:, -1 - place]
            total[:, place] = (pair + (chain[:, place] > 0)) % 10
            handed_on = np.where(chain[:, place] > 0, chain[:, place] + 1, 0)
            chain[:, place + 1] = np.where(pair > 9, 1, np.where(pair == 9, handed_on, 0))
        total[:, -1] = chain[:, -1] > 0
        order = slice(None) if self.reversed else slice(None, None, -1)
        plus, equals = (np.full((count, 1), symbol) for symbol in (PLUS, EQUALS))
        symbols = np.concatenate([a, plus, b, equals, total[:, order]], axis=1)
        difficulty = np.full_like(symbols, UNDEFINED)
        difficulty[:, 2 * self.digits + 1 : -1] = chain[:, order]
        return symbols, difficulty

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of ``sums`` sums each."""
        symbols, difficulty = self._draw(seed=seed, count=count * self.sums)
        return task_batch(
            symbols=symbols.reshape(count, -1),
            difficulty=difficulty.reshape(count, -1),
            segment_length=self._width,
        )

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """One sum each, up to the equals sign; difficulty is its longest chain."""
        symbols, difficulty = self._draw(seed=seed, count=count)
        cut = 2 * self.digits + 2
        return [
            Problem(prompt=ids[:cut], answer=ids[cut:], difficulty=longest)
            for ids, longest in zip(
                (symbols + FIRST_SYMBOL).tolist(), difficulty.max(axis=1).tolist(), strict=True
            )
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Reads both numbers from the prompt and adds them as integers."""
        a, b = self.tokenizer.decode(prompt).decode().rstrip("=").split("+")
        total = str(int(a) + int(b)).zfill(self.digits + 1)
        wanted = self.tokenizer.encode(total[::-1] if self.reversed else total)
        return list(completion[: len(wanted)]) == wanted

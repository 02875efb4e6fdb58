"""The least non-negative total of digits with signs, thought through one digit at a time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from tokenlab.core.arrays import Float, Int
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require, task_batch

BOS = AlphabetTokenizer.bos_id - FIRST_SYMBOL  # counted as a symbol
_MOST_INSTANCES = 10**6


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinimumNonNegativeSum(Task):
    """Digits ``d_1 .. d_m``, then partial sums of ``± d_1 ± d_2 ...``, then the answer.

    The answer is the least total that is not negative. A trace is one choice of signs; its state
    after t digits is their sum. What is predicted after t digits is a distribution: the share of
    the supervised traces that are in each state, and at the end the answer alone. The symbols
    written are the trace of the answer. A row also has the ``mixture`` to feed at each thought:
    what was to be predicted one position earlier. With one trace a row is a discrete chain of
    thought. Difficulty is the number of states that all traces are in.

    Instances are split by their digits whatever the order, so that no permutation of a training
    instance is held out.

    Reference: Gozeten, Ildiz, Zhang, Harutyunyan, Rawat, Oymak, "Continuous Chain of Thought
    Enables Parallel Exploration and Reasoning", 2025, arXiv:2505.23648.

    Differences from the paper: no special symbols but the beginning, and 0 to 9 are written only as
    far as they are used; a hash says which digits are held out, so the share is met on average.

    Attributes:
        digits: m.
        low: least digit.
        high: greatest digit, at most 9.
        traces: supervised traces, those with the least distance of their total from 0, a total
            that is not negative first; None is all 2^m.
        part: which instances: of training, held out, or all.
        held_out: share of the held-out ones.
    """

    digits: int = 4
    low: int = 1
    high: int = 9
    traces: int | None = None
    part: Literal["train", "held_out", "all"] = "all"
    held_out: float = 0.2

    def __post_init__(self):
        require(
            self.digits > 0 and 0 <= self.low <= self.high <= 9,
            f"MinimumNonNegativeSum has {self.digits} digits from {self.low} to {self.high}; "
            "use at least 1 digit and 0 <= low <= high <= 9",
        )
        require(
            (self.high - self.low + 1) ** self.digits <= _MOST_INSTANCES,
            f"MinimumNonNegativeSum has more than {_MOST_INSTANCES} instances; use fewer digits",
        )
        require(
            self.traces is None or 0 < self.traces <= 2**self.digits,
            f"MinimumNonNegativeSum.traces is {self.traces}; use 1 to {2**self.digits}, or None",
        )
        require(
            0 <= self.held_out <= 1,
            f"MinimumNonNegativeSum.held_out is {self.held_out}; use 0 to 1",
        )

    @property
    def _most(self) -> int:
        return self.high * self.digits

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Digits, then sums from the least to the greatest."""
        digits = (f"d{i} " for i in range(10))
        sums = (f"s{i} " for i in range(-self._most, self._most + 1))
        return AlphabetTokenizer(symbols=(*digits, *sums))

    @property
    def length(self) -> int:
        """Positions of a row: the beginning, the digits, and all sums but the answer."""
        return 2 * self.digits

    def instances(self) -> Int[np.ndarray, "N M"]:
        """All digits of the part, in order."""
        return _instances(dataclasses.replace(self, traces=None))

    def states(self, *, digits: Int[np.ndarray, "B M"]) -> Int[np.ndarray, "B C M"]:
        """The sum after each digit, of all choices of signs, the best first."""
        signs = np.array(list(itertools.product((1, -1), repeat=self.digits)))
        states = np.cumsum(digits[:, None, :] * signs[None], axis=2)
        total = states[:, :, -1]
        order = np.argsort(2 * np.abs(total) + (total < 0), axis=1, kind="stable")
        return np.take_along_axis(states, order[:, :, None], axis=1)

    def shares(self, *, digits: Int[np.ndarray, "B M"]) -> Float[np.ndarray, "B M V"]:
        """What is to be predicted after each digit, over the vocabulary."""
        states = self.states(digits=digits)
        kept = states[:, : self.traces].copy()
        kept[:, :, -1] = states[:, :1, -1]
        count, traces, _ = kept.shape
        found = np.zeros((count, self.digits, self.tokenizer.vocab_size), np.float32)
        where = (
            np.arange(count)[:, None, None],
            np.arange(self.digits)[None, None],
            self._id(kept),
        )
        np.add.at(found, where, 1.0 / traces)
        return found

    def _id(self, sums: Int[np.ndarray, "*N"]) -> Int[np.ndarray, "*N"]:
        return FIRST_SYMBOL + 10 + self._most + sums

    def batch(self, *, digits: Int[np.ndarray, "B M"]) -> TaskBatch:
        """Rows of these digits."""
        count, m = digits.shape
        states = self.states(digits=digits)
        trace = self._id(states[:, 0]) - FIRST_SYMBOL
        symbols = np.concatenate([np.full((count, 1), BOS), digits, trace], axis=1)
        difficulty = np.full((count, self.length), UNDEFINED)
        ordered = np.sort(states, axis=1)
        difficulty[:, m:] = 1 + np.sum(ordered[:, 1:] != ordered[:, :-1], axis=1)
        rows = task_batch(
            symbols=symbols[:, :-1], difficulty=difficulty, segment_length=self.length
        )
        targets = rows.targets.copy()
        targets[:, -1] = symbols[:, -1] + FIRST_SYMBOL
        shares = self.shares(digits=digits)
        nothing = np.zeros((count, m, shares.shape[2]), np.float32)
        return rows._replace(
            targets=targets,
            distribution=np.concatenate([nothing, shares], axis=1),
            mixture=np.concatenate([nothing, nothing[:, :1], shares[:, :-1]], axis=1),
        )

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of instances of the part, drawn uniformly."""
        instances = self.instances()
        chosen = np.random.default_rng(seed).integers(len(instances), size=count)
        return self.batch(digits=instances[chosen])

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """The answer after the digits, without thoughts; instances repeat only if all are used."""
        instances = self.instances()
        order = np.random.default_rng(seed).permutation(len(instances))
        digits = instances[np.resize(order, count)]
        rows = self.batch(digits=digits)
        return [
            Problem(prompt=prompt, answer=[answer], difficulty=difficulty)
            for prompt, answer, difficulty in zip(
                rows.tokens[:, : self.digits + 1].tolist(),
                rows.targets[:, -1].tolist(),
                rows.difficulty[:, -1].tolist(),
                strict=True,
            )
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Adds up every choice of signs."""
        totals = {0}
        for token in prompt[1:]:
            digit = token - FIRST_SYMBOL
            totals = {total + sign * digit for total in totals for sign in (1, -1)}
        answer = min(total for total in totals if total >= 0)
        (wanted,) = self._id(np.array([answer])).tolist()
        return list(completion[:1]) == [wanted]


@functools.cache
def _instances(task: MinimumNonNegativeSum) -> Int[np.ndarray, "N M"]:
    values = range(task.low, task.high + 1)
    found = np.array(list(itertools.product(values, repeat=task.digits)))
    if task.part == "all":
        return found
    hashes = [zlib.crc32(bytes(row)) for row in np.sort(found, axis=1).astype(np.uint8).tolist()]
    outside = np.array(hashes) < task.held_out * 2**32
    kept = found[outside == (task.part == "held_out")]
    require(len(kept) > 0, f"{task} has no instance; change its held_out share")
    return kept

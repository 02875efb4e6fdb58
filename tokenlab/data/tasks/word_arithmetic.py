"""Arithmetic in words, with a plan and with steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require, task_batch

OPERATIONS = ("add", "subtract", "multiply", "reflect")
_NOTHING = len(OPERATIONS)  # the kind of a clause that changes nothing
_MARKS = ("?", "<plan>", "<slot>", "<think>", "check", "</think>")
_MOST_CHECKS = 3


class _Row(NamedTuple):
    """Ids of one problem.

    Attributes:
        prompt: what is given.
        written: what a model is to write, without the end.
        plan: the names of the operations between two marks.
        answer: the last value.
        operations: how many.
    """

    prompt: list[int]
    written: list[int]
    plan: list[int]
    answer: int
    operations: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordArithmetic(Task):
    """A number, then clauses that change it, most of them: what is it in the end?

    A clause is a verb and an operand from 1 to ``largest``. Each operation (``v + n``, ``v - n``,
    ``v * n``, ``n - v``, all modulo ``modulus``) has ``wordings`` verbs of its own, and so have the
    clauses that change nothing. After the question comes a plan, where there is one: the names of
    the operations in their order. Then, between ``<think>`` and ``</think>``, a step for each of
    them: its operand and the value after it. The last value once more is the answer. Difficulty is
    the number of operations.

    Attributes:
        modulus: values are below it, at least 2.
        largest: greatest operand, below the modulus.
        clauses: of a question.
        least: operations of a question at least.
        wordings: verbs of each kind of clause.
        plan: how the plan is given: not at all; written out, as the first of what a model writes;
            or apart, in the batch's ``plan``, with ``slots`` places for it in the prompt.
        slots: places, where the plan is apart.
        openings: words of which any one may open a step; 0 opens it with the operand.
        checks: probability that a step is followed by ``check`` and its value, and that by another
            one, up to three.
        cut: probability that the thoughts of a training row break off, evenly before any token.
    """

    modulus: int = 10
    largest: int = 9
    clauses: int = 4
    least: int = 2
    wordings: int = 3
    plan: Literal["none", "written", "apart"] = "none"
    slots: int = 2
    openings: int = 0
    checks: float = 0.0
    cut: float = 0.0

    def __post_init__(self):
        require(
            1 <= self.largest < self.modulus,
            f"WordArithmetic has operands up to {self.largest} modulo {self.modulus}; "
            "use 1 <= largest < modulus",
        )
        require(
            1 <= self.least <= self.clauses,
            f"WordArithmetic has {self.least} to {self.clauses} operations; use 1 or more, "
            "and no more than clauses",
        )
        require(
            self.wordings >= 1 and min(self.slots, self.openings) >= 0,
            f"WordArithmetic has {self.wordings} wordings, {self.slots} slots and {self.openings} "
            "openings; use 1 or more wordings and 0 or more of the others",
        )
        require(
            0 <= self.checks < 1 and 0 <= self.cut <= 1,
            f"WordArithmetic.checks is {self.checks} and cut is {self.cut}; use probabilities, "
            "and checks below 1",
        )

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Numbers, verbs by kind, names of operations, marks, openings."""
        numbers = (f"n{i} " for i in range(self.modulus))
        verbs = (f"v{i} " for i in range((_NOTHING + 1) * self.wordings))
        words = (f"{word} " for word in (*OPERATIONS, *_MARKS))
        openings = (f"so{i} " for i in range(self.openings))
        return AlphabetTokenizer(symbols=(*numbers, *verbs, *words, *openings))

    @property
    def _verbs(self) -> int:
        return FIRST_SYMBOL + self.modulus

    @property
    def _names(self) -> int:
        return self._verbs + (_NOTHING + 1) * self.wordings

    def mark(self, word: str) -> int:
        """The id of one of ``?``, ``<plan>``, ``<slot>``, ``<think>``, ``check``, ``</think>``."""
        return self._names + len(OPERATIONS) + _MARKS.index(word)

    @property
    def length(self) -> int:
        """Positions of a row: the question, the plan or its slots, all steps, and the answer."""
        planned = {"none": 0, "written": self.clauses + 1, "apart": self.slots}[self.plan]
        step = 2 + (self.openings > 0) + 2 * _MOST_CHECKS * (self.checks > 0)
        steps = self.clauses * step
        return 2 * self.clauses + 2 + planned + steps + 3

    def _rows(self, *, seed: Seed, count: int) -> list[_Row]:
        rng = np.random.default_rng(seed)
        size = (count, self.clauses)
        start = rng.integers(self.modulus, size=count)
        operations = rng.integers(self.least, self.clauses + 1, size=count)
        # Which clauses change the number: the first so many of a random order.
        order = rng.permuted(np.tile(np.arange(self.clauses), (count, 1)), axis=1)
        kinds = rng.integers(_NOTHING, size=size)
        kinds = np.where(order < operations[:, None], kinds, _NOTHING)
        operands, wording = (
            rng.integers(1, self.largest + 1, size=size),
            rng.integers(self.wordings, size=size),
        )
        checks = np.minimum(rng.geometric(1 - self.checks, size=size) - 1, _MOST_CHECKS)
        openings = rng.integers(max(self.openings, 1), size=size)
        kept = np.where(rng.random(count) < self.cut, rng.random(count), 1.0)
        drawn = (start, kinds, operands, wording, openings, checks, kept)
        return [self._row(*row) for row in zip(*(x.tolist() for x in drawn), strict=True)]

    def _row(
        self,
        start: int,
        kinds: list[int],
        operands: list[int],
        wording: list[int],
        openings: list[int],
        checks: list[int],
        kept: float,
    ) -> _Row:
        question, plan, steps, value = [FIRST_SYMBOL + start], [], [], start
        for kind, operand, k in zip(kinds, operands, wording, strict=True):
            question += [self._verbs + kind * self.wordings + k, FIRST_SYMBOL + operand]
            if kind != _NOTHING:
                value = _after(kind, value, operand) % self.modulus
                plan.append(self._names + kind)
                steps.append((FIRST_SYMBOL + operand, FIRST_SYMBOL + value))
        first = self.mark(_MARKS[-1]) + 1
        thoughts = [
            one
            for step, k, times in zip(steps, openings, checks, strict=False)
            for one in (
                *([first + k] if self.openings else []),
                *step,
                *(self.mark("check"), step[1]) * times,
            )
        ]
        thoughts = thoughts[: int(kept * len(thoughts))]
        think = self.mark("<think>")
        before = {
            "none": [think],
            "written": [self.mark("<plan>")],
            "apart": [self.mark("<slot>")] * self.slots + [think],
        }[self.plan]
        written = [*plan, think] if self.plan == "written" else []
        return _Row(
            prompt=[*question, self.mark("?"), *before],
            written=[*written, *thoughts, self.mark("</think>"), steps[-1][1]],
            plan=[self.mark("<plan>"), *plan, think],
            answer=steps[-1][1],
            operations=len(plan),
        )

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of one problem each, padded behind."""
        pad, end = (i - FIRST_SYMBOL for i in (0, AlphabetTokenizer.eos_id))
        symbols = np.full((count, self.length), pad)
        difficulty = np.full_like(symbols, UNDEFINED)
        plans = np.zeros((count, self.clauses + 2), np.int32)
        for i, row in enumerate(self._rows(seed=seed, count=count)):
            ids = np.array([*row.prompt, *row.written]) - FIRST_SYMBOL
            symbols[i, : len(ids)] = ids
            symbols[i, len(ids) : len(ids) + 1] = end
            difficulty[i, len(row.prompt) - 1 : len(ids)] = row.operations
            plans[i, : len(row.plan)] = row.plan
        rows = task_batch(symbols=symbols, difficulty=difficulty, segment_length=self.length)
        return rows._replace(
            segments=(symbols != pad).astype(np.int32),
            plan=plans if self.plan == "apart" else None,
        )

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """The question; the answer is that after the thoughts, which may go as they like."""
        return [
            Problem(prompt=row.prompt, answer=[row.answer], difficulty=row.operations)
            for row in self._rows(seed=seed, count=count)
        ]

    @property
    def plan_entropy(self) -> float:
        """Of plans, in nats: of their number of operations, and of each operation."""
        counts = range(self.least, self.clauses + 1)
        return math.log(len(counts)) + sum(counts) / len(counts) * math.log(len(OPERATIONS))

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Works the clauses out; reads what follows ``</think>``, or all where there is none."""
        value = prompt[0] - FIRST_SYMBOL
        for at in range(1, 2 * self.clauses + 1, 2):
            kind = (prompt[at] - self._verbs) // self.wordings
            if kind != _NOTHING:
                value = _after(kind, value, prompt[at + 1] - FIRST_SYMBOL)
        written, close = list(completion), self.mark("</think>")
        if close in written:
            written = written[written.index(close) + 1 :]
        return written[:1] == [FIRST_SYMBOL + value % self.modulus]


def _after(kind: int, value: int, operand: int) -> int:
    """The value after an operation."""
    return (value + operand, value - operand, value * operand, operand - value)[kind]

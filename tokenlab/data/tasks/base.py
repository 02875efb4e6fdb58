"""The task family: problems made from a seed, whose answers can be checked."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tokenlab.core.arrays import Float, Int
from tokenlab.core.errors import UserError
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer

Seed = int | tuple[int, ...]
UNDEFINED = -1  # the difficulty of a position that predicts no answer


class TaskBatch(NamedTuple):
    """Rows of problems.

    Attributes:
        tokens: int32 inputs.
        targets: int32; ``targets[t]`` is predicted at position ``t``.
        segments: int32; 1, 2, ... for the parts of a row that do not see each other.
        positions: int32; restart at 0 in each segment.
        weights: float32; 1 where the target is a token of an answer, else 0.
        difficulty: int32 at the positions of weight 1, in the task's own unit; -1 elsewhere.
        distribution: float32; where a task has more than one right target, the share of each at the
            positions of weight 1, and zero elsewhere. None where targets say all.
        mixture: float32; the shares of tokens that are read in place of one, and zero where the
            token itself is read. None where no position reads a mixture.
        plan: int32; ids of a plan that stands apart from its row, between two marks, 0 behind them.
            None where there is no such plan.
    """

    tokens: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    segments: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    weights: Float[np.ndarray, "B T"]
    difficulty: Int[np.ndarray, "B T"]
    distribution: Float[np.ndarray, "B T V"] | None = None
    mixture: Float[np.ndarray, "B T V"] | None = None
    plan: Int[np.ndarray, "B P"] | None = None


class Problem(NamedTuple):
    """One question for a model that generates.

    Attributes:
        prompt: ids to go on from.
        answer: ids that a right completion begins with.
        difficulty: in the task's unit; the largest of the answer's tokens.
    """

    prompt: list[int]
    answer: list[int]
    difficulty: int


class Task(abc.ABC):
    """Problems of known difficulty over an alphabet of their own."""

    @property
    @abc.abstractmethod
    def tokenizer(self) -> AlphabetTokenizer:
        """The alphabet, which a model of this task must use."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Positions of a row."""

    @abc.abstractmethod
    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Training rows; a pure function of its arguments.

        Args:
            seed: an integer, or several that name a stream.
            count: rows.
        """

    @abc.abstractmethod
    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """Single problems, for accuracy by generation; a pure function of its arguments.

        Args:
            seed: an integer, or several that name a stream.
            count: problems.
        """

    @abc.abstractmethod
    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Whether ``completion`` begins with the answer, worked out from ``prompt`` alone.

        Args:
            prompt: ids of a problem's prompt.
            completion: generated ids; what follows the answer is not read.
        """

    def features(self, rows: TaskBatch) -> Mapping[str, Mapping[str, Int[np.ndarray, "B T"]]]:
        """What may make a token hard beside its difficulty, by groups; none unless a task says so.

        Args:
            rows: of this task; features are worked out from their tokens.

        Returns:
            Of each group, as ``"static"``, its features by name, with meaning where rows have
            weight.
        """
        return {}


def require(ok: bool, message: str) -> None:
    """Raises a ``UserError`` of ``message`` unless ``ok``."""
    if not ok:
        raise UserError(message)


def task_batch(
    *,
    symbols: Int[np.ndarray, "B T"],
    difficulty: Int[np.ndarray, "B T"],
    segment_length: int,
) -> TaskBatch:
    """Shifts rows of symbols into inputs and targets; a segment's last target is eos.

    Args:
        symbols: what is written, counted from 0.
        difficulty: of the symbol after each one, -1 where that is no part of an answer.
        segment_length: positions of a segment, which divides the row.
    """
    tokens = (symbols + FIRST_SYMBOL).astype(np.int32)
    parts = tokens.reshape(len(tokens), -1, segment_length)
    ends = np.full_like(parts[:, :, :1], AlphabetTokenizer.eos_id)
    place = np.arange(tokens.shape[1], dtype=np.int32)
    return TaskBatch(
        tokens=tokens,
        targets=np.concatenate([parts[:, :, 1:], ends], axis=2).reshape(tokens.shape),
        segments=np.broadcast_to(place // segment_length + 1, tokens.shape),
        positions=np.broadcast_to(place % segment_length, tokens.shape),
        weights=(difficulty >= 0).astype(np.float32),
        difficulty=difficulty.astype(np.int32),
    )

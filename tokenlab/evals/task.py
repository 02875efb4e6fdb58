"""Accuracy on the synthetic tasks, by generation."""

from __future__ import annotations

import collections
import dataclasses
import zlib

import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from tokenlab.core.context import View
from tokenlab.core.errors import UserError
from tokenlab.core.rng import stream
from tokenlab.data.tasks import Task
from tokenlab.decode import Autoregressive, Decoder, Greedy
from tokenlab.evals.base import Evaluation
from tokenlab.tokenizers.base import Tokenizer

_STREAM = zlib.crc32(b"problems")  # no source draws its rows from this seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskAccuracy(Evaluation):
    """Share of a task's problems whose generated answer is right, and its course by difficulty.

    The model goes on from each prompt, by its likeliest tokens unless told otherwise, as many as
    the longest answer has; the task's own checker reads the completion. Beside ``accuracy`` and its
    binomial ``standard_error`` there is one figure for each difficulty that occurs, and ``tokens``,
    the mean length of what was written.

    Through a cache, ``decoder=Autoregressive(cache=..., prefill_chunk=...)``: a prompt that is read
    whole is read with all of its keys, and an answer of one token then never meets the cache. In
    chunks, the question at the prompt's end sees what the cache shows of the chunks before.

    Attributes:
        task: makes and checks the problems.
        problems: how many.
        batch_size: prompts continued at a time.
        seed: of the problems, and of what is drawn.
        decoder: how it goes on; its bound and its end are those of the task.
        thoughts: tokens before the answer, which are not read.
        room: further tokens that may be written, for tasks that find the answer in what they read.
        attempts: completions of each problem, one of which has to be right; more than one only
            helps a decoder that draws.
    """

    task: Task
    problems: int = 256
    batch_size: int = 64
    seed: int = 0
    decoder: Decoder = Autoregressive(sampler=Greedy())
    thoughts: int = 0
    room: int = 0
    attempts: int = 1

    def __post_init__(self) -> None:
        counts = (self.problems, self.batch_size, self.attempts)
        if min(counts) < 1 or min(self.thoughts, self.room) < 0:
            raise ValueError(
                "problems, batch_size and attempts must be 1 or more, thoughts and room 0 or more"
            )

    def __call__(
        self, *, model: nn.Module, params: PyTree, tokenizer: Tokenizer
    ) -> dict[str, float]:
        """Accuracy overall and by difficulty.

        Raises:
            UserError: the model was trained with another tokenizer than the task's.
        """
        if tokenizer.fingerprint != self.task.tokenizer.fingerprint:
            raise UserError(f"the tokenizer is not the alphabet of {self.task}; use its tokenizer")
        right: dict[int, list[bool]] = collections.defaultdict(list)
        view = View(model=model, params=params)
        lengths = []
        for difficulty, is_right, length in self._results(view, tokenizer.eos_id):
            right[difficulty].append(is_right)
            lengths.append(length)
        accuracy = float(np.mean([one for group in right.values() for one in group]))
        figures = {
            "accuracy": accuracy,
            "standard_error": float(np.sqrt(accuracy * (1 - accuracy) / self.problems)),
            "problems": self.problems,
            "tokens": float(np.mean(lengths)),
        }
        by_difficulty = {
            f"accuracy_at_{difficulty}": float(np.mean(right[difficulty]))
            for difficulty in sorted(right)
        }
        return figures | by_difficulty

    def _results(self, view: View, end_id: int) -> list[tuple[int, bool, float]]:
        """Difficulty of each problem, whether it was answered, and in how many tokens."""
        problems = self.task.problems(seed=(_STREAM, self.seed), count=self.problems)
        decoder = dataclasses.replace(
            self.decoder,
            max_new_tokens=self.thoughts
            + self.room
            + max(len(problem.answer) for problem in problems),
            end_ids=(end_id,),
        )
        results = []
        for start in range(0, self.problems, self.batch_size):
            batch = problems[start : start + self.batch_size]
            # The last batch repeats its first prompt, so that all have one shape.
            filled = batch + batch[:1] * (min(self.batch_size, self.problems) - len(batch))
            right, lengths = np.zeros(len(batch), bool), np.zeros(len(batch))
            for attempt in range(self.attempts):
                key = stream(self.seed, "attempt", start, attempt)
                written = decoder(view, [p.prompt for p in filled], key=key)
                lengths += written.lengths[: len(batch)] / self.attempts
                answers = [
                    tokens[self.thoughts : length].tolist()
                    for tokens, length in zip(written.tokens, written.lengths, strict=True)
                ]
                right |= [
                    self.task.check(prompt=problem.prompt, completion=answer)
                    for problem, answer in zip(batch, answers, strict=False)
                ]
            difficulties = [problem.difficulty for problem in batch]
            results += zip(difficulties, right.tolist(), lengths.tolist(), strict=True)
        return results

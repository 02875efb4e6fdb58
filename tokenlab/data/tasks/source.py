"""Endless rows of a task."""

from __future__ import annotations

import dataclasses
import sys
import zlib

import grain
import numpy as np

from tokenlab.core.arrays import Bool, Float, Int
from tokenlab.core.errors import UserError
from tokenlab.data.base import Batch, Corpus, Source
from tokenlab.data.pipeline import ahead, rows_per_shard
from tokenlab.data.tasks.base import Task, TaskBatch
from tokenlab.tokenizers.base import Tokenizer

SPLITS = ("train", "held_out")
BLOCK = 32  # rows drawn at once, which is far quicker than one by one


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSource(Source):
    """Rows made as they are needed, from the seed, the split and the number of the row.

    The order of the rows is the same for every batch size and number of processes. Beside the
    arrays of every source a batch has ``difficulty``, int32 [B, T], and of tasks that have them
    ``distribution`` and ``mixture``, float32 [B, T, V], and ``plan``, int32 [B, P]; ``documents``
    is the number of the row. The two splits never share a seed, but two rows of a small task may be
    alike by chance.

    Attributes:
        task: makes and checks the problems.
        split: ``"train"`` or ``"held_out"``.
        prompts: whether batches also have ``prompt``, bool [B, T]: what comes in a segment before
            the first symbol of its first answer.
    """

    task: Task
    split: str = "train"
    prompts: bool = False

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"TaskSource.split is {self.split!r}; use one of {SPLITS}")

    @property
    def tokens_per_row(self) -> int:
        """Positions of a row."""
        return self.task.length

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """None: rows are made, not read."""
        return ()

    def tokens_per_epoch(self, *, tokenizer: Tokenizer) -> int:
        """Refused: rows never repeat."""
        raise UserError("a task has no epochs; give durations in steps or Tokens")

    def batches(
        self,
        *,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> grain.IterDataset[Batch]:
        """Batches of rows; see ``Source.batches``.

        Raises:
            UserError: ``tokenizer`` is not the task's, or a batch that does not divide.
        """
        count = rows_per_shard(
            batch_size=batch_size, shard_index=shard_index, shard_count=shard_count
        )
        if tokenizer.fingerprint != self.task.tokenizer.fingerprint:
            raise UserError(
                f"the tokenizer is not the alphabet of {self.task}; use the task's own tokenizer"
            )
        stream = zlib.crc32(self.split.encode())

        def batch(step: int) -> Batch:
            first = step * batch_size + shard_index * count
            blocks = range(first // BLOCK, (first + count - 1) // BLOCK + 1)
            samples = [
                self.task.sample(seed=(stream, seed, block), count=BLOCK) for block in blocks
            ]
            mine = slice(first % BLOCK, first % BLOCK + count)
            arrays = {
                name: np.concatenate([getattr(sample, name) for sample in samples])[mine]
                for name in TaskBatch._fields
                if getattr(samples[0], name) is not None
            }
            if self.prompts:
                arrays["prompt"] = _prompts(arrays["weights"], arrays["segments"])
            # a number that outgrows int32 starts from 0 again
            numbers = np.arange(first, first + count)[:, None] % 2**31
            documents = np.broadcast_to(numbers.astype(np.int32), arrays["tokens"].shape)
            return arrays | {"documents": documents}

        steps = grain.MapDataset.range(sys.maxsize).map(batch)
        batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=0))
        return ahead(batches)


def _prompts(
    weights: Float[np.ndarray, "B T"], segments: Int[np.ndarray, "B T"]
) -> Bool[np.ndarray, "B T"]:
    """Tokens before which their segment has no target that counts."""
    answers = np.cumsum(weights > 0, axis=1) - (weights > 0)
    begins = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    earlier = np.maximum.accumulate(np.where(begins, answers, 0), axis=1)
    return (answers == earlier) & (segments > 0)

"""What every source shares: the share of a process, seeds, rows stacked into batches."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import grain
import numpy as np

from tokenlab.core.errors import UserError
from tokenlab.data.base import Batch

BATCHES_AHEAD = 2


def rows_per_shard(*, batch_size: int, shard_index: int, shard_count: int) -> int:
    """Rows of the global batch that one process builds.

    Args:
        batch_size: rows of the global batch.
        shard_index: this process.
        shard_count: number of processes.

    Raises:
        UserError: the batch does not divide among the processes, or the process is not one of them.
    """
    if not 0 <= shard_index < shard_count:
        raise UserError(f"shard_index {shard_index} is not below shard_count {shard_count}")
    if batch_size < 1 or batch_size % shard_count:
        raise UserError(
            f"batch_size {batch_size} does not divide among {shard_count} processes; "
            f"use a positive multiple of {shard_count}"
        )
    return batch_size // shard_count


def stream_seed(seed: int, name: str) -> int:
    """A 31-bit seed for stream ``name``; neighbouring run seeds give unrelated ones.

    Grain counts upward from a seed (one per epoch or window), so that runs of seeds 0 and 1
    would otherwise share their orders, shifted by one epoch.

    Args:
        seed: the run's seed, at least 0.
        name: the stream, for example ``"documents"``.
    """
    words = np.random.SeedSequence([seed, *name.encode()]).generate_state(1)
    return int(words[0] >> 1)


def padding_row(*, length: int, pad_id: int) -> Batch:
    """A row of ``length`` positions in which nothing counts."""
    return {
        "tokens": np.full(length, pad_id, np.int32),
        "targets": np.full(length, pad_id, np.int32),
        "segments": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "weights": np.zeros(length, np.float32),
        "documents": np.full(length, -1, np.int32),
    }


def ahead(batches: grain.IterDataset[Batch]) -> grain.IterDataset[Batch]:
    """Builds batches ahead of their use, in a thread of its own."""
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD)


def _stack(rows: Sequence[Batch], *, count: int, padding: Batch | None) -> Batch:
    if padding is not None:
        rows = [*rows, *[padding] * (count - len(rows))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batched(
    rows: grain.IterDataset[Batch], *, count: int, padding: Batch | None = None
) -> grain.IterDataset[Batch]:
    """Stacks ``count`` rows at a time, ahead of their use.

    Args:
        rows: rows as ``[T]`` arrays by name.
        count: rows of a batch.
        padding: fills up the last batch of finite ``rows``; without it that batch is dropped.
    """
    stack = functools.partial(_stack, count=count, padding=padding)
    return ahead(rows.batch(count, drop_remainder=padding is None, batch_fn=stack))

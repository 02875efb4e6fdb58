"""The two data families: where documents come from, and how they become batches."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from tokenlab.core.arrays import Array, PRNGKeyArray
from tokenlab.core.context import View
from tokenlab.core.ledger import Ledger
from tokenlab.tokenizers.base import Tokenizer

# Arrays of one batch by name. Every source gives, for rows of T positions:
#   tokens    int32   [B, T]  inputs
#   targets   int32   [B, T]  targets[t] is predicted at position t: shifted here, once
#   segments  int32   [B, T]  1, 2, ... per document in a row, 0 for padding
#   positions int32   [B, T]  restart at 0 in each segment
#   weights   float32 [B, T]  0 where the target does not count, padding included
#   mixture   float32 [B, T, V]  of some tasks: shares of tokens read in place of one; 0 for none
#   documents int32   [B, T]  number of the source document, for error reports; -1 for padding
Batch = dict[str, np.ndarray]


class Document(NamedTuple):
    """One text and where it came from.

    Attributes:
        text: UTF-8 bytes, or any bytes.
        name: stable name for reports, such as a file name or a record key.
    """

    text: bytes
    name: str


class Corpus(abc.ABC):
    """Documents by index, split into training and held-out parts by a hash of their content."""

    @abc.abstractmethod
    def documents(self, split: str) -> Sequence[Document]:
        """Random access to the documents of ``split``: ``"train"`` or ``"held_out"``."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of the content; names cached tokenizers."""


class Source(abc.ABC):
    """Turns a corpus, a task or the current model into batches."""

    @abc.abstractmethod
    def batches(
        self,
        *,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> grain.IterDataset[Batch]:
        """An endless, deterministic data set of this process's rows of each batch.

        Args:
            tokenizer: encodes the documents.
            batch_size: rows of the global batch, divisible by ``shard_count``.
            seed: order of the documents; each epoch has its own order.
            shard_index: this process.
            shard_count: number of processes; shards never overlap within an epoch.
        """

    @property
    @abc.abstractmethod
    def tokens_per_row(self) -> int:
        """Positions of a row (T), padding included."""

    @property
    @abc.abstractmethod
    def corpora(self) -> tuple[Corpus, ...]:
        """The corpora it reads; a tokenizer is fitted on their training documents."""

    @abc.abstractmethod
    def tokens_per_epoch(self, *, tokenizer: Tokenizer) -> int:
        """Positions of one pass over the documents, padding included.

        Raises:
            UserError: there is no such thing, as for endless tasks.
        """


class OnPolicy(Source):
    """A source whose rows the policy takes part in writing, at every step anew."""

    @abc.abstractmethod
    def rolled(
        self, batch: Mapping[str, Array], *, policy: View, key: PRNGKeyArray
    ) -> tuple[dict[str, Array], Ledger]:
        """What becomes of a batch; runs within the training step, before any gradient.

        Args:
            batch: arrays of ``batches``, on the devices; as many rows come out for each row.
            policy: the model with the parameters that the step begins with.
            key: of what is drawn.

        Returns:
            The batch that the objective sees, and what the passes of the policy cost.
        """


def first_rows(source: Source, *, tokenizer: Tokenizer, batch_size: int, seed: int) -> Batch:
    """The first batch of a source, without the numbers of documents, as models are given it.

    Args:
        source: where rows come from.
        tokenizer: encodes the documents.
        batch_size: rows.
        seed: order of the documents.
    """
    rows = next(iter(source.batches(tokenizer=tokenizer, batch_size=batch_size, seed=seed)))
    return {name: each for name, each in rows.items() if name != "documents"}

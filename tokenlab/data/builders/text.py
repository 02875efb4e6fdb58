"""Raw text and HTML to clean paragraphs."""

from __future__ import annotations

import html
import html.parser
import re
from typing import NamedTuple

_BLOCKS = re.compile(
    "address|article|blockquote|body|br|center|d[dlt]|div|h[1-6]|header|hr|html|[ou]l|li|p|pre|"
    "section|table|tbody|t[dhr]"
)
_UNSEEN = frozenset(("head", "script", "style"))
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\xad\ufeff\u200b]")


def one_line(text: str) -> str:
    """``text`` without entities or control characters, each run of white space one space."""
    unescaped = html.unescape(html.unescape(text))  # some sources escape twice
    return " ".join(_CONTROL.sub("", unescaped).split())


def unwrap(text: str) -> str:
    """Paragraphs (parted by blank lines) as one line each, with one blank line between them."""
    paragraphs = (one_line(part) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(filter(None, paragraphs))


class Block(NamedTuple):
    """A stretch of text between block-level tags.

    Attributes:
        tag: the block-level element it began in.
        article: ``data-number`` of the enclosing ``<article>``, or 0.
        text: on one line.
    """

    tag: str
    article: int
    text: str


def blocks(page: str) -> list[Block]:
    """The visible text of an HTML page, in order."""
    reader = _Blocks()
    reader.feed(page)
    reader.close()
    reader.flush()
    return reader.found


class _Blocks(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.found: list[Block] = []
        self._text: list[str] = []
        self._tag = "body"
        self._article = 0
        self._unseen = 0

    def flush(self):
        if text := one_line("".join(self._text)):
            self.found.append(Block(self._tag, self._article, text))
        self._text.clear()

    def handle_starttag(self, tag, attrs):
        self._unseen += tag in _UNSEEN
        if _BLOCKS.fullmatch(tag):
            self.flush()
            self._tag = tag
        if tag == "article":
            self._article = int(dict(attrs).get("data-number") or 0)

    def handle_endtag(self, tag):
        self._unseen -= tag in _UNSEEN
        if _BLOCKS.fullmatch(tag):
            self.flush()
            self._tag = "body"
        if tag == "article":
            self._article = 0

    def handle_data(self, data):
        if not self._unseen:
            self._text.append(data)

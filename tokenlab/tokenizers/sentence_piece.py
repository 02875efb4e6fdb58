"""Subword tokenizers by SentencePiece, lossless for every byte string."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import sentencepiece

from tokenlab.core.errors import UserError
from tokenlab.tokenizers.base import Tokenizer, TokenizerTrainer
from tokenlab.tokenizers.byte import join_pieces

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
# What SentencePiece cannot represent: its own space mark, and bytes that are not UTF-8, which
# Python's "surrogateescape" decoding turns into these surrogates.
_ESCAPED = re.compile(f"([\udc80-\udcff{_SPACE}]+)")
# Anything but the identity normalisation changes this text.
_PROBE = f"  A\u00a0\ufb01\u212b  {_SPACE} e\u0301 \n\t\n x\0 ".encode() + b"\xff "
# A constant, so that sums over threads round alike on every machine.
_THREADS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model that gives every byte string back.

    Runs of bytes that are not UTF-8, and the character U+2581, bypass the model as byte tokens.
    Every id stands for fixed bytes, so ``decode(a + b) == decode(a) + decode(b)``.

    Reference: Taku Kudo and John Richardson, "SentencePiece: A simple and language independent
    subword tokenizer and detokenizer for Neural Text Processing", 2018, arXiv 1808.06226.

    Differences from the paper: identity normalisation, no dummy prefix, byte fallback, and the
    bypass above.

    Attributes:
        model: the serialised model, the content of a ``.model`` file.
    """

    model: bytes = dataclasses.field(repr=False)

    def __post_init__(self):
        special = self._processor.pad_id(), self._processor.bos_id(), self._processor.eos_id()
        if special != (self.pad_id, self.bos_id, self.eos_id):
            raise UserError(
                f"the SentencePiece model has pad, bos, eos ids {special}, not (0, 1, 2); "
                "train it with SentencePieceTrainer"
            )
        if len(self._byte_ids) < 256 or self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(
                "the SentencePiece model does not give back what it encodes; "
                "train it with byte fallback and identity normalisation (SentencePieceTrainer)"
            )

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        try:
            if not self.model:
                raise RuntimeError("no bytes")
            return sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError:
            raise UserError(
                f"{len(self.model)} bytes are not a SentencePiece model; train it again"
            ) from None

    @functools.cached_property
    def _pieces(self) -> dict[int, bytes]:
        """Bytes of every id."""
        processor, pieces = self._processor, {}
        for i in range(len(processor)):
            piece = processor.id_to_piece(i)
            if processor.is_byte(i):
                pieces[i] = bytes.fromhex(piece[3:5])
            elif processor.is_control(i) or processor.is_unknown(i):
                pieces[i] = b""
            else:
                pieces[i] = piece.replace(_SPACE, " ").encode()
        return pieces

    @functools.cached_property
    def _byte_ids(self) -> dict[int, int]:
        """Id of every byte value."""
        return {self._pieces[i][0]: i for i in self._pieces if self._processor.is_byte(i)}

    def __getstate__(self) -> dict[str, bytes]:
        return {"model": self.model}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self._pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of ``text``; bytes that are not UTF-8 become byte tokens."""
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        plain, *rest = _ESCAPED.split(data.decode("utf-8", "surrogateescape"))
        ids = self._processor.encode(plain)
        for escaped, plain in zip(rest[::2], rest[1::2], strict=True):
            ids += [self._byte_ids[b] for b in escaped.encode("utf-8", "surrogateescape")]
            ids += self._processor.encode(plain)
        return ids

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of ``ids``; special ids decode to nothing."""
        return join_pieces(self._pieces, ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceTrainer(TokenizerTrainer):
    """Trains a lossless SentencePiece model; newline and tab are tokens, digits stand alone.

    Attributes:
        vocab_size: number of ids: 4 special, 256 bytes, newline, tab, and learnt pieces.
        kind: "unigram" (likelihood, prunes a large vocabulary) or "bpe" (merges pairs).
        max_bytes: train on a random sample of lines of about this many bytes.
        character_coverage: share of the corpus's characters that get their own id; the rest are
            written in bytes.
        seed: of the sample.
    """

    vocab_size: int = 4096
    kind: Literal["unigram", "bpe"] = "unigram"
    max_bytes: int = 10_000_000
    character_coverage: float = 0.9995
    seed: int = 0

    def fit(self, texts: Iterable[bytes]) -> SentencePieceTokenizer:
        """Trains on ``texts``; the same texts and recipe give the same tokenizer.

        Raises:
            UserError: ``texts`` hold no text, or the vocabulary does not suit them.
        """
        lines = _sample(_lines(texts), max_bytes=self.max_bytes, seed=self.seed)
        if not lines:
            raise UserError("the tokenizer's corpus has no text; name a corpus that has")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type=self.kind,
                vocab_size=self.vocab_size,
                character_coverage=self.character_coverage,
                required_chars="0123456789",
                user_defined_symbols=["\n", "\t"],
                pad_id=Tokenizer.pad_id,
                bos_id=Tokenizer.bos_id,
                eos_id=Tokenizer.eos_id,
                unk_id=3,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                max_sentence_length=max(map(len, lines)) * 4,  # in bytes; longer ones are dropped
                num_threads=_THREADS,
                minloglevel=3,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(self._explain(str(error))) from None
        return SentencePieceTokenizer(model=model.getvalue())

    def _explain(self, message: str) -> str:
        if limit := re.search(r"too high.*<= (\d+)", message):
            return (
                f"vocab_size={self.vocab_size} is more than this corpus supports; "
                f"take at most {limit[1]} or a larger corpus"
            )
        if need := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            return (
                f"vocab_size={self.vocab_size} has no room for bytes and characters; take more "
                f"than {need[1]}, or lower character_coverage={self.character_coverage}"
            )
        return f"SentencePiece cannot train {self}: {message}"


def _lines(texts: Iterable[bytes]) -> Iterator[str]:
    """Lines, newlines kept, without what never reaches the model or stops its trainer."""
    for text in texts:
        plain = text.decode("utf-8", "ignore").replace(_SPACE, "").replace("\0", "")
        yield from plain.splitlines(keepends=True)


def _sample(lines: Iterable[str], *, max_bytes: int, seed: int) -> list[str]:
    """A uniform sample of whole lines, in order, in memory of its own size.

    Each line draws a random key; the lines of smallest keys that reach ``max_bytes`` are kept.
    """
    draw = random.Random(seed).random
    kept: list[tuple[float, int, str, int]] = []  # a heap: the largest key first
    total = 0
    for number, line in enumerate(lines):
        size = len(line.encode())
        heapq.heappush(kept, (-draw(), number, line, size))
        total += size
        while total - kept[0][3] >= max_bytes:
            total -= heapq.heappop(kept)[3]
    return [line for _, _, line, _ in sorted(kept, key=lambda entry: entry[1])]

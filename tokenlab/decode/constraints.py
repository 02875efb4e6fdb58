"""Conditions on the text that is written, whatever tokens spell it."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab.core.errors import UserError
from tokenlab.decode.processors import History, Processor, RowLogits
from tokenlab.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint(abc.ABC):
    """The constraint family: what text may be written; becomes a processor with a tokenizer.

    Only what is written counts, not the prompt.
    """

    @abc.abstractmethod
    def bind(self, tokenizer: Tokenizer) -> Processor:
        """The processor that rules out tokens by their bytes.

        Raises:
            UserError: no text can satisfy the constraint.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class BannedStrings(Constraint):
    """Rules out every token that would complete one of some strings.

    An Aho-Corasick automaton over bytes follows what is written, so that no spelling gets by:
    neither a string over several tokens nor one inside a longer token.

    Attributes:
        texts: the strings, none of them empty.
    """

    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.texts or "" in self.texts:
            raise UserError("a banned string is empty; name at least one, none of them empty")

    def bind(self, tokenizer: Tokenizer) -> Processor:
        """Follows the automaton by whole tokens."""
        return _Banned(texts=self.texts, vocabulary=_Vocabulary(tokenizer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForcedText(Constraint):
    """What is written begins with this text; after it, anything.

    A token may go beyond the end of the text.

    Attributes:
        text: the text, not empty.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text:
            raise UserError("a forced text is empty; leave it out to force nothing")

    def bind(self, tokenizer: Tokenizer) -> Processor:
        """Leaves the tokens that spell what comes next."""
        return _Forced(text=self.text, vocabulary=_Vocabulary(tokenizer))


class _Vocabulary:
    """The bytes of every token; equal for tokenizers that encode alike."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.fingerprint = tokenizer, tokenizer.fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Vocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """By token id; empty where a token stands for no bytes."""
        return [self.tokenizer.decode([i]) for i in range(self.tokenizer.vocab_size)]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Bytes of each token."""
        return np.asarray([len(piece) for piece in self.pieces], np.int32)

    @functools.cached_property
    def bytes(self) -> np.ndarray:
        """``[V, longest]``, zeros behind a piece."""
        table = np.zeros((len(self.pieces), max(1, int(self.lengths.max()))), np.uint8)
        for row, piece in zip(table, self.pieces, strict=True):
            row[: len(piece)] = np.frombuffer(piece, np.uint8)
        return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Banned(Processor):
    texts: tuple[str, ...]
    vocabulary: Any

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        following, hits = _by_tokens(self.texts, self.vocabulary)
        # What the automaton remembers is shorter than the longest string: so many tokens suffice.
        reach = max(len(text.encode()) for text in self.texts)
        first = history.lengths[:, None] - reach + jnp.arange(reach)[None, :]
        recent = history.last(reach)
        inside = (first >= history.prompts[:, None]) & (recent < following.shape[1])
        recent = jnp.where(inside, recent, 0)
        table = jnp.asarray(following)

        def step(place: jax.Array, column: Any) -> tuple[jax.Array, None]:
            token, counts = column
            return jnp.where(counts, table[place, token], place), None

        start = jnp.zeros(len(logits), jnp.int32)
        place, _ = jax.lax.scan(step, start, (recent.T, inside.T))
        hit = _for_all(jnp.asarray(hits)[place], logits)
        return jnp.where(hit, -jnp.inf, logits), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Forced(Processor):
    text: str
    vocabulary: Any

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        lengths = jnp.asarray(self.vocabulary.lengths)
        known = history.written() & (history.tokens < len(lengths))
        at = jnp.where(known, history.tokens, 0)
        done = jnp.sum(jnp.where(known, lengths[at], 0), axis=1)
        fits = jnp.asarray(_fitting(self.text, self.vocabulary))
        fits = fits[jnp.minimum(done, len(fits) - 1)]
        return jnp.where(_for_all(fits, logits), logits, -jnp.inf), state


def _for_all(known: jax.Array, logits: jax.Array) -> jax.Array:
    """``[B, V]`` over the tokenizer's tokens, as one over the model's, whose others are false."""
    return jnp.pad(known, ((0, 0), (0, logits.shape[-1] - known.shape[-1])))


@functools.lru_cache(maxsize=16)
def _by_tokens(texts: tuple[str, ...], vocabulary: _Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Where each token leads from each state, ``[S, V]``, and whether it completes a string."""
    by_byte, accepting = _automaton([text.encode() for text in texts])
    states, tokens = len(by_byte), len(vocabulary.pieces)
    place = np.broadcast_to(np.arange(states, dtype=np.int32)[:, None], (states, tokens)).copy()
    hit = np.zeros((states, tokens), bool)
    for column, byte in enumerate(vocabulary.bytes.T):
        inside = vocabulary.lengths > column
        place[:, inside] = by_byte[place[:, inside], byte[inside]]
        hit[:, inside] |= accepting[place[:, inside]]
    return place, hit


def _automaton(patterns: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Aho-Corasick: ``next[state, byte]``, and which states end a pattern."""
    prefixes = sorted(
        {p[:i] for p in patterns for i in range(len(p) + 1)}, key=lambda p: (len(p), p)
    )
    number = {prefix: i for i, prefix in enumerate(prefixes)}

    def longest(text: bytes) -> int:
        return next(number[text[i:]] for i in range(len(text) + 1) if text[i:] in number)

    following = [[longest(prefix + bytes([b])) for b in range(256)] for prefix in prefixes]
    accepting = [any(prefix.endswith(p) for p in patterns) for prefix in prefixes]
    return np.asarray(following, np.int32), np.asarray(accepting)


@functools.lru_cache(maxsize=16)
def _fitting(text: str, vocabulary: _Vocabulary) -> np.ndarray:
    """Which tokens may come after so many bytes of the text, ``[bytes + 1, V]``."""
    data = text.encode()
    fits = np.zeros((len(data) + 1, len(vocabulary.pieces)), bool)
    for done in range(len(data)):
        rest = data[done:]
        fits[done] = [
            bool(piece) and (rest.startswith(piece) or piece.startswith(rest))
            for piece in vocabulary.pieces
        ]
        if not fits[done].any():
            raise UserError(
                f"no token of the tokenizer begins {rest.decode(errors='replace')!r}; "
                "the text cannot be forced"
            )
    fits[-1] = True
    return fits

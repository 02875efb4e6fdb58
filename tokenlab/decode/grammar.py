"""Text of a grammar, by the library llguidance."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab.core.arrays import Array
from tokenlab.core.errors import UserError
from tokenlab.decode.constraints import Constraint
from tokenlab.decode.processors import History, Processor, RowLogits
from tokenlab.tokenizers.base import Tokenizer

# Positions of unfinished texts that are kept; each is where some row may go on.
_KEPT = 1024
# What must come next may be spelled by any tokens, not only as a tokenizer would.
_ALL_SPELLINGS = '%llguidance {"no_forcing": true}\n'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar(Constraint):
    """What is written is a text of a grammar, and ends where such a text may end.

    Every step asks the host which tokens may follow.

    Attributes:
        text: the grammar.
        kind: a regular expression, a grammar of Lark's syntax, or a JSON schema.
    """

    text: str
    kind: Literal["regex", "lark", "json_schema"] = "regex"

    def bind(self, tokenizer: Tokenizer) -> Processor:
        """Compiles the grammar.

        Raises:
            UserError: llguidance is not installed, or does not understand the grammar.
        """
        start = {
            "regex": "start: /" + re.sub(r"(?<!\\)/", r"\/", self.text) + "/",
            "lark": self.text,
            "json_schema": f"start: %json {self.text}",
        }[self.kind]
        return _Grammatical(grammar=self, automaton=_Automaton(_ALL_SPELLINGS + start, tokenizer))


class _Pieces:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [i for i, piece in enumerate(pieces) if not piece]
        self.tokens = [piece or f"<|{i}|>".encode() for i, piece in enumerate(pieces)]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text)


class _Automaton:
    """Which tokens may follow a row of tokens; equal for equal grammars and tokenizers."""

    def __init__(self, grammar: str, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            raise UserError("grammars need llguidance; pip install llguidance") from None
        self._key = (grammar, tokenizer.fingerprint)
        wrapper = llguidance.TokenizerWrapper(_Pieces(tokenizer))
        tokens = llguidance.LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size)
        self._start = llguidance.LLMatcher(tokens, grammar)
        if self._start.is_error():
            first = self._start.get_error().strip().splitlines()[0]
            raise UserError(f"the grammar is not understood: {first}")
        self._matchers: collections.OrderedDict[tuple[int, ...], Any] = collections.OrderedDict()
        self._words = -(-tokenizer.vocab_size // 32)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Automaton) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def words(self) -> int:
        """32-bit words of a mask."""
        return self._words

    def masks(self, tokens: Array, lengths: Array, prompts: Array) -> np.ndarray:
        """Bits of the tokens that may follow what each row has written."""
        rows = zip(np.asarray(tokens), np.asarray(lengths), np.asarray(prompts), strict=True)
        return np.stack([self._mask(tuple(row[start:end].tolist())) for row, end, start in rows])

    def _mask(self, written: tuple[int, ...]) -> np.ndarray:
        matcher = self._matcher(written)
        if matcher is None:
            return np.zeros(self._words, np.uint32)
        return np.frombuffer(matcher.compute_bitmask(), np.uint32)[: self._words]

    def _matcher(self, written: tuple[int, ...]) -> Any:
        """The matcher after ``written``; None if no text of the grammar begins so."""
        if written not in self._matchers:
            known = written[:-1] in self._matchers
            before = self._matchers[written[:-1]] if known else self._start
            matcher = None if before is None else before.deep_copy()
            rest = list(written[-1:] if known else written)
            if matcher is not None and rest and not matcher.consume_tokens(rest):
                matcher = None
            self._matchers[written] = matcher
            if len(self._matchers) > _KEPT:
                self._matchers.popitem(last=False)
        return self._matchers[written]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Grammatical(Processor):
    grammar: Grammar
    automaton: Any

    def __call__(
        self, logits: RowLogits, state: PyTree, *, history: History
    ) -> tuple[RowLogits, PyTree]:
        shape = jax.ShapeDtypeStruct((len(logits), self.automaton.words), jnp.uint32)
        masks = jax.pure_callback(self.automaton.masks, shape, *history, vmap_method="sequential")
        token = jnp.arange(logits.shape[-1])
        inside = token < 32 * self.automaton.words
        word = masks[:, jnp.where(inside, token // 32, 0)]
        may = ((word >> (token % 32).astype(jnp.uint32)[None]) & 1).astype(bool) & inside[None]
        return jnp.where(may, logits, -jnp.inf), state

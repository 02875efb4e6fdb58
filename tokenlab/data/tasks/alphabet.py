"""The tokenizer of a task: a fixed list of symbols."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence

from tokenlab.core.errors import UserError
from tokenlab.tokenizers.base import Tokenizer, TokenizerTrainer

FIRST_SYMBOL = 3  # pad, bos, eos come before the symbols


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlphabetTokenizer(Tokenizer, TokenizerTrainer):
    """Symbol ``i`` is id ``i + 3``; text that is not made of the symbols has no ids.

    It gives back every text over its symbols, not every byte string, and is its own trainer. None
    of the symbols may be the beginning of another one.

    Attributes:
        symbols: how each symbol is written.
    """

    symbols: tuple[str, ...]

    def fit(self, texts: Iterable[bytes]) -> AlphabetTokenizer:
        """Itself; nothing is learned."""
        return self

    def __post_init__(self):
        for first, second in zip(sorted(self.symbols), sorted(self.symbols)[1:], strict=False):
            if second.startswith(first):
                raise UserError(f"symbol {second!r} begins with symbol {first!r}; rename one")

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.symbols, FIRST_SYMBOL)}

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(symbol) for symbol in self.symbols))

    @property
    def vocab_size(self) -> int:
        """Symbols and the three special ids."""
        return FIRST_SYMBOL + len(self.symbols)

    @property
    def fingerprint(self) -> str:
        """Equal for equal symbols."""
        return hashlib.sha256(json.dumps(self.symbols).encode()).hexdigest()

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of the symbols in ``text``.

        Raises:
            UserError: part of the text is no symbol.
        """
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        found = self._pattern.findall(text)
        if sum(map(len, found)) != len(text):
            raise UserError(f"{text[:40]!r} is not made of the {len(self.symbols)} task symbols")
        return [self._ids[symbol] for symbol in found]

    def decode(self, ids: Sequence[int]) -> bytes:
        """The symbols written out; special ids are left out.

        Raises:
            UserError: an id is outside the vocabulary.
        """
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return "".join(self.symbols[i - FIRST_SYMBOL] for i in ids if i >= FIRST_SYMBOL).encode()

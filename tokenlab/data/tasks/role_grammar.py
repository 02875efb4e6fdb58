"""Which of two words is the noun: told by where they stand, and by which words they are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tokenlab.core.arrays import Bool, Int
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL, AlphabetTokenizer
from tokenlab.data.tasks.base import UNDEFINED, Problem, Seed, Task, TaskBatch, require

NOUN, ADJECTIVE = 0, 1
LENGTH, QUERY, ANSWER = 7, 3, 4
# The evaluation sets, by what differs from the task that is trained.
SETS: dict[str, dict[str, Any]] = {
    "val": {},
    "switch": {"switched": True},
    "head": {"drawn": "head"},
    "head_switch": {"drawn": "head", "switched": True},
    "tail": {"drawn": "tail"},
    "tail_switch": {"drawn": "tail", "switched": True},
    "holdout": {"drawn": "unseen"},
}
Words = Literal["all", "head", "tail", "unseen"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoleGrammar(Task):
    """``IS adj noun`` or ``noun IS adj``, one of the words again, then three masked tokens.

    After an adjective come ``adj adj adj``, after a noun ``adj noun noun``. A model that reads
    both ways fills in the masks. The roles are known from where the words stand (in context), and,
    of trained words, from the words themselves (in weights): ``switched`` rows set the two at odds.

    Ambiguity: one word of every 1 / ambiguity by frequency is marked in each class, at random. A
    marked word that is drawn is replaced half of the time by its fellow, the marked word of the
    other class in the same bin of frequencies.

    Difficulty of an answer is the rank of the rarer word, 0 for the most frequent; unseen words
    come after all others. ``problems`` draw words uniformly, and their prompt ends with the first
    mask.

    Reference: Anand, Lepori, Merullo, Pavlick, "Dual Process Learning: Controlling Use of
    In-Context vs. In-Weights Strategies with Weight Forgetting", 2024, arXiv:2406.00053.

    Differences from the paper: which marked word replaces one, and the shares of head and tail per
    class, are ours.

    Attributes:
        words: trained words, half of them nouns, half adjectives, from frequent to rare.
        zipf: exponent a of the frequencies ``rank^-a`` in each class; 0 is uniform.
        ambiguity: share of marked words.
        drawn: which words a row has: all trained ones, the 20 most frequent of each class, the
            rarest tenth of each, or words that are never trained.
        switched: whether nouns stand for adjectives, and adjectives for nouns.
        marks: seed of the marks.
    """

    words: int = 1000
    zipf: float = 0.0
    ambiguity: float = 0.0
    drawn: Words = "all"
    switched: bool = False
    marks: int = 0

    def __post_init__(self):
        require(
            self.words >= 20 and self.words % 2 == 0,
            f"RoleGrammar.words is {self.words}; use an even number from 20",
        )
        require(self.zipf >= 0, f"RoleGrammar.zipf is {self.zipf}; use 0 or more")
        require(
            0 <= self.ambiguity <= 1,
            f"RoleGrammar.ambiguity is {self.ambiguity}; use 0 to 1",
        )

    @property
    def unseen(self) -> int:
        """Words that are never trained: a tenth as many more."""
        return self.words // 10

    @property
    def _class_size(self) -> int:
        return self.words // 2

    @property
    def is_symbol(self) -> int:
        """The symbol between or before the words; the mask is the next one."""
        return self.words + self.unseen

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Nouns, adjectives, unseen words, IS, MASK."""
        nouns = (f"n{i} " for i in range(self._class_size))
        adjectives = (f"a{i} " for i in range(self._class_size))
        unseen = (f"u{i} " for i in range(self.unseen))
        return AlphabetTokenizer(symbols=(*nouns, *adjectives, *unseen, "IS ", "MASK "))

    @property
    def length(self) -> int:
        """Positions of a row: seven."""
        return LENGTH

    def unseen_ids(self) -> tuple[int, ...]:
        """Token ids of the words that are never trained."""
        return tuple(range(FIRST_SYMBOL + self.words, FIRST_SYMBOL + self.words + self.unseen))

    def class_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the nouns and of the adjectives."""
        first, size = FIRST_SYMBOL, self._class_size
        return tuple(range(first, first + size)), tuple(range(first + size, first + 2 * size))

    def evaluation(self, name: str) -> RoleGrammar:
        """The task whose rows are the evaluation set ``name``.

        Raises:
            UserError: there is no such set.
        """
        require(name in SETS, f"RoleGrammar has no set {name!r}; it has {', '.join(SETS)}")
        return dataclasses.replace(self, **SETS[name])

    def marked(self) -> Bool[np.ndarray, "2 W"]:
        """Which nouns and which adjectives are marked: one at random of each bin."""
        return _marked(self._class_size, self.ambiguity, self.marks)

    def _roles(
        self, *, seed: Seed, count: int, uniform: bool
    ) -> tuple[Int[np.ndarray, "B 2"], Int[np.ndarray, " B"], np.random.Generator]:
        """Symbols of the word that stands as noun and as adjective, and the rarer one's rank."""
        rng = np.random.default_rng(seed)
        if self.drawn == "unseen":
            rank = rng.integers(self.unseen, size=(count, 2))
            return self.words + rank, self._class_size + rank.max(axis=1), rng
        ranks = np.arange(self._class_size)
        if self.drawn == "head":
            ranks = ranks[:20]
        elif self.drawn == "tail":
            ranks = ranks[-max(1, self._class_size // 10) :]
        chance = (ranks + 1.0) ** -(0.0 if uniform else self.zipf)
        rank = rng.choice(ranks, p=chance / chance.sum(), size=(count, 2))
        word = rank + np.array([0, self._class_size])
        if self.switched:
            word = word[:, ::-1]
        coin = rng.random((count, 2)) < 0.5
        return self._replaced(word, coin), rank.max(axis=1), rng

    def _replaced(
        self, word: Int[np.ndarray, "B 2"], coin: Bool[np.ndarray, "B 2"]
    ) -> Int[np.ndarray, "B 2"]:
        """Marked words for their fellows, where the coin says so."""
        marked = self.marked()
        nouns, adjectives = (np.flatnonzero(row) for row in marked)
        fellow = np.arange(self.words)
        fellow[nouns], fellow[self._class_size + adjectives] = (
            self._class_size + adjectives,
            nouns,
        )
        return np.where(coin, fellow[word], word)

    def _symbols(
        self, *, seed: Seed, count: int, uniform: bool = False
    ) -> tuple[Int[np.ndarray, "B 7"], Int[np.ndarray, " B"]]:
        """Whole rows, answers written, and the rarer word's rank."""
        roles, rank, rng = self._roles(seed=seed, count=count, uniform=uniform)
        noun, adjective = roles[:, NOUN], roles[:, ADJECTIVE]
        is_ = np.full(count, self.is_symbol)
        form = rng.integers(2, size=(2, count)).astype(bool)
        context = np.where(
            form[0], np.stack([is_, adjective, noun]), np.stack([noun, is_, adjective])
        )
        query = np.where(form[1], adjective, noun)
        rows = np.stack([*context, query, adjective, query, query], axis=1)
        return rows, rank

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of seven tokens, the last three masked; their targets are at their own positions."""
        rows, rank = self._symbols(seed=seed, count=count)
        return self._batch(rows, rank)

    def _batch(self, rows: Int[np.ndarray, "B 7"], rank: Int[np.ndarray, " B"]) -> TaskBatch:
        masked = np.arange(LENGTH) >= ANSWER
        shape = rows.shape
        ids = (rows + FIRST_SYMBOL).astype(np.int32)
        return TaskBatch(
            tokens=np.where(masked, np.int32(self.is_symbol + 1 + FIRST_SYMBOL), ids),
            targets=ids,
            segments=np.ones(shape, np.int32),
            positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
            weights=np.broadcast_to(masked.astype(np.float32), shape),
            difficulty=np.where(masked, rank[:, None], UNDEFINED).astype(np.int32),
        )

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """Words drawn uniformly; the prompt ends with the first mask."""
        rows, rank = self._symbols(seed=seed, count=count, uniform=True)
        batch = self._batch(rows, rank)
        return [
            Problem(prompt=tokens[: ANSWER + 1], answer=answer[ANSWER:], difficulty=difficulty)
            for tokens, answer, difficulty in zip(
                batch.tokens.tolist(), batch.targets.tolist(), rank.tolist(), strict=True
            )
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Reads the roles off the place of IS."""
        first = prompt[0] == self.is_symbol + FIRST_SYMBOL
        noun, adjective = (prompt[2], prompt[1]) if first else (prompt[0], prompt[2])
        word = prompt[QUERY]
        answer = [adjective] * 3 if word == adjective else [adjective, noun, noun]
        return list(completion[:3]) == answer


@functools.cache
def _marked(size: int, share: float, seed: int) -> Bool[np.ndarray, "2 W"]:
    marked = np.zeros((2, size), bool)
    if share > 0:
        rng = np.random.default_rng(seed)
        bins = np.array_split(np.arange(size), max(1, round(share * size)))
        for one_class in marked:
            one_class[[rng.choice(each) for each in bins]] = True
    return marked

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from tokenlab.core.arrays import Int, Weights
from tokenlab.core.context import Context
from tokenlab.data import TaskSource
from tokenlab.data.tasks import AlphabetTokenizer, Problem, Task, TaskBatch
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL
from tokenlab.data.tasks.base import UNDEFINED, Seed, task_batch
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term, TokenWeights
from tokenlab.train.optimizer import Muon, WarmupStableDecay


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedFacts(Task):
    """Facts in a text that has nothing to do with them, and questions behind it.

    A word of the text is followed by one of four. A fact is one symbol for a key and its value; a
    question is a key, and its value follows. Words and values count; when facts come and what is
    asked nobody can know. Difficulty is the distance from a token back to what says its target.

    Attributes:
        size: positions of a row.
        facts: facts of a row, of distinct keys; all are asked.
        keys: number of keys.
        values: number of values.
        words: number of words of the text.
        span: what positions are counted up to, by skipping some at three places (Zhu et al.,
            "PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise Training",
            2023, arXiv:2309.10400); None skips none.
    """

    size: int = 1024
    facts: int = 6
    keys: int = 16
    values: int = 8
    words: int = 32
    span: int | None = None

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Values, keys, words, facts."""
        facts = (f"f{k}-{v} " for k in range(self.keys) for v in range(self.values))
        counts = {"v": self.values, "k": self.keys, "w": self.words}
        plain = (f"{kind}{i} " for kind, count in counts.items() for i in range(count))
        return AlphabetTokenizer(symbols=(*plain, *facts))

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.size

    def _draw(
        self, *, seed: Seed, count: int
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        rng, rows = np.random.default_rng(seed), np.arange(count)[:, None]
        body = self.size - 2 * self.facts
        keys = np.argsort(rng.random((count, self.keys)), axis=1)[:, : self.facts]
        values = rng.integers(self.values, size=keys.shape)
        told = np.argsort(rng.random((count, body)), axis=1)[:, : self.facts]
        symbols = np.full((count, self.size), -1)
        symbols[:, body::2], symbols[:, body + 1 :: 2] = keys + self.values, values
        first = self.values + self.keys + self.words
        symbols[rows, told] = first + keys * self.values + values
        difficulty = np.full_like(symbols, UNDEFINED)
        difficulty[:, body::2] = np.arange(body, self.size, 2)[None] - told
        table = np.tile(np.arange(self.words), (self.words, 1))
        follows = np.random.default_rng(0).permuted(table, axis=1)[:, :4]
        word, said = rng.integers(self.words, size=count), np.zeros(count, int)
        for t in range(body):
            free = symbols[:, t] < 0
            word = np.where(free, follows[word, rng.integers(4, size=count)], word)
            symbols[:, t] = np.where(free, word + self.values + self.keys, symbols[:, t])
            if t:
                difficulty[:, t - 1] = np.where(free, t - 1 - said, UNDEFINED)
            said = np.where(free, t, said)
        return symbols, difficulty

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of a text, its facts and the questions."""
        symbols, difficulty = self._draw(seed=seed, count=count)
        rows = task_batch(symbols=symbols, difficulty=difficulty, segment_length=self.size)
        if self.span is None:
            return rows
        rng = np.random.default_rng((1, seed) if isinstance(seed, int) else (1, *seed))
        skips = rng.integers((self.span - self.size) // 3 + 1, size=(count, 3, 1))
        behind = rng.integers(1, self.size, size=(count, 3, 1)) <= np.arange(self.size)
        skipped = np.sum(skips * behind, axis=1).astype(np.int32)
        return rows._replace(positions=rows.positions + skipped)

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """The text and one question each."""
        symbols, difficulty = self._draw(seed=seed, count=count)
        cut = self.size - 2 * self.facts + 1
        return [
            Problem(prompt=ids[:cut], answer=ids[cut : cut + 1], difficulty=distance)
            for ids, distance in zip(
                (symbols + FIRST_SYMBOL).tolist(), difficulty[:, cut - 1].tolist(), strict=True
            )
        ]

    def check(self, *, prompt: Sequence[int], completion: Sequence[int]) -> bool:
        """Searches the prompt for the fact of its last key."""
        first = FIRST_SYMBOL + self.values + self.keys + self.words
        key = prompt[-1] - FIRST_SYMBOL - self.values
        facts = (id - first for id in prompt if (id - first) // self.values == key)
        return list(completion[:1]) == [FIRST_SYMBOL + next(facts) % self.values]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(TokenWeights):
    """Values that are asked for.

    Attributes:
        task: whose values.
    """

    task: PlantedFacts

    def __call__(self, context: Context) -> Weights:
        """One at those."""
        value = context.batch["targets"] - FIRST_SYMBOL
        return ((value >= 0) & (value < self.task.values)).astype(jnp.float32)


SHORT = PlantedFacts(size=64, facts=10, span=1024)
LONG = PlantedFacts()
OBJECTIVE = Objective(
    terms={
        "next_token": Term(loss=NextToken()),
        "facts": Term(loss=NextToken(), tokens=Asked(task=LONG)),
    }
)


def config() -> Experiment:
    """The base: facts of short texts."""
    return Experiment(
        name="lemo",
        tokenizer=SHORT.tokenizer,
        data=TaskSource(task=SHORT),
        batch_size=32,
        model=llama(
            vocab_size=SHORT.tokenizer.vocab_size, dim=128, num_layers=4, num_heads=4,
            num_kv_heads=4, hidden_dim=256, max_length=1024,
        ),
        objective=OBJECTIVE,
        optimizer=Muon(learning_rate=WarmupStableDecay(peak=1e-2), weight_decay=0.01),
        steps=1500,
    )  # fmt: skip

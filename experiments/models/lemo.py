import dataclasses

import jax.numpy as jnp
import numpy as np

from tokenlab.core.arrays import Int, Weights
from tokenlab.core.context import Context
from tokenlab.data import TaskSource
from tokenlab.data.tasks import AlphabetTokenizer, AssociativeRecall, Problem
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL
from tokenlab.data.tasks.base import Seed
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term, TokenWeights
from tokenlab.train.optimizer import Muon, WarmupStableDecay


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlantedFacts(AssociativeRecall):
    """Pairs (key, value) in a text that has nothing to do with them, and some keys again behind it.

    A word of the text is followed by one of four. Words and values that are asked for count;
    keys, and values where they are told, nobody can know. Difficulty is the distance from a token
    back to the one that says what follows it.

    Attributes:
        size: positions of a row.
        words: number of words of the text.
        span: what positions are counted up to, by skipping some at three places (Zhu et al.,
            "PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise Training",
            2023, arXiv:2309.10400); None skips none.
    """

    size: int = 1024
    words: int = 32
    span: int | None = None

    @property
    def tokenizer(self) -> AlphabetTokenizer:
        """Keys, values, words."""
        words = (f"w{i} " for i in range(self.words))
        return AlphabetTokenizer(symbols=(*super().tokenizer.symbols, *words))

    @property
    def length(self) -> int:
        """Positions of a row."""
        return self.size

    def _draw(
        self, *, seed: Seed, count: int
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
        rng = np.random.default_rng(seed)
        parts = (self.keys, self.values, self.pairs, self.queries)
        names = ("keys", "values", "pairs", "queries")
        plain = AssociativeRecall(**dict(zip(names, parts, strict=True)))
        pairs = plain.sample(seed=int(rng.integers(2**31)), count=count).tokens - FIRST_SYMBOL
        body = self.size - 2 * self.queries
        starts = np.argsort(rng.random((count, body // 2)), axis=1)[:, : self.pairs]
        starts = 2 * np.sort(starts, axis=1)
        symbols = np.full((count, self.size), -1)
        rows, told = np.arange(count)[:, None], 2 * self.pairs
        symbols[:, body:] = pairs[:, told:]
        for place in (0, 1):
            symbols[rows, starts + place] = pairs[:, place:told:2]
        follows = np.random.default_rng(0).permuted(
            np.tile(np.arange(self.words), (self.words, 1)), axis=1
        )
        word, said = rng.integers(self.words, size=count), np.zeros(count, int)
        difficulty = np.full_like(symbols, -1)
        for t in range(body):
            free = symbols[:, t] < 0
            word = np.where(free, follows[word, rng.integers(4, size=count)], word)
            symbols[:, t] = np.where(free, word + self.keys + self.values, symbols[:, t])
            if t:
                difficulty[:, t - 1] = np.where(free, t - 1 - said, -1)
            said = np.where(free, t, said)
        keys = symbols[:, body::2]
        where = starts[rows, np.argmax(pairs[:, None, :told:2] == keys[:, :, None], axis=2)]
        difficulty[:, body::2] = np.arange(body, self.size, 2)[None] - where
        return symbols, difficulty

    def sample(self, *, seed: Seed, count: int) -> TaskBatch:
        """Rows of a text, its facts and the questions."""
        rows = super().sample(seed=seed, count=count)
        if self.span is None:
            return rows
        rng = np.random.default_rng((1, seed) if isinstance(seed, int) else (1, *seed))
        skips = rng.integers((self.span - self.size) // 3 + 1, size=(count, 3, 1))
        behind = rng.integers(1, self.size, size=(count, 3, 1)) <= np.arange(self.size)
        skipped = np.sum(skips * behind, axis=1).astype(np.int32)
        return rows._replace(positions=rows.positions + skipped)

    def problems(self, *, seed: Seed, count: int) -> list[Problem]:
        """The text and one queried key each."""
        symbols, difficulty = self._draw(seed=seed, count=count)
        cut = self.size - 2 * self.queries + 1
        return [
            Problem(prompt=ids[:cut], answer=ids[cut : cut + 1], difficulty=distance)
            for ids, distance in zip(
                (symbols + FIRST_SYMBOL).tolist(), difficulty[:, cut - 1].tolist(), strict=True
            )
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(TokenWeights):
    """Values that are asked for.

    Attributes:
        task: whose values.
    """

    task: PlantedFacts

    def __call__(self, context: Context) -> Weights:
        """One at those."""
        symbols = context.batch["targets"] - FIRST_SYMBOL - self.task.keys
        return ((symbols >= 0) & (symbols < self.task.values)).astype(jnp.float32)


SHORT = PlantedFacts(size=96, pairs=16, queries=16, keys=32, values=16, span=1024)
LONG = PlantedFacts(size=1024, pairs=6, queries=6, keys=32, values=16)
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

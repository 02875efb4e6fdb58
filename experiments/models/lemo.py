"""LeMo: adapters of a small decoder tuned on long texts, half of the tokens left out in two layers.

The base reads texts of 64 tokens: words of which each is followed by one of four, ten facts, and
questions after them. Its adapters of rank 8 are then tuned on texts of 1024 tokens with six facts,
two rows a step. In the second and third of four layers half of the blocks of 64 tokens are kept, as
predictors say that were fitted to the frozen base before, or by chance; backward passes of
feed-forward layers see a fifth of the columns. Each arm is read as it was tuned, and as the plain
model with the tuned adapters, which is what one would use.

Paper:    Wang et al., "LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning", 2025,
          arXiv:2501.09767 (published as JENGA)
Command:  python -m tokenlab study experiments/models/lemo.py
Hardware: two CPU cores
Expected: TODO
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab import config as configs
from tokenlab.core.arrays import Array, Int, Weights
from tokenlab.core.context import Context, View
from tokenlab.data import TaskSource
from tokenlab.data.tasks import AlphabetTokenizer, Problem, Task, TaskBatch
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL
from tokenlab.data.tasks.base import UNDEFINED, Seed, task_batch
from tokenlab.experiment import Experiment
from tokenlab.models import (
    ADAPTERS,
    KeptShare,
    LowRank,
    PredictedScores,
    RandomScores,
    Transformer,
    lemo,
    llama,
    taken_over,
    with_adapter,
)
from tokenlab.models.adapters import drawn
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term, TokenWeights
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.study.trained import trained
from tokenlab.train.optimizer import AdamW, Muon, WarmupStableDecay
from tokenlab.train.run import Run

Arm = Literal["LoRA", "LeMo", "tokens only", "random"]


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
SOURCE = TaskSource(task=LONG)
OBJECTIVE = Objective(
    terms={
        "next_token": Term(loss=NextToken()),
        "facts": Term(loss=NextToken(), tokens=Asked(task=LONG)),
    }
)
FIT = Objective(terms={"predictor": AuxiliaryTerm(name="predictor")})
ADAPTER = LowRank(rank=8, targets=("q", "k", "v", "out"))
LAYERS = (1, 2)  # the second and third of four
PREDICTED = PredictedScores(hidden=64)
HALF = KeptShare(share=0.5)
ROWS, FIT_STEPS, STEPS, HELD_OUT = 2, 60, 60, 32


def config() -> Experiment:
    """The base, which reads short texts, with positions of long ones."""
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
        steps=500,
    )  # fmt: skip


def fitting() -> Experiment:
    """The first stage: predictors on long texts; nothing else moves, and nothing is dropped."""
    whole = lemo(
        config().model, layers=LAYERS, kept=KeptShare(share=1.0), informativeness=PREDICTED
    )
    changes = {
        "data": SOURCE,
        "batch_size": ROWS,
        "model": whole,
        "objective": FIT,
        "optimizer": AdamW(
            learning_rate=WarmupStableDecay(peak=3e-3), trained=("*/informativeness/*",)
        ),
        "steps": FIT_STEPS,
    }
    return configs.replace(config(), changes)


def tuning(model: Transformer) -> Experiment:
    """The second stage: adapters of attention, on long texts."""
    changes = {
        "data": SOURCE,
        "batch_size": ROWS,
        "model": model,
        "optimizer": AdamW(learning_rate=WarmupStableDecay(peak=3e-3), trained=ADAPTERS),
        "steps": STEPS,
    }
    return configs.replace(config(), changes)


@functools.cache
def base() -> View:
    """The base, trained."""
    return trained(config())[0]


@functools.cache
def run_of(stage: Literal["fit"] | Arm) -> Run:
    """A stage with everything resolved; one program for all seeds."""
    experiment = fitting() if stage == "fit" else tuning(arms()[stage])
    return Run.of(experiment, tokenizer=SHORT.tokenizer)


@functools.cache
def arms() -> dict[Arm, Transformer]:
    """The models that are tuned."""
    plain = with_adapter(config().model, ADAPTER)
    drop = functools.partial(lemo, plain, layers=LAYERS, kept=HALF)
    return {
        "LoRA": plain,
        "LeMo": drop(informativeness=PREDICTED, pruned=0.8),
        "tokens only": drop(informativeness=PREDICTED),
        "random": drop(informativeness=RandomScores(), pruned=0.8),
    }


@functools.cache
def temporary(arm: Arm) -> int:
    """Bytes that the compiled step needs beside its arguments and results."""
    compiled = run_of(arm).trainer.lower(batch_size=ROWS, length=LONG.size).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def trained_on(run: Run, params: PyTree, *, seed: int) -> tuple[PyTree, float]:
    """Parameters after a stage on the texts of ``seed``, and the bytes that a step saves."""
    state, saved = run.trainer.init(params), 0.0
    batches = iter(SOURCE.batches(tokenizer=SHORT.tokenizer, batch_size=ROWS, seed=seed))
    for batch in itertools.islice(batches, run.total_steps):
        state, metrics = run.trainer.step(state, run.trainer.put(batch))
        saved = metrics.ledger.saved_bytes
    return state.params, float(saved)


@functools.cache
def fitted(seed: int) -> PyTree:
    """The base with predictors that were fitted to it."""
    run = run_of("fit")
    first = drawn(run.experiment.model, jax.random.key(seed))
    return trained_on(run, taken_over(first, base().params), seed=seed)[0]


@functools.partial(jax.jit, static_argnums=0)
def read(model: Transformer, params: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Sums over a batch: nats, right answers, and kept tokens that the true scores would keep."""
    view = View(model=model, params=params)
    context = Context(batch=batch, views={"policy": view}, key=jax.random.key(0))
    output = context.output()
    best = jnp.argmax(view(output.hidden, method="logits"), axis=-1)
    asked = Asked(task=LONG)(context) * batch["weights"]
    figures = output.trace.figures
    kept, informative = (figures.get(name, jnp.zeros(())) for name in ("kept", "informative"))
    return {
        "loss": jnp.sum(-context.token_logp() * batch["weights"]) / jnp.sum(batch["weights"]),
        "facts": jnp.sum((best == batch["targets"]) * asked) / jnp.sum(asked),
        "recall": jnp.sum(kept * informative) / jnp.maximum(jnp.sum(informative), 1),
    }


def held_out(model: Transformer, params: PyTree) -> dict[str, float]:
    """Means over texts that nobody trained on."""
    source = dataclasses.replace(SOURCE, split="held_out")
    batches = iter(source.batches(tokenizer=SHORT.tokenizer, batch_size=4, seed=0))
    found = [
        jax.device_get(read(model, params, {k: v for k, v in batch.items() if k != "documents"}))
        for batch in itertools.islice(batches, HELD_OUT // 4)
    ]
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned(Trial):
    """The base after its adapters were tuned on long texts.

    Attributes:
        arm: which of ``arms``.
    """

    arm: Arm

    def measure(self, *, seed: int) -> Measured:
        """Of the plain model with the tuned adapters, and of the one that was tuned, as it ran."""
        run = run_of(self.arm)
        model = run.experiment.model
        params = fitted(seed) if self.arm in ("LeMo", "tokens only") else base().params
        params = taken_over(drawn(model, jax.random.key(seed)), params)
        params, saved = trained_on(run, params, seed=seed)
        plain, ours = held_out(arms()["LoRA"], params), held_out(model, params)
        figures = {
            "held_out/loss": plain["loss"],
            "held_out/facts": plain["facts"],
            "as_tuned/loss": ours["loss"],
            "as_tuned/facts": ours["facts"],
            "predictor/recall": ours["recall"],
            "memory/share": temporary(self.arm) / temporary("LoRA"),
            "memory/temporary_mb": temporary(self.arm) / 1e6,
            "memory/saved_mb": saved / 1e6,
        }
        return Measured(figures=figures, costs={"tuned_tokens": STEPS * ROWS * LONG.size})


def study() -> Study:
    """Half of the tokens in two layers, chosen and by chance, beside all of them."""
    ours = functools.partial(Claim, arm="LeMo")
    return Study(
        name="lemo",
        question="Can adapters be tuned on the tokens that matter, in less memory?",
        arms={arm: Tuned(arm=arm) for arm in arms()},
        matched="tuned_tokens",
        claims=(
            ours(than="LoRA", metric="held_out/loss", margin=-0.03, relative=True),
            ours(than="random", metric="as_tuned/loss"),
            ours(than="random", metric="as_tuned/facts", better="higher", margin=0.1),
            Bound(arm="LeMo", metric="memory/share", limit=0.85, side="below"),
            Bound(arm="LeMo", metric="predictor/recall", limit=0.85),
        ),
    )

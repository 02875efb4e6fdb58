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
Hardware: two CPU cores, busy: 20 minutes, three of them for the base.
Expected: memory and loss as claimed. A step needs 0.70 of the temporary memory of LoRA (0.90 where
          backward passes are whole, so tokens alone do not save 15 %) and leaves half of the bytes
          for its backward pass, at the same held-out loss (1.3955 and 1.3956 nats); 0.67 of the
          answers are right against 0.71, within 0.05 each. That some tokens matter more is not seen
          in this model: scores of blocks differ by 3 %, with a fact in them or not, predictors find
          half of the best half (0.52 after 1,200 rows, 0.48 after 120), and chance does as well.
          Only this setting has all arms, so it is no verdict.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab import config as configs
from tokenlab.core.arrays import Array
from tokenlab.core.context import Context, View
from tokenlab.core.parameters import taken_over
from tokenlab.data import TaskSource
from tokenlab.data.tasks import PlantedFacts
from tokenlab.data.tasks.alphabet import FIRST_SYMBOL
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
    with_adapter,
)
from tokenlab.models.adapters import drawn
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, TargetRange, Term
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.study.trained import trained
from tokenlab.train.optimizer import AdamW, Muon, WarmupStableDecay
from tokenlab.train.run import Run

Arm = Literal["LoRA", "LeMo", "tokens only", "random"]


SHORT = PlantedFacts(size=64, facts=10, text=True, span=1024)
LONG = PlantedFacts(text=True)
ASKED = TargetRange(first=FIRST_SYMBOL, last=FIRST_SYMBOL + LONG.values)
SOURCE = TaskSource(task=LONG)
OBJECTIVE = Objective(
    terms={
        "next_token": Term(loss=NextToken()),
        "facts": Term(loss=NextToken(), tokens=ASKED),
    }
)
FIT = Objective(terms={"predictor": AuxiliaryTerm(name="predictor")})
ADAPTER = LowRank(rank=8, targets=("q", "k", "v", "out"))
LAYERS = (1, 2)  # the second and third of four
PREDICTED = PredictedScores(hidden=64)
HALF = KeptShare(share=0.5)
ROWS, STEPS, HELD_OUT = 2, 60, 32
FIT_ROWS, FIT_STEPS = 4, 300


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
        "batch_size": FIT_ROWS,
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
    batches = SOURCE.batches(
        tokenizer=SHORT.tokenizer, batch_size=run.experiment.batch_size, seed=seed
    )
    for after, metrics in run.steps(state, batches=batches):
        state, saved = after, metrics.ledger.saved_bytes
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
    asked = ASKED(context) * batch["weights"]
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

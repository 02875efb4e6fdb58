"""Quiet-STaR: a thought behind every token, reinforced where it makes what follows likelier.

Rows set names by short programs, ask for their values, and hold words that are written twice. A
small model is trained on them until copies are certain and values are not. Then it goes on in four
ways, with equal steps on equal rows: it thinks one token behind each token, between two marks, and
is reinforced; the same without reinforcement; with three pause tokens in the place of a thought; as
it is. Hard tokens are the fifth of those asked for that the first model found least likely.

Paper:    Zelikman, Harik, Shao, Jayasiri, Haber, Goodman, "Quiet-STaR: Language Models Can Teach
          Themselves to Think Before Speaking", 2024, arXiv:2403.09629
Command:  python -m tokenlab study experiments/latent/quiet_star.py
Hardware: two CPU cores, a quarter of an hour on a busy machine.
Expected: does not hold. Behind 1500 steps of 8 rows hard tokens cost 1.716 nats with thoughts,
          1.712 without reinforcement, 1.709 with pauses and 1.705 without a thought (reinforced
          thoughts are worse by 0.011, 0.005 to 0.017); at first 1.694, and no arm gains on that.
          Rewards are 0.0001 (-0.0010 to 0.0012), though 0.07 of the thought is mixed in. The first
          setting, 600 steps of 16 rows at half the rate: 1.677, 1.678, 1.674 and 1.672, no two of
          which differ; rewards of 0.0001 (-0.0008 to 0.0010), 0.04 of the thought. Three seeds
          each. On longer rows (55 tokens), 200 steps moved nothing either (one seed).
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from tokenlab import config as configs
from tokenlab.core.arrays import Array
from tokenlab.core.context import Context, View
from tokenlab.data import first_rows
from tokenlab.data.tasks import Programs, TaskSource
from tokenlab.experiment import Experiment
from tokenlab.models import ThinkingTransformer, Transformer, llama, thinking
from tokenlab.objectives import (
    AfterThought,
    BeforeThought,
    NextToken,
    Objective,
    Term,
    ThoughtPolicy,
    thought_rewards,
)
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.study.trained import continued, trained
from tokenlab.train.optimizer import AdamW, Cosine
from tokenlab.train.run import Run

Arm = Literal["reinforced", "not reinforced", "pauses", "no thought"]

TASK = Programs(statements=3, names=4, queries=1, letters=2)
SOURCE = TaskSource(task=TASK)
BASE_STEPS, STEPS, ROWS, HELD_OUT = 1500, 1500, 8, 512
HARD = 0.2  # share of tokens
COLON = TASK.tokenizer.encode(": ")[0]  # as which both marks begin


def config(seed: int = 0) -> Experiment:
    """The model that starts."""
    return Experiment(
        name="quiet_star",
        tokenizer=TASK.tokenizer,
        data=SOURCE,
        batch_size=64,
        model=llama(
            vocab_size=TASK.tokenizer.vocab_size, dim=64, num_layers=2, num_heads=4,
            num_kv_heads=4, hidden_dim=128, max_length=TASK.length + 8,
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=AdamW(learning_rate=Cosine(peak=3e-3)),
        steps=BASE_STEPS,
        log_every=100,
        seed=seed,
    )  # fmt: skip


def objective(arm: Arm) -> Objective:
    """What goes on being trained."""
    if arm == "no thought":
        return config().objective
    terms = {
        "before": Term(loss=BeforeThought(), coefficient=0.5),
        "after": Term(loss=AfterThought(), coefficient=0.5),
    }
    if arm == "reinforced":
        terms["thoughts"] = Term(loss=ThoughtPolicy())
    return Objective(terms=terms)


def begun(arm: Arm, seed: int) -> tuple[Transformer, PyTree]:
    """The model of an arm and its first parameters, which compute what the first model does."""
    model, params = config(seed).model, trained(config(seed))[0].params
    if arm == "no thought":
        return model, jax.tree.map(jnp.copy, params)
    kind = "pauses" if arm == "pauses" else "drawn"
    samples = 1 if arm == "pauses" else 2
    return thinking(model, params, like=COLON, key=jax.random.key(seed), kind=kind, samples=samples)


@functools.cache
def run_of(arm: Arm) -> Run:
    """The second stage of an arm; one program for all seeds."""
    changes = {
        "model": begun(arm, 0)[0], "objective": objective(arm), "batch_size": ROWS, "steps": STEPS,
        "optimizer": AdamW(learning_rate=Cosine(peak=1e-3), weight_decay=1e-3),
    }  # fmt: skip
    return Run.of(configs.replace(config(), changes), tokenizer=TASK.tokenizer)


@functools.partial(jax.jit, static_argnums=0)
def read(model: Transformer, params: PyTree, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Nats of targets; of a model that thinks also the share and the reward of thoughts."""
    views = {"policy": View(model=model, params=params)}
    found = {"nats": -Context(batch=batch, views=views).token_logp()}
    if isinstance(model, ThinkingTransformer):
        context = Context(batch=batch, views=views, key=jax.random.key(1))
        found["before"] = context.thought_nats()[0]
        found["share"] = jnp.abs(context.thoughts().share[:, 0]).mean(axis=0)
        found["reward"] = thought_rewards(context).mean(axis=0)
    return found


def held_out() -> dict[str, Array]:
    """Rows that nobody trained on."""
    source = dataclasses.replace(SOURCE, split="held_out")
    batch = first_rows(source, tokenizer=TASK.tokenizer, batch_size=HELD_OUT, seed=0)
    return {name: jnp.asarray(x) for name, x in batch.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoneOn(Trial):
    """The model of an arm after the second stage.

    Attributes:
        arm: how it goes on.
    """

    arm: Arm

    def measure(self, *, seed: int) -> Measured:
        """Nats of hard and of other tokens, and what they were before the stage."""
        batch = held_out()
        asked = np.asarray(batch["weights"]) > 0
        base = trained(config(seed))[0]
        first = np.asarray(read(base.model, base.params, batch)["nats"])
        hard = asked & (first >= np.quantile(first[asked], 1 - HARD))
        model, params = begun(self.arm, seed)
        run = run_of(self.arm)
        rows = SOURCE.batches(tokenizer=TASK.tokenizer, batch_size=ROWS, seed=seed + 1)
        params = continued(run, params, itertools.islice(rows, STEPS))
        found: dict[str, Any] = jax.device_get(read(model, params, batch))
        figures = {
            "hard/nats": found["nats"][hard].mean(),
            "other/nats": found["nats"][asked & ~hard].mean(),
            "hard/nats_at_first": first[hard].mean(),
            "other/nats_at_first": first[asked & ~hard].mean(),
        }
        if "share" in found:
            figures |= {
                "hard/nats_before_thought": found["before"][hard].mean(),
                "thought/share": found["share"][asked].mean(),
                "thought/reward": found["reward"][asked].mean(),
            }
        figures = {name: float(x) for name, x in figures.items()}
        return Measured(figures=figures, costs={"tokens": STEPS * ROWS * TASK.length})


def study() -> Study:
    """Equal rows; operations differ, for thoughts are what is asked about."""
    ours = functools.partial(Claim, arm="reinforced")
    return Study(
        name="quiet_star",
        question="Does a model that thinks behind every token predict hard tokens better?",
        arms={
            arm: GoneOn(arm=arm) for arm in ("reinforced", "not reinforced", "pauses", "no thought")
        },
        matched="tokens",
        claims=(
            Bound(arm="reinforced", metric="thought/reward", limit=0.0),
            Bound(arm="reinforced", metric="thought/share", limit=0.05),
            ours(than="no thought", metric="hard/nats"),
            ours(than="pauses", metric="hard/nats"),
            ours(than="not reinforced", metric="hard/nats"),
            ours(than="no thought", metric="other/nats", margin=-0.02),
        ),
    )

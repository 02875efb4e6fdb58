"""TokenFormer: a model that is given more learned tokens goes on from where it was.

A small model of bytes of English prose is trained, grown to twice its learned tokens and trained
for a quarter of the steps again. Beside it stand the model that was not grown, trained for as
many steps more, and a model of the grown size that starts anew and has these steps alone. All
three start the quarter with a new optimiser.

Paper:    Wang, Fan, Naeem, Xian, Lenssen, Wang, Tombari, Schiele, "TokenFormer: Rethinking
          Transformer Scaling with Tokenized Model Parameters", 2024, arXiv:2410.23168.
Command:  python -m tokenlab data fetch english_prose
          python -m tokenlab study experiments/models/token_former.py
Hardware: two CPU cores, 20 minutes on a busy machine.
Expected: growing changes nothing (less than 1e-5 nats), and a quarter of the steps brings a new
          model of the grown size nowhere near (2.19 nats per byte against 1.93; lower by 0.264,
          0.229 to 0.299). That growing is better than going on with the small model is not visible:
          the grown one is lower at each of three seeds (0.014, 0.004, 0.015), but the mean of
          0.011 has the 95 % interval -0.004 to 0.026, for 2400 steps of a model of 8 tokens for
          each projection and 32 for each feed-forward. The first setting, 400 steps of one of 64
          and 256 at a constant rate, had 2.340 grown, 2.341 small and 2.995 new: lower by 0.001
          (-0.044 to 0.046) than the small one.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax

from tokenlab import config as configs
from tokenlab.data import PackedText, TfdsCorpus
from tokenlab.evals import HeldOutText
from tokenlab.experiment import Experiment
from tokenlab.models import token_former
from tokenlab.models.token_former import grown
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.tokenizers import ByteTokenizer
from tokenlab.train.optimizer import AdamW, WarmupStableDecay
from tokenlab.train.run import Run

CORPUS = TfdsCorpus(name="english_prose")
STEPS, ROWS, LENGTH = 2400, 16, 64


def config() -> Experiment:
    """Four layers with 8 learned tokens for each projection, and 32 for each feed-forward."""
    return Experiment(
        name="token_former",
        tokenizer=ByteTokenizer(),
        data=PackedText(corpus=CORPUS, length=LENGTH),
        batch_size=ROWS,
        model=token_former(
            vocab_size=264, dim=128, num_layers=4, num_heads=4, tokens=8, hidden_tokens=32
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=AdamW(learning_rate=WarmupStableDecay(peak=2e-3, warmup=20)),
        steps=STEPS,
        evals={
            "held_out": HeldOutText(
                corpus=CORPUS, length=LENGTH, stride=LENGTH // 2, max_documents=1
            )
        },
    )


def advanced(run: Run, state, first: int, last: int):
    """The parameters after the steps of these batches of the run."""
    for after, _ in run.steps(state, first=first, last=last):
        state = after
    return state.params


def nats(run: Run, params) -> float:
    """Held-out nats per byte."""
    found = run.experiment.evals["held_out"](
        model=run.experiment.model, params=params, tokenizer=run.tokenizer
    )
    return math.log(found["perplexity"])


@functools.cache
def base(seed: int, steps: int):
    """The run of the small model, its parameters, and what they cost."""
    run = Run.of(configs.replace(config(), {"seed": seed, "steps": steps}))
    params = advanced(run, run.trainer.init(), 0, steps)
    return run, params, nats(run, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continued(Trial):
    """A quarter of the steps more.

    Attributes:
        start: the grown model, the small one, or a new one of the grown size.
        steps: of the small model before.
    """

    start: Literal["grown", "small", "new"]
    steps: int = STEPS

    def measure(self, *, seed: int) -> Measured:
        """Held-out nats per byte before and after the quarter, and the change by growing."""
        run, params, before = base(seed, self.steps)
        figures, more = {"text/nats_before": before}, self.steps // 4
        # Steps give their parameters up, and the next arm needs these.
        model, params = run.experiment.model, jax.tree.map(lambda leaf: leaf.copy(), params)
        if self.start != "small":
            model, params = grown(model, params, key=jax.random.key(seed))
        run = Run.of(configs.replace(run.experiment, {"model": model, "steps": more}))
        if self.start == "grown":
            figures["text/jump"] = abs(nats(run, params) - before)
        state = run.trainer.init(None if self.start == "new" else params)
        params = advanced(run, state, self.steps, self.steps + more)
        figures["text/nats"] = nats(run, params)
        return Measured(figures=figures, costs={"tokens": more * ROWS * LENGTH})


def study() -> Study:
    """Grown, not grown, and from nothing."""
    return Study(
        name="token_former",
        question="Is a model that was given more learned tokens better after a few more steps?",
        arms={start: Continued(start=start) for start in ("grown", "small", "new")},
        matched="tokens",
        claims=(
            Bound(arm="grown", metric="text/jump", limit=1e-5, side="below"),
            Claim(arm="grown", than="small", metric="text/nats"),
            Claim(arm="grown", than="new", metric="text/nats"),
        ),
    )

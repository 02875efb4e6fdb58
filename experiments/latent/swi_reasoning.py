"""SwiReasoning: thoughts in mixtures while a small model is unsure, in tokens while it is sure.

The model is trained to think: of a question in words it writes the operand and the value of each
step, each opened by one of four words of the same meaning, and is at times cut short before its
thoughts are complete. How often it may turn to tokens bounds how long it thinks; at that length it
is compared with plain sampled thoughts that end where the tokens do. Beside it there is a model
that is unsure of what comes next, for it may check a step or go on.

Paper:    Shi, Asi, Li, Yuan, Pan, Lee, Xiao, "SwiReasoning: Switch-Thinking in Latent and Explicit
          for Pareto-Superior Reasoning LLMs", 2025, arXiv:2510.05069
Command:  python -m tokenlab study experiments/latent/swi_reasoning.py
Hardware: two CPU cores, half an hour on a busy machine, most of it training six models.
Expected: does not hold. A quarter of the steps are mixtures, and a higher cap is longer (5.0, 10.6,
          11.9 and 11.9 tokens at 1, 2, 4 and none). In 5 tokens 0.12 of the answers are right, a
          guess, where plain thoughts have no answer yet; in 11 tokens 0.31, where 0.64 of the plain
          ones have ended by themselves and are right: a close in the midst of a step costs more
          than it saves. Without a cap 0.93 against 0.95 of plain thoughts, which three seeds do not
          tell from a loss of 0.03. With the paper's signals at the switches 0.60: to this model a
          close that is mixed in is a close. Where it is unsure of what comes next, mixtures have
          0.20 right and tokens 0.67; models of that task differ by seed (0.37 to 0.99).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np

from tokenlab import config as configs
from tokenlab.core.context import View
from tokenlab.data.tasks import Problem, TaskSource, WordArithmetic
from tokenlab.decode import (
    Autoregressive,
    Feed,
    Generation,
    Greedy,
    SwitchCap,
    SwitchingFeed,
    SwitchSignals,
    TokenFeed,
    usual_sampler,
)
from tokenlab.evals import TaskAccuracy
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.study.trained import trained
from tokenlab.train.optimizer import AdamW, Cosine

# What the model is unsure of: how a step is worded, or whether it is checked once more.
WORDING = WordArithmetic(openings=4, cut=0.25)
CHECKING = WordArithmetic(checks=0.5, cut=0.25)
PROBLEMS = 512
CAPS = (1, 2, 4)


def config(task: WordArithmetic = WORDING) -> Experiment:
    """The model that thinks."""
    return Experiment(
        name="swi_reasoning",
        tokenizer=task.tokenizer,
        data=TaskSource(task=task),
        batch_size=64,
        model=llama(
            vocab_size=task.tokenizer.vocab_size, dim=64, num_layers=3, num_heads=4,
            num_kv_heads=4, hidden_dim=128, max_length=128,
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=AdamW(learning_rate=Cosine(peak=3e-3)),
        steps=1600,
        evals={
            "greedy": TaskAccuracy(
                task=task, room=longest(task), decoder=Autoregressive(sampler=Greedy())
            )
        },
        log_every=200,
    )  # fmt: skip


def longest(task: WordArithmetic) -> int:
    """Tokens of the longest thoughts with their answer and the end."""
    return task.length - 2 * task.clauses - 2


@functools.cache
def thinker(task: WordArithmetic, seed: int) -> View:
    """A model for each task and seed, trained once."""
    return trained(configs.replace(config(task), {"seed": seed}))[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thinking(Trial):
    """How a feed answers, and what it writes for that.

    Attributes:
        feed: what is read of a drawn token.
        task: what the model was trained on.
        problems: how many.
    """

    feed: Feed
    task: WordArithmetic = WORDING
    problems: int = PROBLEMS

    def questions(self, seed: int) -> list[Problem]:
        """Problems of a seed, which training does not draw from."""
        return self.task.problems(seed=(1, seed), count=self.problems)

    def write(
        self, prompts: Sequence[Sequence[int]], *, seed: int, tokens: int | None = None
    ) -> Generation:
        """What the model of a seed writes, drawn as in the paper."""
        decoder = Autoregressive(
            max_new_tokens=tokens or longest(self.task),
            sampler=usual_sampler(temperature=0.6, top_p=0.95, top_k=20),
            feed=self.feed,
        )
        return decoder(thinker(self.task, seed), prompts, key=jax.random.key(seed))

    def measure(self, *, seed: int) -> Measured:
        """Accuracy, tokens, and what the feed counted."""
        problems = self.questions(seed)
        written = self.write([problem.prompt for problem in problems], seed=seed)
        figures = judged(self.task, problems, completions(written)) | {
            "thinking/tokens": float(written.lengths.mean())
        }
        if isinstance(self.feed, SwitchingFeed):
            figures |= {
                "thinking/turns": float(written.statistics["switches"].mean()),
                "thinking/latent_share": float(
                    written.statistics["latent_steps"].sum() / written.lengths.sum()
                ),
            }
        return Measured(figures=figures, costs={"problems": float(self.problems)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutShort(Thinking):
    """Plain thoughts as long as those of ``feed``: the tokens end, or the thoughts are closed."""

    def measure(self, *, seed: int) -> Measured:
        """Accuracy either way, and the tokens."""
        problems = self.questions(seed)
        prompts = [problem.prompt for problem in problems]
        tokens = math.ceil(self.write(prompts, seed=seed).lengths.mean())
        plain = dataclasses.replace(self, feed=TokenFeed())
        short = completions(plain.write(prompts, seed=seed, tokens=tokens))
        # Closed in time for the answer and the end, where they are not closed by then.
        close = self.task.mark("</think>")
        begun = [one if close in one else [*one[: tokens - 3], close] for one in short]
        rest = completions(
            plain.write([p + one for p, one in zip(prompts, begun, strict=True)], seed=seed)
        )
        closed = [one + more for one, more in zip(begun, rest, strict=True)]
        figures = judged(self.task, problems, short) | {
            "thinking/tokens": float(tokens),
            "thinking/accuracy_closed": judged(self.task, problems, closed)["thinking/accuracy"],
        }
        return Measured(figures=figures, costs={"problems": float(self.problems)})


def completions(written: Generation) -> list[list[int]]:
    """The ids of each row."""
    return [
        row[:length].tolist() for row, length in zip(written.tokens, written.lengths, strict=True)
    ]


def judged(
    task: WordArithmetic, problems: Sequence[Problem], written: Sequence[list[int]]
) -> dict[str, float]:
    """The share of right answers; thoughts that have no end have none."""
    close = task.mark("</think>")
    right = [
        close in one and task.check(prompt=problem.prompt, completion=one)
        for problem, one in zip(problems, written, strict=True)
    ]
    return {"thinking/accuracy": float(np.mean(right))}


def switching(most: int | None, task: WordArithmetic = WORDING) -> SwitchingFeed:
    """The paper's feed at this size: a row may turn back after four steps; nothing is mixed in."""
    return SwitchingFeed(
        think=task.mark("<think>"),
        close=task.mark("</think>"),
        dwell=4,
        signals=None,
        cap=None if most is None else SwitchCap(most=most),
    )


def study() -> Study:
    """Plain thoughts, switching ones, and the latter under caps."""
    caps = {f"cap_{most}": Thinking(feed=switching(most)) for most in CAPS}
    free = switching(None)
    as_released = configs.replace(free, {"signals": SwitchSignals(horizon=longest(WORDING))})
    arms = {
        "tokens": Thinking(feed=TokenFeed()),
        **caps,
        "uncapped": Thinking(feed=free),
        **{f"short_{most}": CutShort(feed=switching(most)) for most in CAPS},
        "signals": Thinking(feed=as_released),
        "checking_tokens": Thinking(feed=TokenFeed(), task=CHECKING),
        "checking_uncapped": Thinking(feed=switching(None, CHECKING), task=CHECKING),
    }
    longer = tuple(
        # Not fewer tokens, to a hundredth of them.
        Claim(
            arm=more, than=fewer, metric="thinking/tokens", better="higher", margin=-0.01,
            relative=True,
        )
        for fewer, more in itertools.pairwise([*caps, "uncapped"])
    )  # fmt: skip
    accuracy = functools.partial(Claim, metric="thinking/accuracy", better="higher")
    return Study(
        name="swi_reasoning",
        question="Does switching between mixtures and tokens think shorter at equal accuracy?",
        arms=arms,
        matched="problems",
        claims=(
            Bound(arm="uncapped", metric="thinking/latent_share", limit=0.05),
            Bound(arm="uncapped", metric="thinking/latent_share", limit=0.95, side="below"),
            *longer,
            *(accuracy(arm=f"cap_{most}", than=f"short_{most}") for most in CAPS[:2]),
            accuracy(arm="uncapped", than="tokens", margin=-0.03),
            # Where it does not help: a close mixed in, and a choice of what comes next.
            accuracy(arm="uncapped", than="signals", margin=0.05),
            accuracy(arm="checking_tokens", than="checking_uncapped", margin=0.1),
        ),
    )

"""R-Capsule: a plan in two latent vectors, against no plan and a plan that is written.

A question in words has six clauses, four or more of which change a number; the plan is which
operations there are, in their order, and each has eight verbs. The model writes the steps and the
answer: at once, after it has written the plan, or after it has planned in two slots of 16 numbers
each, from which it is also trained to read the plan back.

Paper:    Shan, Song, Dai, Liang, Chen, "R-Capsule: Compressing High-Level Plans for Efficient Large
          Language Model Reasoning", 2025, arXiv:2509.22131
Command:  python -m tokenlab study experiments/latent/r_capsule.py
Hardware: two CPU cores, 40 minutes on a busy machine.
Expected: not visible here, though five claims of seven hold. Plans are read back from the capsule
          in 0.988 (0.938 to 1.039) of the questions, in 5.96 fewer visible tokens than a written
          one takes, with as many right answers (1.000; 0.999 written). But answers need no plan:
          without one all are right. With one number in a slot read-back falls to 0.10 and 0.982
          (0.903 to 1.060) of answers are right, not surely within 0.05. A linear probe finds 0.27,
          0.69 and 0.80 of the plans in capsules that are read back, 0.01 in others, and three
          seeds so far apart do not make a tenth more certain. The first setting, two to four
          operations by three verbs each, 1000 steps, eight numbers in a slot: three claims of
          seven; 1.0 right without a plan and with a capsule 1.0, 1.0 and 0.86, probes 0.54 to 0.92
          against 0.11 to 0.19. With 50 verbs for each operation, modulo 5, 1200 steps of 32 rows
          are too few: 0.18 to 0.22 without a plan or with a written one, 0.57, 0.24 and 0.20 with
          a capsule; with operands to 9, 1000 steps: 0.29 and 1.0 without a plan, 0.32 to 0.37
          with a capsule, two seeds. Capsules take twice the operations of training.
"""

import dataclasses
import functools
from typing import Any

from tokenlab import config as configs
from tokenlab.data.tasks import TaskSource, WordArithmetic
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.evals import PlanReadBack, TaskAccuracy
from tokenlab.experiment import Experiment
from tokenlab.models import Attention, Block, CapsuleTransformer, SwiGLU
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term
from tokenlab.study import Bound, Claim, Study
from tokenlab.train.optimizer import AdamW, Cosine

WIDTH, STEPS = 64, 1500
NO_PLAN = WordArithmetic(largest=3, clauses=6, least=4, wordings=8)
WRITTEN, APART = (dataclasses.replace(NO_PLAN, plan=plan) for plan in ("written", "apart"))


def config() -> Experiment:
    """A plan in the slots, and read back from them."""
    return Experiment(
        name="r_capsule",
        tokenizer=APART.tokenizer,
        data=TaskSource(task=APART),
        batch_size=64,
        model=CapsuleTransformer(
            vocab_size=APART.tokenizer.vocab_size,
            dim=WIDTH,
            num_layers=2,
            block=Block(
                mixer=Attention(num_heads=4, num_kv_heads=4),
                feedforward=SwiGLU(hidden_dim=2 * WIDTH),
            ),
            max_length=64,
            slot_id=APART.mark("<slot>"),
            slots=APART.slots,
            bottleneck=WIDTH // 4,
        ),
        objective=Objective(
            terms={"steps": Term(loss=NextToken()), "plan": AuxiliaryTerm(name="plan")}
        ),
        optimizer=AdamW(learning_rate=Cosine(peak=3e-3)),
        steps=STEPS,
        evals={
            "held_out": _accuracy(APART),
            "plan": PlanReadBack(
                data=TaskSource(task=APART, split="held_out"), entropy=APART.plan_entropy
            ),
        },
        log_every=250,
    )


def _accuracy(task: WordArithmetic) -> TaskAccuracy:
    return TaskAccuracy(
        task=task,
        problems=512,
        batch_size=256,
        room=3 * task.clauses + 4,
        decoder=Autoregressive(sampler=Greedy()),
    )


def changed(name: str, **changes: Any) -> Experiment:
    """The same but for some fields, whose dots are written as two underscores."""
    dotted = {field.replace("__", "."): value for field, value in changes.items()}
    return configs.replace(config(), {"name": f"r_capsule-{name}", **dotted})


def without_capsule(task: WordArithmetic) -> Experiment:
    """The plain model on rows that have no slots."""
    return changed(
        task.plan,
        data__task=task,
        model__slots=0,
        objective=Objective(terms={"steps": Term(loss=NextToken())}),
        evals={"held_out": _accuracy(task)},
    )


def study() -> Study:
    """Equal steps and rows; operations differ, for a plan is read, written or thought."""
    right = functools.partial(Claim, metric="held_out/accuracy", better="higher")
    return Study(
        name="r_capsule",
        question="Is a plan in two latent vectors as good as one that is written?",
        arms={
            "capsule": config(),
            "no_plan": without_capsule(NO_PLAN),
            "written": without_capsule(WRITTEN),
            "never_read": changed("never_read", objective__terms__plan__coefficient=0.0),
            "narrow": changed("narrow", model__bottleneck=1),
        },
        matched="passes",
        claims=(
            right(arm="capsule", than="no_plan", margin=-0.01),
            right(arm="capsule", than="written", margin=-0.02),
            # The names of five operations on average, and the mark behind them.
            Claim(arm="capsule", than="written", metric="held_out/tokens", margin=5.9),
            Bound(arm="capsule", metric="plan/exact", limit=0.9),
            Claim(
                arm="capsule", than="never_read", metric="plan/probe", better="higher", margin=0.1
            ),
            Claim(arm="capsule", than="narrow", metric="plan/exact", better="higher", margin=0.1),
            right(arm="narrow", than="no_plan", margin=-0.05),
        ),
    )

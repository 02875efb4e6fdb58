"""Addition with carry chains, a task whose difficulty is known at every token.

Paper:    Lee, Sreenivasan, Lee, Lee, Papailiopoulos, "Teaching Arithmetic to Small Transformers",
          2023, arXiv:2307.03381 (the task, digits of the sum reversed).
Command:  python -m tokenlab train experiments/data/addition.py
Hardware: two CPU cores, half a minute.
Expected: 256 of 256 problems right, at every carry chain, from step 500 on.
"""

from tokenlab.core.duration import Fraction
from tokenlab.data.tasks import Addition, TaskSource
from tokenlab.evals import TaskAccuracy
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import AdamW, Cosine

TASK = Addition(digits=3, sums=4, reversed=True)


def config() -> Experiment:
    """Two layers on sums of three digits."""
    return Experiment(
        name="addition",
        tokenizer=TASK.tokenizer,
        data=TaskSource(task=TASK),
        batch_size=64,
        model=llama(
            vocab_size=TASK.tokenizer.vocab_size,
            dim=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            hidden_dim=128,
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=AdamW(learning_rate=Cosine(peak=3e-3)),
        steps=1000,
        checkpoint=Checkpointing(every=500),
        evals={"accuracy": TaskAccuracy(task=TASK, every=Fraction(of_run=0.25))},
    )

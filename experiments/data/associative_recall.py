"""Recall of pairs from context, a task whose difficulty is known at every token.

Paper:    Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models",
          2023, arXiv:2312.04927 (the task).
Command:  python -m tokenlab train experiments/data/associative_recall.py
Hardware: two CPU cores, TIME.
Expected: EXPECT
"""

from tokenlab.core.duration import Fraction
from tokenlab.data.tasks import AssociativeRecall, TaskSource
from tokenlab.evals import TaskAccuracy
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import AdamW, Cosine

TASK = AssociativeRecall(keys=32, values=32, pairs=8, queries=8)


def config() -> Experiment:
    """Two layers, the least that attention needs for recall."""
    return Experiment(
        name="associative_recall",
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

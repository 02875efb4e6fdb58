"""x"""

import dataclasses
from tokenlab.data import TaskSource
from tokenlab.data.tasks import GridQuestions
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.train.optimizer import AdamW, WarmupStableDecay

TASK = GridQuestions()


def config() -> Experiment:
    return Experiment(
        name="linmu",
        tokenizer=TASK.tokenizer,
        data=TaskSource(task=TASK, prompts=True),
        batch_size=64,
        model=llama(
            vocab_size=TASK.tokenizer.vocab_size,
            dim=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            hidden_dim=128,
            max_length=TASK.length,
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=AdamW(learning_rate=WarmupStableDecay(peak=3e-3), weight_decay=0.01),
        steps=1000,
    )

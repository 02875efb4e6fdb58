"""An experiment small enough to train in seconds; tests load this file as a user would."""

from tokenlab.core.duration import Fraction
from tokenlab.data.corpora import TextFiles
from tokenlab.data.packing import PackedText
from tokenlab.evals import HeldOutText
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term, ZLoss
from tokenlab.tokenizers import ByteTokenizer
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import AdamW, Cosine


def config():
    corpus = TextFiles(pattern="corpus/*.txt", held_out=0.2)
    return Experiment(
        name="tiny",
        tokenizer=ByteTokenizer(),
        data=PackedText(corpus=corpus, length=32),
        batch_size=8,
        model=llama(
            vocab_size=264,
            dim=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            hidden_dim=24,
            max_length=64,
        ),
        objective=Objective(
            terms={
                "next_token": Term(loss=NextToken()),
                "z_loss": Term(loss=ZLoss(), coefficient=1e-3),
            }
        ),
        optimizer=AdamW(learning_rate=Cosine(peak=1e-2)),
        steps=24,
        checkpoint=Checkpointing(every=8, best_metric="held_out/bits_per_byte"),
        evals={
            "held_out": HeldOutText(corpus=corpus, length=32, stride=16, every=Fraction(of_run=0.5))
        },
        log_every=1,
    )

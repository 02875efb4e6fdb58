"""A small language model of English prose, from nothing, on a laptop.

Command:  python -m tokenlab train experiments/quickstart.py
Hardware: two CPU cores, about ten minutes.
"""

from tokenlab.core.duration import Fraction
from tokenlab.data import PackedText, TfdsCorpus
from tokenlab.decode import Samples
from tokenlab.evals import ByteNgram, Compressor, HeldOutText
from tokenlab.experiment import Experiment
from tokenlab.models import transformer_1m
from tokenlab.objectives import NextToken, Objective, Term, ZLoss
from tokenlab.tokenizers import SentencePieceTrainer
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import Muon, WarmupStableDecay


def config() -> Experiment:
    """The experiment."""
    corpus = TfdsCorpus(name="english_prose")
    return Experiment(
        name="quickstart",
        tokenizer=SentencePieceTrainer(vocab_size=4096),
        data=PackedText(corpus=corpus, length=256),
        batch_size=16,
        model=transformer_1m(vocab_size=4096),
        objective=Objective(
            terms={
                "next_token": Term(loss=NextToken()),
                "z_loss": Term(loss=ZLoss(), coefficient=1e-4),
            }
        ),
        optimizer=Muon(learning_rate=WarmupStableDecay(peak=3e-3)),
        steps=1000,
        checkpoint=Checkpointing(best_metric="held_out/bits_per_byte"),
        evals={
            "held_out": HeldOutText(
                corpus=corpus, length=256, stride=128, every=Fraction(of_run=0.25)
            ),
            "xz": Compressor(corpus=corpus),
            "byte_ngram": ByteNgram(corpus=corpus),
        },
        samples=Samples(prompts=("", "It is a truth universally acknowledged, that")),
    )

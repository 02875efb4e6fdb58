"""Mixture-of-Recursions on English prose, beside the plain Transformer at equal training FLOPs.

Paper:    Bae et al., "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive
          Token-Level Computation", 2025, arXiv:2507.10524.
Command:  python -m tokenlab data fetch english_prose
          python -m tokenlab train experiments/depth/mor.py
Hardware: two CPU cores, twelve minutes on a busy machine.
Expected: 1.63 held-out bits per byte, read causally; the plain Transformer has 1.69 after the same
          training FLOPs (one seed of each, so no claim yet).
"""

from tokenlab import config as configs
from tokenlab.core.duration import Fraction
from tokenlab.data import PackedText, TfdsCorpus
from tokenlab.decode import Samples
from tokenlab.depth import MixtureOfRecursions, Recursive, Sequential
from tokenlab.evals import HeldOutText
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term
from tokenlab.tokenizers import SentencePieceTrainer
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import Muon, WarmupStableDecay

CORPUS = TfdsCorpus(name="english_prose")
STEPS = 600
FULL_DEPTH = 19.31 / 15.31  # FLOPs of a step at full depth over one of the mixture, by the ledger


def config() -> Experiment:
    """Eight nominal layers: one of its own at each end, two between them that run up to thrice."""
    return Experiment(
        name="mor",
        tokenizer=SentencePieceTrainer(vocab_size=4096),
        data=PackedText(corpus=CORPUS, length=256),
        batch_size=16,
        model=llama(
            vocab_size=4096,
            dim=128,
            num_layers=8,
            num_heads=4,
            num_kv_heads=2,
            hidden_dim=384,
            depth=MixtureOfRecursions(recursions=3),
        ),
        objective=Objective(
            terms={
                "next_token": Term(loss=NextToken()),
                "membership": AuxiliaryTerm(name="membership", coefficient=1e-3),
            }
        ),
        optimizer=Muon(learning_rate=WarmupStableDecay(peak=3e-3)),
        steps=STEPS,
        checkpoint=Checkpointing(every=Fraction(of_run=0.5)),
        evals={"held_out": HeldOutText(corpus=CORPUS, length=256, stride=128)},
        samples=Samples(prompts=("", "It is a truth universally acknowledged, that")),
    )


def _without_router(depth: Sequential | Recursive) -> Experiment:
    """The same with another depth program, for as many steps as cost the same FLOPs."""
    changes = {"model.depth": depth, "steps": round(STEPS / FULL_DEPTH)}
    mixture = config()
    terms = {"next_token": mixture.objective.terms["next_token"]}
    return configs.replace(mixture, changes | {"objective": Objective(terms=terms)})


def plain() -> Experiment:
    """The plain Transformer of eight layers."""
    return _without_router(Sequential())


def recursive() -> Experiment:
    """The same shared layers at full depth for every token."""
    return _without_router(Recursive(recursions=3))

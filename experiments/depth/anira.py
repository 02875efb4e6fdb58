"""ANIRA: whether tokens that need more hops are given more recursions, without being told.

A pointer chase: queries of 1 to 3 hops along a permutation of 5 values; a layer, a core that runs
up to thrice, no layer behind it. All arms go through the whole loop in training.

Paper:    "Understanding Dynamic Compute Allocation in Recurrent Transformers", 2026,
          arXiv:2602.08864.
Command:  python -m tokenlab study experiments/depth/anira.py
Hardware: two CPU cores, half an hour on a busy machine.
Expected: does not hold at this size, the only one with three seeds. Tokens that predict no answer
          get 1.1 of 3 recursions and the others 1.4 (early) to 1.7 (online), but those of more
          hops no more of them; without a price all get 2.8. 1,200 steps do not suffice: 91 % right
          at fixed depth, 89 % online, 83 % early. ``soft`` reads the mixture, ``hard`` stops
          tokens as decoding does.
"""

from tokenlab import config as configs
from tokenlab.core.duration import Fraction
from tokenlab.data.tasks import PointerChase, TaskSource
from tokenlab.depth import EarlyHalting, FixedHalting, HaltingLoop, OnlineHalting
from tokenlab.evals import DepthAllocation
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term
from tokenlab.study import Bound, Claim, Study
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import AdamW, Cosine

TASK = PointerChase(values=5, queries=12, max_hops=3, bijective=True)
ACCURACY, ALIGNED, FILLER = 0.97, 0.8, 1.3


def config() -> Experiment:
    """The online rule."""
    return Experiment(
        name="anira",
        tokenizer=TASK.tokenizer,
        data=TaskSource(task=TASK),
        batch_size=32,
        model=llama(
            vocab_size=TASK.tokenizer.vocab_size,
            dim=64,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            hidden_dim=128,
            depth=HaltingLoop(halting=OnlineHalting(), recursions=3, coda=0, inject="none"),
        ),
        objective=Objective(
            terms={
                "next_token": Term(loss=NextToken()),
                "depth": AuxiliaryTerm(name="depth", coefficient=0.1),
            }
        ),
        optimizer=AdamW(learning_rate=Cosine(peak=3e-3)),
        steps=1200,
        checkpoint=Checkpointing(every=Fraction(of_run=1.0)),
        evals={
            "soft": DepthAllocation(task=TASK, twin=False),
            "hard": DepthAllocation(task=TASK),
        },
        log_every=100,
    )


def early() -> Experiment:
    """The early rule."""
    return configs.replace(config(), {"model.depth.halting": EarlyHalting()})


def fixed() -> Experiment:
    """Every token at the last depth."""
    return configs.replace(config(), {"model.depth.halting": FixedHalting()})


def unpriced() -> Experiment:
    """The online rule where depth costs nothing."""
    return configs.replace(config(), {"objective.terms.depth.coefficient": 0.0})


def study() -> Study:
    """All arms at equal work in training."""
    claims: list[Bound | Claim] = []
    for arm in ("online", "early"):
        claims += [
            Bound(arm=arm, metric="soft/accuracy", limit=ACCURACY),
            Bound(arm=arm, metric="soft/spearman", limit=ALIGNED),
            Bound(arm=arm, metric="soft/filler_depth", limit=FILLER, side="below"),
            Claim(arm=arm, than="fixed", metric="soft/accuracy", better="higher", margin=-0.03),
        ]
    return Study(
        name="anira",
        question="Does the depth that tokens are given follow the hops that they need?",
        arms={"online": config(), "early": early(), "fixed": fixed(), "unpriced": unpriced()},
        matched="block_tokens",
        claims=tuple(claims),
    )

"""ANIRA: whether tokens that need more hops are given more recursions, without being told.

A pointer chase: queries of 1 to 3 hops along a permutation of 5 values; a layer, a core that runs
up to thrice, no layer behind it. All arms go through the whole loop in training. Then topological
orders of graphs of 4 to 6 nodes: does depth that is decided early follow what is seen at once, and
depth that is decided on the way what the search finds?

Paper:    "Understanding Dynamic Compute Allocation in Recurrent Transformers", 2026,
          arXiv:2602.08864.
Command:  python -m tokenlab study experiments/depth/anira.py
Hardware: two CPU cores, half an hour on a busy machine.
Expected: does not hold. Tokens that predict an answer get more recursions than others (online 1.43
          and early 1.27 of 3, against 1.04), but hardly more for more hops: 1.32, 1.47, 1.50
          online and 1.18, 1.37, 1.27 early; Spearman's 0.33 each (0.03 to 0.64, -0.55 to 1.21).
          All are right in 0.999, and in 0.97 to 0.98 where tokens stop as decoding does
          (``hard``). Hops in strokes: 0.90 right (0.71 to 1.00 by seed), 0.36 of 4 to 6 hops at
          depth 1.57, so more is not spent on them either. With rotary positions alone, the first
          setting: 0.91 right at fixed depth, 0.89 online, 0.83 early, Spearman's -0.15 and 0.03,
          and depth 2.8 without a price. One seed of 8 values and 5 hops with 5 recursions, online:
          0.79 right, Spearman's 0.59, depth 1.2 for one hop and 1.4 for five; with feed-forward
          layers twice as wide and twice the steps 0.98, 0.73, and 1.1, 1.3, 1.7, 2.4 and 1.6 for 1
          to 5 hops (0.64 right where tokens stop as decoding does). Graphs: 0.99 right
          online and 0.97 early; depth follows neither size nor hub (R^2 0.01 each), and what the
          search finds more where it is decided early, if at all (0.29, -0.18 to 0.77; online 0.06,
          0.01 to 0.12), against the claim.
"""

from tokenlab import config as configs
from tokenlab.core.duration import Fraction
from tokenlab.data.tasks import GraphOrder, PointerChase, Task, TaskSource
from tokenlab.depth import EarlyHalting, FixedHalting, HaltingLoop, OnlineHalting
from tokenlab.evals import DepthAllocation
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term
from tokenlab.study import Bound, Claim, Study
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import AdamW, Cosine

TASK = PointerChase(values=5, queries=12, max_hops=3, bijective=True)
STROKES = configs.replace(TASK, {"queries": 8, "unary": 6})
FARTHER = configs.replace(STROKES, {"min_hops": 4, "max_hops": 6})
ACCURACY, ALIGNED, FILLER = 0.97, 0.8, 1.3
GRAPH = GraphOrder(nodes=6, min_nodes=4, edges=8)
FALLEN, DEEP = 0.77, 2.7  # twenty points below ACCURACY, nine tenths of the recursions


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
            max_length=TASK.length,
            learned_positions=True,  # value i of the map is f(i): a place, not a distance, is read
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


def _on(task: Task, experiment: Experiment, **evals: DepthAllocation) -> Experiment:
    """The same on another task."""
    changes = {
        "tokenizer": task.tokenizer,
        "data.task": task,
        "model.vocab_size": task.tokenizer.vocab_size,
        "model.max_length": task.length,
        "evals": {"soft": DepthAllocation(task=task, twin=False), **evals},
    }
    return configs.replace(experiment, changes)


def strokes() -> Experiment:
    """The online rule where hops are strokes, so that more can be asked for than in training."""
    return _on(STROKES, config(), farther=DepthAllocation(task=FARTHER, twin=False))


def study() -> Study:
    """All arms that are compared do equal work in training."""
    claims: list[Bound | Claim] = []
    for arm in ("online", "early"):
        claims += [
            Bound(arm=arm, metric="soft/accuracy", limit=ACCURACY),
            Bound(arm=arm, metric="soft/spearman", limit=ALIGNED),
            Bound(arm=arm, metric="soft/filler_depth", limit=FILLER, side="below"),
            Claim(arm=arm, than="fixed", metric="soft/accuracy", better="higher", margin=-0.03),
        ]
    claims += [
        Bound(arm="strokes", metric="farther/accuracy", limit=FALLEN, side="below"),
        Bound(arm="strokes", metric="farther/mean_depth", limit=DEEP),
    ]
    for arm, than, group in (("early", "online", "static"), ("online", "early", "execution")):
        metric = f"soft/{group}_r_squared"
        claims.append(
            Claim(arm=f"graph {arm}", than=f"graph {than}", metric=metric, better="higher")
        )
    return Study(
        name="anira",
        question="Does the depth that tokens are given follow the hops that they need?",
        arms={
            "online": config(),
            "early": early(),
            "fixed": fixed(),
            "strokes": strokes(),
            "graph online": _on(GRAPH, config()),
            "graph early": _on(GRAPH, early()),
        },
        matched="block_tokens",
        claims=tuple(claims),
    )

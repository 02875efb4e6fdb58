"""Mixture-of-Recursions on English prose, beside the plain Transformer at equal training FLOPs.

The study has two parts. A map that has to be followed for 1 to 5 hops asks whether the depth that
a router learns to give follows what a token needs: against a router by chance at equal capacity
and against full depth. English prose asks what a loop is worth: against the plain Transformer of
the same layers and against the loop at full depth, after equal training FLOPs.

Paper:    Bae et al., "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive
          Token-Level Computation", 2025, arXiv:2507.10524.
Command:  python -m tokenlab data fetch english_prose
          python -m tokenlab train experiments/depth/mor.py
          python -m tokenlab train experiments/depth/mor.py:plain
          python -m tokenlab study experiments/depth/mor.py
Hardware: two CPU cores; twelve minutes for the run, an hour for the study.
Expected: 1.63 held-out bits per byte, read causally; the plain Transformer has 1.69 after the same
          training FLOPs (one seed of each). In the study, with a quarter of the tokens in a step:
          1.769 for the mixture, 1.796 for the plain Transformer, 1.807 for the loop at full depth
          (three seeds; 0.027 with 0.025 to 0.029, and 0.038 with 0.028 to 0.048 lower). Of hops,
          three claims do not hold, two of them by the width of an interval over three seeds.
          Learned depth has 0.964 of 3 to 5 hops right, depth by chance 0.918, full depth 0.989:
          better than chance by 0.046 (-0.057 to 0.149), and 0.025 below full depth (0.130 below to
          0.080 above), at two thirds of its recursions. Depth follows hops, with Spearman's 0.71
          (0.28 to 1.14): at one seed 3.0, 3.1, 3.8, 4.7 and 5.0 layers for 1 to 5 hops, at the
          others less. Read causally learned depth has 0.736 right: thresholds miss what quotas
          find. Two settings before: feed-forward layers of half the width for half the steps had
          0.667, 0.662 and 0.802 right, Spearman's 0.73 (0.52 to 0.93); there with rotary positions
          alone, no arm followed more than one hop, for the map is read by place (0.53, 0.51 and
          0.51 right).
"""

from tokenlab import config as configs
from tokenlab.core.duration import Fraction
from tokenlab.data import PackedText, TfdsCorpus
from tokenlab.data.tasks import PointerChase, TaskSource
from tokenlab.decode import Samples
from tokenlab.depth import DepthProgram, MixtureOfRecursions, Recursive, Sequential
from tokenlab.evals import DepthAllocation, HeldOutText
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import AuxiliaryTerm, NextToken, Objective, Term
from tokenlab.routing import RandomRouter
from tokenlab.study import Bound, Claim, Study
from tokenlab.tokenizers import SentencePieceTrainer
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import AdamW, Cosine, Muon, WarmupStableDecay

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
            # With warmup=Fraction(of_run=0.2) capacities would fall from 1 by a cosine.
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


def _without_router(mixture: Experiment, depth: DepthProgram, *, steps: float) -> Experiment:
    """The same at full depth, for so many steps."""
    changes = {"model.depth": depth, "steps": round(steps)}
    terms = {"next_token": mixture.objective.terms["next_token"]}
    return configs.replace(mixture, changes | {"objective": Objective(terms=terms)})


def plain() -> Experiment:
    """The plain Transformer of eight layers."""
    return _without_router(config(), Sequential(), steps=STEPS / FULL_DEPTH)


def recursive() -> Experiment:
    """The same shared layers at full depth for every token."""
    return _without_router(config(), Recursive(recursions=3), steps=STEPS / FULL_DEPTH)


# ---------------------------------------------------------------- the study

HOPS = PointerChase(values=8, queries=8, max_hops=5)
HARD = configs.replace(HOPS, {"min_hops": 3})
SHORT_STEPS = 900
SHORT_FULL_DEPTH = 4.564 / 3.655  # as FULL_DEPTH, with rows of 128 tokens


def hops(depth: Recursive) -> Experiment:
    """Hops of a random map: a layer before the loop, one in it, one behind it."""
    return Experiment(
        name="mor_hops",
        tokenizer=HOPS.tokenizer,
        data=TaskSource(task=HOPS),
        batch_size=64,
        model=llama(
            vocab_size=HOPS.tokenizer.vocab_size,
            dim=64,
            num_layers=5,
            num_heads=4,
            num_kv_heads=4,
            hidden_dim=256,
            depth=depth,
            max_length=HOPS.length,
            learned_positions=True,  # value i of the map is f(i): a place, not a distance, is read
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=AdamW(learning_rate=Cosine(peak=2e-3)),
        steps=2400,
        checkpoint=Checkpointing(every=Fraction(of_run=1.0)),
        evals={
            "hops": DepthAllocation(task=HOPS, twin=False),
            "hard": DepthAllocation(task=HARD, twin=False),
            "causal": DepthAllocation(task=HARD),
        },
    )


def prose() -> Experiment:
    """``config`` with a quarter of the tokens in a step."""
    changes = {
        "data.length": 128,
        "batch_size": 8,
        "steps": SHORT_STEPS,
        "checkpoint.every": Fraction(of_run=1.0),
        "samples": None,
        "evals": {"held_out": HeldOutText(corpus=CORPUS, length=128, stride=64)},
    }
    return configs.replace(config(), changes)


def study() -> Study:
    """Accuracy on 3 to 5 hops, and bits per byte of prose after equal FLOPs."""
    learned = hops(MixtureOfRecursions(recursions=3, keys="shared"))
    terms = dict(learned.objective.terms)
    terms["membership"] = config().objective.terms["membership"]
    chance = configs.replace(learned, {"model.depth.router": RandomRouter()})
    text, steps = prose(), SHORT_STEPS / SHORT_FULL_DEPTH
    same_flops = {"metric": "held_out/bits_per_byte", "matched": "flops"}
    return Study(
        name="mor",
        question="Does a learned depth go where it is needed, and is a loop worth its FLOPs?",
        arms={
            "learned": configs.replace(learned, {"objective": Objective(terms=terms)}),
            "by chance": chance,
            "full depth": hops(Recursive(recursions=3, keys="shared")),
            "mixture": text,
            "plain": _without_router(text, Sequential(), steps=steps),
            "loop": _without_router(text, Recursive(recursions=3), steps=steps),
        },
        matched="tokens",
        claims=(
            Claim(
                arm="learned",
                than="by chance",
                metric="hard/accuracy",
                better="higher",
                margin=0.15,
                matched="flops",
            ),
            Claim(
                arm="learned",
                than="full depth",
                metric="hard/accuracy",
                better="higher",
                margin=-0.1,
            ),
            Bound(arm="learned", metric="hops/spearman", limit=0.5),
            Claim(arm="mixture", than="plain", **same_flops),
            Claim(arm="mixture", than="loop", **same_flops),
        ),
    )

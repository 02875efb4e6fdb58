"""Informed routing: a token runs a unit or takes a forecast of it, beside running or skipping it.

A small language model of English prose is trained and frozen. Its attention and feed-forward
layers then run on 60 % of the tokens, chosen by chance or by a router, and the others get nothing
or a forecast of rank 16. Forecasters are fitted in closed form; what an arm has of routers and
forecasters is then trained on the text for 250 steps. One arm goes on with adapters of low rank in
the frozen units, routers and forecasters fixed. Arms are compared at the same share of units run:
on the rows that are scored, and without their targets, one number is added to all scores of a
trained router.

Paper:    Han, Liang, Xuan, Wu, Zhang, Shen, "Informed Routing in LLMs: Smarter Token-Level
          Computation for Faster Inference", 2025, arXiv:2510.13831.
Command:  python -m tokenlab data fetch english_prose
          python -m tokenlab study experiments/models/informed_routing.py
Hardware: two CPU cores, fifteen minutes; an hour on a busy machine.
Expected: does not hold as a whole, in two settings. Held-out text costs 0.182 nats a byte more than
          under the whole model where routers see forecasts, 0.614 with forecasts by chance, 1.772
          where units are skipped by chance: informed is lower by 0.432 (0.400 to 0.463) and 1.590
          (1.371 to 1.809). A greedy router costs 0.47, 1.98 and 2.04: worse at every seed, by
          1.315, but -0.963 to 3.593 decides nothing. Adapters gain nothing in 100 steps (0.198;
          0.016 worse, 0.084 worse to 0.052 better). Forecasts of attention are worse than those of
          feed-forward layers: they leave 0.53 of it and 0.37 of them. Forecasters add 3.3 % of
          parameters.
          The first setting, width 128 for 1000 steps and 150 steps of routers: 0.183 informed,
          0.521 and 1.747 by chance, a greedy router 0.82, 0.89 and 2.87 (1.344 worse, -1.617 to
          4.305); with 75 % of the units 0.094, 0.340, 1.241, and 0.53, 0.79 and 2.46. Forecasts
          left 0.48 of attention and 0.33 of feed-forward layers.
          SmolLM2 with a tenth of its units left out by chance, forecasters of rank 64: 2.42 nats a
          token more where they are skipped, 1.21 where they are forecast (three seeds); there
          forecasts leave less of attention than of the feed-forward layer in 18 of 30 layers, 0.58
          and 0.62 (one seed).
"""

import dataclasses
import functools
from typing import Literal, cast

import jax
import numpy as np
from jaxtyping import PyTree

from tokenlab import config as configs
from tokenlab.core.context import View
from tokenlab.core.rng import stream
from tokenlab.data import Batch, PackedText, TfdsCorpus, first_rows
from tokenlab.evals import ObjectiveValue, at_share, routed_pass
from tokenlab.experiment import Experiment
from tokenlab.models import (
    ADAPTERS,
    Forecaster,
    LowRank,
    Transformer,
    llama,
    with_adapter,
    with_base,
    with_forecasters,
    with_stand_ins,
)
from tokenlab.objectives import AuxiliaryTerm, BudgetPenalty, NextToken, Objective, Summand, Term
from tokenlab.routing import LearnedOption, NarrowScores, OptionRouter, RandomOption
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.study.trained import continued, trained
from tokenlab.tokenizers import ByteTokenizer
from tokenlab.train.optimizer import AdamW, Cosine, WarmupStableDecay, cooling
from tokenlab.train.run import Run

TEXT = PackedText(corpus=TfdsCorpus(name="english_prose"), length=64)
RANK = 16  # of forecasters
NEXT_TOKEN = Term(loss=NextToken())
HOT, COOL = 5.0, 1.0  # temperatures
Kind = Literal["random skip", "greedy skip", "random forecast", "informed"]


def config() -> Experiment:
    """The model that is frozen afterwards."""
    objective = Objective(terms={"next_token": NEXT_TOKEN})
    held_out = dataclasses.replace(TEXT, split="held_out")
    return Experiment(
        name="informed_routing",
        tokenizer=ByteTokenizer(),
        data=TEXT,
        batch_size=16,
        model=llama(
            vocab_size=264, dim=144, num_layers=6, num_heads=4, num_kv_heads=4,
            hidden_dim=432, max_length=TEXT.length,
        ),
        objective=objective,
        optimizer=AdamW(learning_rate=WarmupStableDecay(peak=3e-3)),
        steps=1500,
        evals={"held_out": ObjectiveValue(objective=objective, data=held_out)},
    )  # fmt: skip


def router(kind: Kind, sparsity: float) -> OptionRouter:
    """What chooses."""
    if kind.startswith("random"):
        return RandomOption(chances=(1 - sparsity, sparsity))
    learned = LearnedOption(mixing="drawn", temperature=HOT, coolest=COOL)
    if kind == "informed":  # Hidden layers of both are a quarter of the stream.
        return learned.clone(head=NarrowScores(divisor=8), with_forecast=True)
    return learned.clone(head=NarrowScores(divisor=4))


def routed(model: Transformer, kind: Kind, sparsity: float) -> Transformer:
    """Both units of every layer, each by itself."""
    part = (None if kind.endswith("skip") else Forecaster(rank=RANK),)
    return with_stand_ins(model, mixer=part, feedforward=part, router=router(kind, sparsity))


@functools.cache
def stage(kind: Kind, sparsity: float, adapted: bool) -> Run:
    """Routers and forecasters of a frozen model, or its adapters; one program for all seeds."""
    terms: dict[str, Summand] = {"next_token": NEXT_TOKEN}
    model, steps, peak, groups = routed(config().model, kind, sparsity), 250, 2e-3, ()
    names = ("*/routing/scores/*", *(() if kind.endswith("skip") else ("*/stand_in_0/*",)))
    if adapted:
        model, steps, peak, names = with_adapter(model, LowRank(rank=8)), 100, 2e-4, ADAPTERS
    elif kind.startswith("random"):
        names = names[1:]
    else:
        terms["budget"] = BudgetPenalty(budget=1 - sparsity, coefficient=20.0)
        terms["temperature"] = AuxiliaryTerm(name="temperature")
        groups = (cooling(hottest=HOT, coolest=COOL, steps=steps),)
    optimizer = AdamW(learning_rate=Cosine(peak=peak), trained=names, groups=groups)
    changes = {"model": model, "objective": Objective(terms=terms), "optimizer": optimizer}
    changes |= {"batch_size": 8, "steps": steps}
    return Run.of(configs.replace(config(), changes), tokenizer=ByteTokenizer())


def rows(split: str, count: int, seed: int) -> Batch:
    """Text to fit on, or to score."""
    source = dataclasses.replace(TEXT, split=split)
    return first_rows(source, tokenizer=ByteTokenizer(), batch_size=count, seed=seed)


@functools.cache
def frozen(seed: int) -> tuple[Transformer, PyTree, Batch]:
    """The model, the same for all seeds, with fitted forecasters; and rows that are scored."""
    view, _ = trained(config())
    tokens, key = rows("train", 256, seed + 2000)["tokens"], stream(seed, "init")
    plain = cast(Transformer, view.model)
    model, params = with_forecasters(plain, view.params, tokens, rank=RANK, key=key)
    return model, params, rows("held_out", 48, seed)


@functools.cache
def behind(kind: Kind, sparsity: float, adapted: bool, seed: int) -> View:
    """The one trained here, behind the stages of an arm."""
    before = behind(kind, sparsity, False, seed).params if adapted else frozen(seed)[1]
    run = stage(kind, sparsity, adapted)
    params = with_base(run.experiment.model, before, key=stream(seed, "init"))
    if kind != "random skip":
        first = seed + (3000 if adapted else 1000)
        text = TEXT.batches(tokenizer=ByteTokenizer(), batch_size=8, seed=first)
        params = continued(run, params, iter(text))
    return View(model=run.experiment.model, params=params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Trial):
    """A frozen model with fewer units run.

    Attributes:
        kind: who chooses, and what the others get.
        sparsity: share of units that do not run.
        adapted: whether adapters of low rank are trained after the routers, which are then fixed.
    """

    kind: Kind
    sparsity: float = 0.4
    adapted: bool = False

    def measure(self, *, seed: int) -> Measured:
        """What held-out text costs more than under the whole model."""
        whole, params, batch = frozen(seed)
        dense = jax.device_get(routed_pass(whole, params, batch))
        view = behind(self.kind, self.sparsity, self.adapted, seed)
        model, params = cast(Transformer, view.model), view.params
        own = routed_pass(model, params, batch).units_run
        if not self.kind.startswith("random"):
            params = at_share(model, params, batch, share=1 - self.sparsity)
        found = jax.device_get(routed_pass(model, params, batch))
        return Measured(
            figures={
                "text/increase": found.nats - dense.nats,
                "text/nats": found.nats,
                "text/share_before_shift": own,
                "text/attention_run": found.means["executed"][::2].mean(),
                "text/feedforward_run": found.means["executed"][1::2].mean(),
            },
            costs={"units_run": found.units_run, "flops": found.flops / dense.flops},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecasters(Trial):
    """How much of each unit a forecaster leaves, on held-out text, and what it is like."""

    def measure(self, *, seed: int) -> Measured:
        """Means over attention and over feed-forward layers."""
        found = jax.device_get(routed_pass(*frozen(seed)))
        sides = {"attention": 0, "feedforward": 1}
        figures = {
            f"forecast/{side}_{name}": found.means[f"forecast_{name}"][start::2].mean()
            for name in ("unexplained", "cosine", "distance")
            for side, start in sides.items()
        }
        left = found.means["forecast_unexplained"]
        figures["forecast/layers_with_attention_lower"] = np.mean(left[::2] < left[1::2])
        whole, plain = (
            sum(leaf.size for leaf in jax.tree.leaves(params))
            for params in (frozen(seed)[1], trained(config())[0].params)
        )
        figures["forecast/parameters_added"] = whole / plain - 1
        return Measured(figures=figures, costs={"units_run": found.units_run})


def study() -> Study:
    """Informed routing against what it is made of, with 40 % of the units left out."""
    kinds: tuple[Kind, ...] = ("random skip", "greedy skip", "random forecast", "informed")
    lower = functools.partial(Claim, metric="text/increase")
    return Study(
        name="informed_routing",
        question="Is a forecast of what a unit would add better than nothing, and worth a look?",
        arms={
            **{kind: Sparse(kind=kind) for kind in kinds},
            "adapted": Sparse(kind="informed", adapted=True),
            "forecasters": Forecasters(),
        },
        matched="units_run",
        claims=(
            *(lower(arm="informed", than=kind) for kind in kinds[:3]),
            lower(arm="informed", than="greedy skip", margin=0.3, relative=True),
            lower(arm="adapted", than="informed"),
            Bound(arm="forecasters", metric="forecast/layers_with_attention_lower", limit=0.5),
        ),
    )

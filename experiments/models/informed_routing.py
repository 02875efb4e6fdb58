"""Informed routing: a token runs a unit or takes a forecast of it, beside running or skipping it.

A small language model of English prose is trained and frozen. Its attention and feed-forward
layers then run on 75 or 60 % of the tokens, chosen by chance or by a router, and the others get
nothing or a forecast of rank 16. Forecasters are fitted in closed form; what an arm has of routers
and forecasters is then trained on the text for as many steps. Arms are compared at the same share
of units run: on the rows that are scored, and without their targets, one number is added to all
scores of a trained router. The last two arms skip or forecast a tenth of SmolLM2's units by chance.

Paper:    Han, Liang, Xuan, Wu, Zhang, Shen, "Informed Routing in LLMs: Smarter Token-Level
          Computation for Faster Inference", 2025, arXiv:2510.13831.
Command:  python -m tokenlab data fetch english_prose
          python -m tokenlab models fetch smollm2_135m
          python -m tokenlab study experiments/models/informed_routing.py
Hardware: one CPU core, fifty minutes on a busy machine.
Expected: does not hold as a whole, in the one setting that has been run. At 25 and 40 % sparsity
          held-out text costs 0.094 and 0.183 nats a byte more than under the whole model where
          routers see forecasts, 0.340 and 0.521 with forecasts by chance, 1.241 and 1.747 where
          units are skipped by chance. A greedy router costs 0.53, 0.79 and 2.46, and 0.82, 0.89 and
          2.87: worse at every seed (at 40 % informed has 0.17 of its increase), but three seeds so
          far apart decide nothing. 150 steps are few for a router. Forecasts of attention are not
          better than those of feed-forward layers: they leave 0.48 of it and 0.33 of them.
          SmolLM2 with a tenth of its units left out by chance: 2.42 nats a token more where they
          are skipped, 1.21 where they are forecast. Forecasters add 3.7 % of parameters.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab import config as configs
from tokenlab.core.context import Context, View
from tokenlab.data import PackedText, TfdsCorpus
from tokenlab.evals import ObjectiveValue
from tokenlab.experiment import Experiment
from tokenlab.interop import load_pretrained
from tokenlab.interop.assets import fetch_model
from tokenlab.models import (
    Forecaster,
    Transformer,
    fit_forecasters,
    llama,
    with_base,
    with_stand_ins,
)
from tokenlab.objectives import AuxiliaryTerm, BudgetPenalty, NextToken, Objective, Summand, Term
from tokenlab.objectives.budget import mean_share
from tokenlab.routing import LearnedOption, NarrowScores, OptionRouter, RandomOption
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.study.trained import continued, trained
from tokenlab.tokenizers import ByteTokenizer
from tokenlab.train.optimizer import SGD, AdamW, Constant, Cosine, Group, WarmupStableDecay
from tokenlab.train.run import Run

TEXT = PackedText(corpus=TfdsCorpus(name="english_prose"), length=64)
LAYERS, STEPS, STAGE_STEPS, RANK = 6, 1000, 150, 16
FITTED, HELD_OUT = 256, 48  # rows
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
            vocab_size=264, dim=128, num_layers=LAYERS, num_heads=4, num_kv_heads=4,
            hidden_dim=384, max_length=TEXT.length,
        ),
        objective=objective,
        optimizer=AdamW(learning_rate=WarmupStableDecay(peak=3e-3)),
        steps=STEPS,
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


def routed(model: Transformer, kind: Kind, sparsity: float, rank: int) -> Transformer:
    """Both units of every layer, each by itself."""
    stand_in = None if kind.endswith("skip") else Forecaster(rank=rank)
    return with_stand_ins(
        model, mixer=(stand_in,), feedforward=(stand_in,), router=router(kind, sparsity)
    )


@functools.cache
def stage(kind: Kind, sparsity: float) -> Run:
    """Routers and forecasters of a frozen model; one program for all seeds."""
    terms: dict[str, Summand] = {"next_token": NEXT_TOKEN}
    names: tuple[str, ...] = () if kind.endswith("skip") else ("*/stand_in_0/*",)
    groups: tuple[Group, ...] = ()
    if not kind.startswith("random"):
        terms["budget"] = BudgetPenalty(budget=1 - sparsity, coefficient=20.0)
        terms["temperature"] = AuxiliaryTerm(name="temperature")
        names = (*names, "*/routing/scores/*")
        fall = SGD(learning_rate=Constant(peak=(HOT - COOL) / (0.8 * STAGE_STEPS)))
        groups = (Group(parameters=("*/routing/temperature",), optimizer=fall),)
    experiment = configs.replace(
        config(),
        {
            "model": routed(config().model, kind, sparsity, RANK),
            "objective": Objective(terms=terms),
            "optimizer": AdamW(learning_rate=Cosine(peak=2e-3), trained=names, groups=groups),
            "batch_size": 8,
            "steps": STAGE_STEPS,
        },
    )
    return Run.of(experiment, tokenizer=ByteTokenizer())


def rows(split: str, *, batch_size: int, seed: int) -> Any:
    """Batches of a split."""
    source = dataclasses.replace(TEXT, split=split)
    return iter(source.batches(tokenizer=ByteTokenizer(), batch_size=batch_size, seed=seed))


@functools.partial(jax.jit, static_argnums=0)
def scored(model: Transformer, params: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Mean nats, share of units that run (of each unit too), operations, and reported errors."""
    views = {"policy": View(model=model, params=params)}
    context = Context(batch=batch, views=views, key=jax.random.key(0))
    trace = context.output().trace
    ledger = model.ledger(trace, positions=batch["positions"], segments=batch["segments"])
    found = {"nats": -jnp.mean(context.token_logp()), "flops": ledger.flops}
    found |= {name: each.total / each.weight for name, each in trace.aux.items()}
    if "executed" in trace.aux:
        found["share"] = mean_share(trace.aux["executed"])
    return found


def shifted(params: Any, by: float) -> Any:
    """With so much added to the scores of running a unit."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.at[0].add(by)
            if jax.tree_util.keystr(path, simple=True, separator="/").endswith("scores/bias")
            else leaf
        ),
        params,
    )


def at_share(model: Transformer, params: Any, batch: dict[str, Any], share: float) -> Any:
    """``params`` with scores shifted together until so many units run on these rows."""
    low, high = -20.0, 20.0
    for _ in range(18):
        middle = (low + high) / 2
        found = float(scored(model, shifted(params, middle), batch)["share"])
        low, high = (middle, high) if found < share else (low, middle)
    return shifted(params, high)


@functools.cache
def base() -> View:
    """The model, trained; the same for all seeds."""
    return trained(config())[0]


@functools.cache
def held_out(seed: int) -> dict[str, Any]:
    """Rows that are scored."""
    batch = next(rows("held_out", batch_size=HELD_OUT, seed=seed))
    return {name: each for name, each in batch.items() if name != "documents"}


@functools.cache
def fitted(seed: int) -> View:
    """The frozen model with forecasters, all units running."""
    model = with_stand_ins(
        config().model, mixer=(Forecaster(rank=RANK),), feedforward=(Forecaster(rank=RANK),)
    )
    params = with_base(model, base().params, key=jax.random.key(seed))
    batch = next(rows("train", batch_size=FITTED, seed=seed + 2000))
    return View(model=model, params=fit_forecasters(model, params, batch["tokens"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse(Trial):
    """The frozen model with fewer units run.

    Attributes:
        kind: who chooses, and what the others get.
        sparsity: share of units that do not run.
    """

    kind: Kind
    sparsity: float

    def measure(self, *, seed: int) -> Measured:
        """What held-out text costs more than under the whole model."""
        run = stage(self.kind, self.sparsity)
        params = with_base(run.experiment.model, fitted(seed).params, key=jax.random.key(seed))
        if self.kind != "random skip":
            params = continued(run, params, rows("train", batch_size=8, seed=seed + 1000))
        model, batch = run.experiment.model, held_out(seed)
        own = float(scored(model, params, batch)["share"])
        if not self.kind.startswith("random"):
            params = at_share(model, params, batch, 1 - self.sparsity)
        found = jax.device_get(scored(model, params, batch))
        whole = jax.device_get(scored(config().model, base().params, batch))
        figures = {
            "text/increase": found["nats"] - whole["nats"],
            "text/nats": found["nats"],
            "text/share_before_shift": own,
            "text/attention_run": np.mean(found["executed"][::2]),
            "text/feedforward_run": np.mean(found["executed"][1::2]),
        }
        flops = found["flops"] / whole["flops"]
        return Measured(figures=figures, costs={"units_run": found["share"], "flops": flops})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecasters(Trial):
    """How much of each unit a forecaster of rank 16 leaves, on held-out text."""

    def measure(self, *, seed: int) -> Measured:
        """Unexplained shares of what units add, and the parameters that forecasters add."""
        view = fitted(seed)
        found = jax.device_get(scored(view.model, view.params, held_out(seed)))
        attention, feedforward = (found["forecast_unexplained"][i::2] for i in (0, 1))
        figures = {
            "forecast/attention": attention.mean(),
            "forecast/feedforward": feedforward.mean(),
            "forecast/layers_with_attention_lower": np.mean(attention < feedforward),
            "forecast/attention_cosine": found["forecast_cosine"][::2].mean(),
            "forecast/feedforward_cosine": found["forecast_cosine"][1::2].mean(),
            "forecast/attention_distance": found["forecast_distance"][::2].mean(),
            "forecast/feedforward_distance": found["forecast_distance"][1::2].mean(),
        }
        sizes = [sum(x.size for x in jax.tree.leaves(v.params)) for v in (view, base())]
        figures["forecast/parameters_added"] = sizes[0] / sizes[1] - 1
        return Measured(figures=figures, costs={"units_run": found["share"]})


@functools.cache
def published(seed: int) -> tuple[Transformer, Any, dict[str, Any]]:
    """SmolLM2, its parameters with forecasters of rank 64, and rows that are scored."""
    model, params, tokenizer = load_pretrained(fetch_model("smollm2_135m"))
    batches = []
    for split, count in (("train", 16), ("held_out", 8)):
        source = dataclasses.replace(TEXT, split=split, length=128)
        batch = next(iter(source.batches(tokenizer=tokenizer, batch_size=count, seed=seed)))
        batches.append({name: each for name, each in batch.items() if name != "documents"})
    parts = (Forecaster(rank=64),)
    whole = with_stand_ins(model, mixer=parts, feedforward=parts)
    params = with_base(whole, params, key=jax.random.key(seed))
    return model, fit_forecasters(whole, params, batches[0]["tokens"], batch_size=2), batches[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(Trial):
    """SmolLM2 with a tenth of its units left out by chance, nothing trained.

    Attributes:
        kind: what those tokens get.
    """

    kind: Literal["random skip", "random forecast"]

    def measure(self, *, seed: int) -> Measured:
        """What held-out text costs more than under the whole model."""
        model, params, batch = published(seed)
        sparse = routed(model, self.kind, 0.1, 64)
        whole = with_stand_ins(model, mixer=(None,), feedforward=(None,))
        found, dense = (jax.device_get(scored(each, params, batch)) for each in (sparse, whole))
        increase = found["nats"] - dense["nats"]
        return Measured(
            figures={"text/increase": increase, "text/nats": found["nats"]},
            costs={"units_run": found["share"], "flops": found["flops"] / dense["flops"]},
        )


def study() -> Study:
    """Informed routing against what it is made of, at two sparsities."""
    kinds: tuple[Kind, ...] = ("random skip", "greedy skip", "random forecast", "informed")
    arms: dict[str, Trial] = {
        f"{kind} {percent}": Sparse(kind=kind, sparsity=percent / 100)
        for percent in (25, 40)
        for kind in kinds
    }
    lower = functools.partial(Claim, metric="text/increase")
    claims = [
        lower(arm=f"informed {percent}", than=f"{kind} {percent}")
        for percent in (25, 40)
        for kind in kinds[:3]
    ]
    return Study(
        name="informed_routing",
        question="Is a forecast of what a unit would add better than nothing, and worth a look?",
        arms=arms
        | {
            "forecasters": Forecasters(),
            "SmolLM2, random skip": Published(kind="random skip"),
            "SmolLM2, random forecast": Published(kind="random forecast"),
        },
        matched="units_run",
        claims=(
            *claims,
            lower(arm="informed 40", than="greedy skip 40", margin=0.3, relative=True),
            Bound(arm="forecasters", metric="forecast/layers_with_attention_lower", limit=0.5),
            lower(arm="SmolLM2, random forecast", than="SmolLM2, random skip"),
        ),
    )

"""Duo-LLM: what routes between big and small layers could give, and what a trained router gets.

Every feed-forward layer has a twin of a sixteenth of its width. The network learns under random
routes; then, on held-out text, every one of the 64 patterns of big and small is tried for every
token by itself, its context being read with all layers big. A router is trained on the frozen
network to run two big layers of six on average, and its routes are compared with random ones and
with the oracle's at the number of big layers that it gave to each token. The oracle has seen the
targets. ``dropout`` shows how far that alone goes: the best of as many runs of all big layers as
the oracle chooses among, whose nats vary as much from run to run.

Paper:    Alizadeh et al., "Duo-LLM: A Framework for Studying Adaptive Computation in Large Language
          Models", 2024, arXiv:2410.10846.
Command:  python -m tokenlab data fetch english_prose
          python -m tokenlab study experiments/models/duo_llm.py
Hardware: one CPU core, twenty minutes on a busy machine.
Expected: works. All big layers cost 1.807 nats a byte, all small ones 1.866, the best pattern of at
          most one big layer for each byte 1.655. But the best of seven runs of all big layers with
          dropout cost 1.633: luck alone is worth 1.11 to 1.19 of that drop. The router (2.11 big
          layers, mostly the last three) costs 1.800, random routes 1.821, the best of 100 of them
          1.811, the oracle 1.609: the router closes 0.10 of the gap. Of the quarter of bytes with
          the highest nats under small layers, 0.15 gain less than 0.1 nats from any pattern. With
          one pattern for a row of 64 bytes the oracle of two big layers still costs 1.78.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab import config as configs
from tokenlab.core.arrays import Float, Int
from tokenlab.core.context import Context, View
from tokenlab.core.rng import stream
from tokenlab.data import PackedText, TfdsCorpus, first_rows
from tokenlab.evals import ObjectiveValue
from tokenlab.evals.routes import (
    all_patterns,
    best_by_budget,
    difficulty,
    executed,
    pattern_nats,
    random_routes,
)
from tokenlab.experiment import Experiment
from tokenlab.models import SwiGLU, Transformer, given_options, llama, with_base, with_stand_ins
from tokenlab.objectives import AuxiliaryTerm, BudgetPenalty, NextToken, Objective, Term
from tokenlab.routing import LearnedOption, OptionRouter, RandomOption
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.study.trained import continued, trained
from tokenlab.tokenizers import ByteTokenizer
from tokenlab.train.optimizer import AdamW, WarmupStableDecay, cooling
from tokenlab.train.run import Run

TEXT = PackedText(corpus=TfdsCorpus(name="english_prose"), length=64)
LAYERS, STEPS, ROUTER_STEPS, HELD_OUT = 6, 1500, 300, 48
BIG, BUDGET, COOLEST = 2, 2 / 6, 0.1
PATTERNS = all_patterns([2] * LAYERS)
BIG_LAYERS = executed(PATTERNS)
NEXT_TOKEN = Term(loss=NextToken())
RATES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)  # of dropout
Route = Literal[
    "all big", "all small", "oracle", "at most one", "random", "best of 100", "router", "dropout"
]


def model(router: OptionRouter) -> Transformer:
    """Six layers of width 64; feed-forward layers of 256 and of 16."""
    plain = llama(
        vocab_size=264, dim=64, num_layers=LAYERS, num_heads=4, num_kv_heads=4, hidden_dim=256,
        max_length=TEXT.length,
    )  # fmt: skip
    return with_stand_ins(plain, feedforward=(SwiGLU(hidden_dim=16),), router=router)


def config() -> Experiment:
    """The first stage: big or small by chance, for each token and layer."""
    objective = Objective(terms={"next_token": NEXT_TOKEN})
    held_out = dataclasses.replace(TEXT, split="held_out")
    return Experiment(
        name="duo_llm",
        tokenizer=ByteTokenizer(),
        data=TEXT,
        batch_size=16,
        model=model(RandomOption()),
        objective=objective,
        optimizer=AdamW(learning_rate=WarmupStableDecay(peak=3e-3)),
        steps=STEPS,
        evals={"held_out": ObjectiveValue(objective=objective, data=held_out)},
    )


def routed() -> Experiment:
    """The third stage: routers alone, whose temperature falls from 1."""
    terms = {
        "next_token": NEXT_TOKEN,
        "budget": BudgetPenalty(budget=BUDGET, distance="squared"),
        "temperature": AuxiliaryTerm(name="temperature"),
    }
    optimizer = AdamW(
        learning_rate=WarmupStableDecay(peak=1e-2),
        trained=("*/routing/scores/*",),
        groups=(cooling(hottest=1.0, coolest=COOLEST, steps=ROUTER_STEPS),),
    )
    return configs.replace(
        config(),
        {
            "model": model(LearnedOption(coolest=COOLEST)),
            "objective": Objective(terms=terms),
            "optimizer": optimizer,
            "steps": ROUTER_STEPS,
        },
    )


@functools.cache
def router_run() -> Run:
    """The third stage; one program for all seeds."""
    return Run.of(routed(), tokenizer=ByteTokenizer())


@functools.partial(jax.jit, static_argnums=0)
def chosen(network: Transformer, params: Any, batch: dict[str, Any]) -> Any:
    """The option of every token in every layer, and the mean nats."""
    context = Context(batch=batch, views={"policy": View(model=network, params=params)})
    option = context.output().trace.figures["option"]
    return option.astype(jnp.int32), -context.token_logp()


@functools.partial(jax.jit, static_argnums=0)
def noisy(network: Transformer, params: Any, batch: dict[str, Any], keys: Any) -> Any:
    """Nats of every token where all layers are big, in one run with dropout per key."""
    big = given_options(network, jnp.zeros(LAYERS, jnp.int32))
    view = View(model=network, params=params, given=big)

    def run(key: Any) -> Any:
        return -Context(batch=batch, views={"policy": view}, key=key, train=True).token_logp()

    return jax.lax.map(run, keys)


def selection(
    view: View, batch: dict[str, Any], like: Float[np.ndarray, "P B T"], seed: int
) -> Float[np.ndarray, "B T"]:
    """The lowest nats of each token over as many runs with dropout, which vary as much."""
    keys, spread = jax.random.split(jax.random.key(seed), len(like)), like.var(axis=0).mean()
    found = []
    for rate in RATES:
        block = view.model.block.clone(dropout=rate)
        nats = np.asarray(noisy(view.model.clone(block=block), view.params, batch, keys))
        found.append((abs(np.log(nats.var(axis=0).mean() / spread)), nats))
    return min(found, key=lambda each: each[0])[1].min(axis=0)


def network(seed: int) -> View:
    """Trained in both stages."""
    base, _ = trained(configs.replace(config(), {"seed": seed}))
    run = router_run()
    params = with_base(run.experiment.model, base.params, key=stream(seed, "init"))
    text = TEXT.batches(tokenizer=ByteTokenizer(), batch_size=16, seed=seed + 1000)
    params = continued(run, params, iter(text))
    return View(model=run.experiment.model, params=params)


class Tables(NamedTuple):
    """What every token of some rows costs.

    Attributes:
        nats: under each pattern, in a context where all layers are big.
        in_rows: under each pattern, where the whole row follows it.
        by_router: under the router's route, in that context.
        own: in a pass that the router routes whole.
        route: option of each layer by the router.
    """

    nats: Float[np.ndarray, "P B T"]
    in_rows: Float[np.ndarray, "P B T"]
    by_router: Float[np.ndarray, "B T"]
    own: Float[np.ndarray, "B T"]
    route: Int[np.ndarray, "L B T"]


def tables(view: View, batch: dict[str, Any]) -> Tables:
    """Everything that routes are judged by."""
    route, own = (np.asarray(each) for each in chosen(view.model, view.params, batch))
    big = [0] * LAYERS
    return Tables(
        nats=pattern_nats(view, batch, PATTERNS, reference=big),
        in_rows=pattern_nats(view, batch, PATTERNS),
        by_router=pattern_nats(view, batch, route[None], reference=big)[0],
        own=own,
        route=route,
    )


def by_budget(found: Tables, rng: np.random.Generator) -> dict[Route, dict[str, float]]:
    """Oracles and random routes of every number of big layers; which layers the oracle has big."""
    figures: dict[Route, dict[str, float]] = {"oracle": {}, "random": {}, "best of 100": {}}
    for k, value in best_by_budget(found.nats, BIG_LAYERS).items():
        trials = random_routes(found.nats[k == BIG_LAYERS], trials=100, rng=rng)
        in_rows = found.in_rows.mean(axis=2)[k == BIG_LAYERS].min(axis=0)  # one pattern for a row
        figures["oracle"][f"duo/nats_of_{k}"] = float(value.mean())
        figures["oracle"][f"duo/nats_of_rows_of_{k}"] = float(in_rows.mean())
        figures["random"][f"duo/nats_of_{k}"] = float(trials.mean())
        figures["best of 100"][f"duo/nats_of_{k}"] = float(trials.min())
    best = PATTERNS[BIG_LAYERS == BIG][np.argmin(found.nats[BIG_LAYERS == BIG], axis=0)]
    figures["oracle"] |= in_layers(np.moveaxis(best, -1, 0))
    return figures


def in_layers(route: Int[np.ndarray, "L B T"]) -> dict[str, float]:
    """Share of tokens for which each layer is big."""
    return {f"duo/big_in_layer_{i}": float(np.mean(each == 0)) for i, each in enumerate(route)}


def at_budgets(
    found: Tables, budgets: Int[np.ndarray, "B T"], rng: np.random.Generator
) -> tuple[float, Float[np.ndarray, " S"]]:
    """The oracle, and 100 random routes, with as many big layers for each token."""
    by_chance = np.zeros(100)
    for k in np.unique(budgets):
        there = budgets == k
        trials = random_routes(found.nats[k == BIG_LAYERS][:, there], trials=100, rng=rng)
        by_chance += trials * there.mean()
    oracle = np.choose(budgets, list(best_by_budget(found.nats, BIG_LAYERS).values()))
    return float(oracle.mean()), by_chance


@functools.cache
def measured(seed: int) -> tuple[dict[Route, dict[str, float]], dict[Route, float]]:
    """Figures of each route, and how many big layers it runs."""
    view, rng = network(seed), np.random.default_rng(seed)
    text = dataclasses.replace(TEXT, split="held_out")
    batch = first_rows(text, tokenizer=ByteTokenizer(), batch_size=HELD_OUT, seed=seed)
    found = tables(view, batch)
    nats, budgets = found.nats, np.sum(found.route == 0, axis=0)
    oracle, by_chance = at_budgets(found, budgets, rng)
    one = nats[BIG_LAYERS <= 1]
    few, noise = one.min(axis=0), selection(view, batch, one, seed)
    means: dict[Route, float] = {
        "all big": nats[0].mean(), "all small": nats[-1].mean(), "oracle": oracle,
        "at most one": few.mean(), "random": by_chance.mean(), "best of 100": by_chance.min(),
        "router": found.by_router.mean(), "dropout": noise.mean(),
    }  # fmt: skip
    figures = {name: {"duo/nats": float(value)} for name, value in means.items()}
    for name, more in by_budget(found, rng).items():
        figures[name] |= more
    gap, drop = means["random"] - oracle, means["all big"] - means["at most one"]
    figures["router"] |= {
        "duo/share_of_gap": float((means["random"] - means["router"]) / gap),
        "duo/whole_route_nats": float(np.mean(found.own)),
        **in_layers(found.route),
    }
    figures["dropout"]["duo/share_of_drop"] = float((means["all big"] - means["dropout"]) / drop)
    delta, hard = difficulty(nats, nats[-1]), nats[-1] > np.quantile(nats[-1], 0.75)
    figures["all small"] |= {
        "duo/hard_not_helped": float(np.mean(delta[hard] < 0.1)),
        "duo/difficulty": float(delta.mean()),
        "duo/difficulty_with_nats": float(np.corrcoef(delta.ravel(), nats[-1].ravel())[0, 1]),
    }
    spent: dict[Route, float] = dict.fromkeys(means, float(budgets.mean()))
    spent["at most one"] = float(np.mean(BIG_LAYERS[BIG_LAYERS <= 1][np.argmin(one, axis=0)]))
    return figures, spent | {"all big": LAYERS, "dropout": LAYERS, "all small": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed(Trial):
    """Held-out text under one way to route it, each token by itself.

    Attributes:
        route: who says which layers are big; ``oracle``, ``random`` and ``best of 100`` at the
            number that the router gave to each token.
    """

    route: Route

    def measure(self, *, seed: int) -> Measured:
        """Mean nats of a token, and what else the route shows."""
        figures, spent = measured(seed)
        costs = {"scored_tokens": HELD_OUT * TEXT.length, "big_layers": spent[self.route]}
        return Measured(figures=figures[self.route], costs=costs)


def study() -> Study:
    """The router beside chance and the oracle, and the oracle beside all big layers."""
    alike = functools.partial(Claim, metric="duo/nats", matched="big_layers")
    routes: tuple[Route, ...] = (
        "all big", "all small", "oracle", "at most one", "random", "best of 100", "router",
        "dropout",
    )  # fmt: skip
    return Study(
        name="duo_llm",
        question="How far is a trained router from the best routes, and what do those owe to luck?",
        arms={route: Routed(route=route) for route in routes},
        matched="scored_tokens",
        claims=(
            Claim(arm="at most one", than="all big", metric="duo/nats"),
            alike(arm="router", than="random"),
            alike(arm="oracle", than="router"),
            Bound(arm="router", metric="duo/share_of_gap", limit=0.5, side="below"),
            Bound(arm="all small", metric="duo/hard_not_helped", limit=0.05),
        ),
    )

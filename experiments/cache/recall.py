"""All caches on a small model that recalls: facts repeated against the tokens that may be kept.

A decoder of two layers is trained once to answer questions about facts in a text, whose positions
lie within 272. It then reads a text of 256 tokens whole, of which each layer keeps or reads a
budget, and is asked for its eight facts one token after another. Three further settings are those
in which single policies are said to help: facts in records that are asked in a row (LouisKV), texts
of 1,024 tokens, four times what was trained (TokenSelect), and a question at the end of a window of
128 tokens behind a text of 2,048 (ActQKV). Chance is 1/8.

Papers:   Li et al., "EMS", 2024, arXiv:2412.08521; Wu et al., "TokenSelect", 2024,
          arXiv:2411.02886; Wu et al., "LouisKV", 2025, arXiv:2510.11292; Xiao et al., "ActQKV",
          2025, arXiv:2502.13542.
Command:  python -m tokenlab study experiments/cache/recall.py
Hardware: two CPU cores, busy: twenty minutes, three of them for the model.
Expected: of the facts 1.00 are recalled with all keys. At 32 and 64 of 256 tokens: TokenSelect 1.00
          and 1.00; PageTopK 0.90, 0.95; LouisKV 0.80, 0.94 with the paper's clusters of 16 tokens,
          1.00 and 1.00 with clusters of 4; ActQKV 0.71, 0.85; EMS 0.49, 0.68; H2O 0.46, 0.62;
          SnapKV 0.44, 0.63; sinks and window 0.19, 0.31. TokenSelect keeps 0.99 at four times the
          trained length, where the full cache falls to 0.68. EMS keeps facts more evenly by depth
          than H2O and SnapKV at 64 (0.09 from the best third to the worst, against 0.44 and 0.16);
          at 32 all seeds say so too, but three do not bound it. Two checks do not hold: LouisKV's
          facts in records, 0.79 with clusters of 16 (1.00 with 4; queries jump at 0.96 of the
          steps, so nothing is saved); and ActQKV's probe finds no more than the mean query, 0.33
          and 0.32 behind 2,048 tokens, 0.43 and 0.41 behind 1,024 with smaller blocks.
"""

import dataclasses
import functools
import zlib
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.cache import (
    EMS,
    ActQKV,
    Cache,
    CachePolicy,
    FullCache,
    LouisKV,
    PageTopK,
    SinkCache,
    TokenSelect,
)
from tokenlab.core.context import View
from tokenlab.data import TaskSource
from tokenlab.data.tasks import PlantedFacts
from tokenlab.decode import Autoregressive, Greedy, score_continuation
from tokenlab.decode.passes import prefill
from tokenlab.evals import TaskAccuracy
from tokenlab.experiment import Experiment
from tokenlab.models import Transformer, for_decoding, llama
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.study.trained import trained
from tokenlab.tokenizers import Tokenizer
from tokenlab.train.optimizer import Muon, WarmupStableDecay

SHORT = PlantedFacts(size=256 + 16, facts=8)
RECORDS = dataclasses.replace(SHORT, record=4)
LONG = dataclasses.replace(SHORT, size=1024 + 16)
WINDOWS = dataclasses.replace(SHORT, size=2048 + 15)  # a question ends a window
HALF = dataclasses.replace(WINDOWS, size=1024 + 15)
BUDGETS = (32, 64)
LOUIS = ("LouisKV", "LouisKV, clusters of 4")
_STREAM = zlib.crc32(b"recall")


def config() -> Experiment:
    """The model, which reads short texts with positions of longer ones."""
    return Experiment(
        name="recall",
        tokenizer=SHORT.tokenizer,
        data=TaskSource(task=PlantedFacts(size=96, facts=16, span=SHORT.size)),
        batch_size=32,
        model=llama(
            vocab_size=SHORT.tokenizer.vocab_size, dim=128, num_layers=2, num_heads=4,
            num_kv_heads=2, hidden_dim=256, max_length=4096,
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=Muon(learning_rate=WarmupStableDecay(peak=1e-2), weight_decay=0.01),
        steps=400,
    )  # fmt: skip


@functools.cache
def reader() -> tuple[View, Tokenizer]:
    """The model, trained, and its tokenizer."""
    return trained(config())


class MeanProbe(ActQKV):
    """Retrieves by the mean query of a pass."""

    def weights(self, u, valid, moments):
        """Equal ones."""
        return valid / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Trial):
    """Share of the facts of a text that greedy decoding repeats through a cache.

    Attributes:
        policy: the policy.
        budget: earlier tokens that a layer keeps or reads.
        task: of the texts.
        rows: texts, each with all its questions.
        prefill_chunk: tokens of a text read in one pass; None reads it whole.
    """

    policy: CachePolicy
    budget: int
    task: PlantedFacts = SHORT
    rows: int = 64
    prefill_chunk: int | None = None

    def measure(self, *, seed: int) -> Measured:
        """Accuracy; how often it was retrieved; of EMS, which facts were kept."""
        view, _ = reader()
        drawn = self.task.sample(seed=(_STREAM, seed), count=self.rows)
        cut = self.task.size - 2 * self.task.facts
        texts, questions = drawn.tokens[:, :cut], drawn.tokens[:, cut:]
        scored = score_continuation(
            view, self.policy, texts.tolist(), questions.tolist(),
            prefill_chunk=self.prefill_chunk,
        )  # fmt: skip
        figures = {
            "recall/accuracy": float(scored.likeliest[:, 1::2].mean()),
            "recall/nats": float(-scored.logp[:, 1::2].mean()),
        }
        if "cache_selections" in scored.statistics:
            selections, passes = (
                scored.statistics[f"cache_{name}"].sum() for name in ("selections", "passes")
            )
            figures["recall/retrievals"] = float(selections / max(passes, 1))
        if isinstance(self.policy, EMS):
            places = np.arange(cut, self.task.size, 2) - drawn.difficulty[:, cut::2]
            figures |= survival(view, self.policy, texts, places)
        return Measured(figures=figures, costs={"budget": self.budget, "text": cut})


def survival(view: View, policy: EMS, texts, places) -> dict[str, float]:
    """Share of heads that keep a fact's entry, by thirds of the text, and how far they differ."""
    model, params = for_decoding(cast(Transformer, view.model), view.params)
    cache = _read((model, policy), params, jnp.asarray(texts))
    kept = np.stack([state.positions for state in cache.states])
    there = (kept[..., None] == places[:, None, None]).any(axis=3).mean(axis=(0, 2))
    third = places * 3 // texts.shape[1]
    shares = [float(there[third == part].mean()) for part in range(3)]
    names = ("early", "middle", "late")
    figures = {f"needles/{name}": share for name, share in zip(names, shares, strict=True)}
    return figures | {"needles/unevenness": max(shares) - min(shares)}


@functools.partial(jax.jit, static_argnums=0)
def _read(static, params, tokens) -> Cache:
    model, policy = static
    cache = model.empty_cache(policy, batch=len(tokens), capacity=tokens.shape[1])
    lengths = jnp.full(len(tokens), tokens.shape[1])
    return prefill(model, params, cache, tokens, lengths)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked(Trial):
    """Share of questions answered that come at the end of a window of the prompt.

    Attributes:
        policy: the policy.
        budget: earlier tokens that a layer reads on average.
        task: of the texts.
        window: tokens of a pass.
        problems: texts, each with one question.
    """

    policy: CachePolicy
    budget: int
    task: PlantedFacts = WINDOWS
    window: int = 128
    problems: int = 64

    def measure(self, *, seed: int) -> Measured:
        """Accuracy."""
        view, tokenizer = reader()
        decoder = Autoregressive(sampler=Greedy(), cache=self.policy, prefill_chunk=self.window)
        evaluation = TaskAccuracy(
            task=self.task, problems=self.problems, decoder=decoder, seed=seed
        )
        found = evaluation(model=view.model, params=view.params, tokenizer=tokenizer)
        costs = {"budget": self.budget, "text": self.task.size - 2 * self.task.facts}
        return Measured(figures={"recall/accuracy": found["accuracy"]}, costs=costs)


def policies(budget: int) -> dict[str, CachePolicy]:
    """Every policy at a budget; windows of 8 tokens where there is one."""
    ems = {"budget": budget, "window": 8, "slack": 4}
    louis = {"budget": budget, "sinks": 4, "window": 8}
    return {
        "sink and recent": SinkCache(budget=budget),
        "H2O": EMS(**ems, redundant=2.0, score="global"),
        "SnapKV": EMS(**ems, redundant=2.0, score="local"),
        "EMS": EMS(**ems),
        "PageTopK": PageTopK(budget=budget, page=8, window=8),
        "TokenSelect": TokenSelect(budget=budget, sinks=4, window=8),
        "LouisKV": LouisKV(**louis),
        "LouisKV, clusters of 4": LouisKV(**louis, cluster=4),
        "ActQKV": ActQKV(budget=budget, sinks=4, window=8, block=4),
    }


def study() -> Study:
    """An eighth and a quarter of a text, and the three settings of single policies."""
    arms: dict[str, Trial] = {"full cache": Recall(policy=FullCache(), budget=256)}
    for budget in BUDGETS:
        arms |= {
            f"{name} at {budget}": Recall(policy=policy, budget=budget)
            for name, policy in policies(budget).items()
        }
    wide = TokenSelect(budget=256, sinks=4, window=64)
    streaming = SinkCache(budget=256, renumber=True)
    probes = {"sinks": 16, "window": 128}
    coarse, fine = {**probes, "budget": 288, "block": 16}, {**probes, "budget": 212, "block": 4}
    chunked = functools.partial(Recall, prefill_chunk=64)
    arms |= {
        "records, full cache": Recall(policy=FullCache(), budget=256, task=RECORDS),
        **{
            f"records, {name} at 32": Recall(policy=policies(32)[name], budget=32, task=RECORDS)
            for name in LOUIS
        },
        "TokenSelect, 256 of 256": chunked(policy=wide, budget=256),
        "TokenSelect, 256 of 1024": chunked(policy=wide, budget=256, task=LONG),
        "full cache, 1024": chunked(policy=FullCache(), budget=1024, task=LONG),
        "sink and recent, 256 of 1024": chunked(policy=streaming, budget=256, task=LONG),
        "activation probe, 2048": Asked(policy=ActQKV(**coarse), budget=288),
        "mean probe, 2048": Asked(policy=MeanProbe(**coarse), budget=288),
        "activation probe, 1024": Asked(policy=ActQKV(**fine), budget=212, task=HALF),
        "mean probe, 1024": Asked(policy=MeanProbe(**fine), budget=212, task=HALF),
    }
    return Study(
        name="recall",
        question="Which caches still recall what a trained model recalls with all of its keys?",
        arms=arms,
        matched="budget",
        claims=claims(),
    )


def claims() -> tuple[Bound | Claim, ...]:
    """What the cards of the policies say of recall."""
    more = functools.partial(Claim, metric="recall/accuracy", better="higher")
    flatter = functools.partial(Claim, metric="needles/unevenness")
    token_select = functools.partial(more, arm="TokenSelect, 256 of 1024")
    return (
        Bound(arm="full cache", metric="recall/accuracy", limit=0.95),
        *(
            more(arm=f"{name} at 32", than="sink and recent at 32")
            for name in ("EMS", "PageTopK", "TokenSelect", "LouisKV", "ActQKV")
        ),
        *(
            flatter(arm=f"EMS at {budget}", than=f"{name} at {budget}")
            for budget in BUDGETS
            for name in ("H2O", "SnapKV")
        ),
        *(
            more(
                arm=f"records, {name} at 32", than="records, full cache", margin=-0.02,
                matched="text",
            )
            for name in LOUIS
        ),
        token_select(than="TokenSelect, 256 of 256", margin=-0.05),
        token_select(than="full cache, 1024", margin=0.25, matched="text"),
        token_select(than="sink and recent, 256 of 1024", margin=0.25),
        *(
            more(arm=f"activation probe, {text}", than=f"mean probe, {text}")
            for text in (2048, 1024)
        ),
    )  # fmt: skip

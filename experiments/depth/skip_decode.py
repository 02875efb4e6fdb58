"""SkipDecode on texts that say what slots hold, beside the twin that ends early.

The prompt is a list of slots, the text 35 tokens in clauses whose order and wording are free. From
the first token that is written to the last, layers fall from 6 to 2 of 8, on average half of them.

Paper:    Del Corro et al., "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for
          Efficient LLM Inference", 2023, arXiv:2307.02628.
Command:  python -m tokenlab study experiments/depth/skip_decode.py
Hardware: two CPU cores, ten minutes on a busy machine.
Expected: does not hold on this text, the only one with three seeds. Both ways to skip reach what
          nobody can predict, 0.294 nats a token, which full depth misses at one seed of three; at
          500 steps seeds differ more than arms. A token takes 0.64 of the time of full depth at
          0.58 of its layers. The arms train from the start under their schedule, where the paper
          fine-tunes.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
from flax import linen as nn

from tokenlab import config as configs
from tokenlab.core.context import View
from tokenlab.core.duration import Fraction
from tokenlab.data.tasks import SlotText, TaskSource
from tokenlab.decode import Autoregressive, Greedy
from tokenlab.depth import DepthProgram, Sequential, SkipDecode, linear_decay
from tokenlab.evals import DepthAllocation
from tokenlab.experiment import Experiment
from tokenlab.models import llama
from tokenlab.objectives import NextToken, Objective, Term
from tokenlab.study import Bound, Claim, Measured, Study, Trial
from tokenlab.train.checkpoint import Checkpointing
from tokenlab.train.optimizer import AdamW, Cosine

TASK = SlotText()
COLUMNS = TASK.length - TASK.prompt_length
SKIP = SkipDecode(
    counts=linear_decay(most=6, fewest=2, columns=COLUMNS), prompt_length=TASK.prompt_length
)


def config() -> Experiment:
    """The first layer, and the top ones that the column has."""
    return Experiment(
        name="skip_decode",
        tokenizer=TASK.tokenizer,
        data=TaskSource(task=TASK),
        batch_size=32,
        model=llama(
            vocab_size=TASK.tokenizer.vocab_size,
            dim=64,
            num_layers=8,
            num_heads=4,
            num_kv_heads=4,
            hidden_dim=128,
            depth=SKIP,
        ),
        objective=Objective(terms={"next_token": Term(loss=NextToken())}),
        optimizer=AdamW(learning_rate=Cosine(peak=3e-3)),
        steps=1000,
        checkpoint=Checkpointing(every=Fraction(of_run=1.0)),
        evals={"text": DepthAllocation(task=TASK)},
        log_every=100,
    )


def early() -> Experiment:
    """As many layers, from the bottom."""
    return configs.replace(config(), {"model.depth.keep": "bottom"})


def full() -> Experiment:
    """All layers in every column."""
    return configs.replace(config(), {"model.depth": Sequential()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock(Trial):
    """Time of a written token, over that of the same model at full depth.

    Attributes:
        tokens: tokens written by each of ``batch`` rows.
        batch: rows.
        layers: layers of the model; it runs from all of them to none but the first and the last.
        repeats: turns of both, of which the best counts.
    """

    tokens: int = 64
    batch: int = 8
    layers: int = 12
    repeats: int = 5

    def measure(self, *, seed: int) -> Measured:
        """Both write in turn."""
        counts = linear_decay(most=self.layers, fewest=2, columns=self.tokens)
        parts: dict[str, DepthProgram] = {
            "full": Sequential(),
            "skip": SkipDecode(counts=counts, prompt_length=8),
        }
        prompts = jax.random.randint(jax.random.key(seed), (self.batch, 8), 0, 512).tolist()
        decoder = Autoregressive(max_new_tokens=self.tokens, sampler=Greedy(), end_ids=())
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        views = {}
        for name, depth in parts.items():
            model = llama(
                vocab_size=512, dim=256, num_layers=self.layers, num_heads=4, num_kv_heads=4,
                hidden_dim=768, depth=depth,
            )  # fmt: skip
            zeros = jnp.zeros((1, 4), jnp.int32)
            where = {"positions": zeros, "segments": zeros + 1}
            params = jax.jit(model.init)(jax.random.key(seed), zeros, **where)["params"]
            views[name] = View(model=model, params=nn.meta.unbox(params))
            decoder(views[name], prompts, key=jax.random.key(0))
        for _ in range(self.repeats):
            for name, view in views.items():
                start = time.perf_counter()
                decoder(view, prompts, key=jax.random.key(0))
                seconds[name].append(time.perf_counter() - start)
        best = {name: min(each) for name, each in seconds.items()}
        share = sum(counts) / (self.layers * self.tokens)
        return Measured(
            figures={
                "clock/share_of_time": best["skip"] / best["full"],
                "clock/share_of_layers": share,
                "clock/full_ms_per_step": 1e3 * best["full"] / self.tokens,
            },
            costs={"tokens": float(self.tokens * self.batch)},
        )


def study() -> Study:
    """All at equal tokens; the two that skip also at equal work."""
    return Study(
        name="skip_decode",
        question="Does it matter which layers late tokens run, at half of them on average?",
        arms={"skip": config(), "early": early(), "full": full(), "clock": Clock()},
        matched="tokens",
        claims=(
            Claim(arm="skip", than="early", metric="text/nats"),
            Claim(arm="skip", than="early", metric="text/late_nats"),
            Claim(arm="skip", than="full", metric="text/nats", margin=-0.05, relative=True),
            Bound(arm="clock", metric="clock/share_of_time", limit=0.75, side="below"),
        ),
    )
